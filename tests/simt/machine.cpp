// Runs the threads of a launch as fibers in a random order, and lets them meet in barriers and warp
// collectives.
#include "machine.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#if !defined(__x86_64__) || defined(MOEKV_SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

Machine machine;
int compute_capability = 80;

namespace {

constexpr size_t kGuardBytes = 4096;
constexpr uint64_t kStepsWithoutProgress = 3'000'000;
constexpr uint64_t kMaxSteps = 400'000'000;

uint64_t schedule_seed = 0, launches_in_schedule = 0;
unsigned max_residents = 1;
void* expected_stream = nullptr;
int seeded_number = 0;

// --- Fibers -------------------------------------------------------------------------------------

void run_thread();

#if defined(__x86_64__) && !defined(MOEKV_SIMT_UCONTEXT)
// Saves what a call must preserve; swapcontext would also make a system call.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

void* new_stack_pointer(char* stack, unsigned number) {
  // Tops of stacks at different offsets do not fight for the same lines of the cache.
  auto* top = reinterpret_cast<uintptr_t*>(stack + kStackBytes - number % 61 * 64);
  *--top = 0;  // the return address of run_thread, which does not return; also aligns the stack
  *--top = reinterpret_cast<uintptr_t>(&run_thread);
  for (int i = 0; i < 6; ++i) *--top = 0;
  return top;
}
#else
std::unordered_map<char*, std::unique_ptr<ucontext_t>> contexts;

void simt_switch(void** save, void* load) {
  auto* const to = static_cast<ucontext_t*>(load);
  // The context of the host, or of the fiber that `save` belongs to.
  static ucontext_t host;
  ucontext_t* from = &host;
  for (auto& thread : machine.block->threads) {
    if (save == &thread.stack_pointer) from = contexts[thread.stack].get();
  }
  *save = from;
  swapcontext(from, to);
}

void* new_stack_pointer(char* stack, unsigned) {
  auto& context = contexts[stack];
  if (!context) context = std::make_unique<ucontext_t>();
  getcontext(context.get());
  context->uc_stack = {.ss_sp = stack, .ss_flags = 0, .ss_size = kStackBytes};
  context->uc_link = nullptr;
  makecontext(context.get(), &run_thread, 0);
  return context.get();
}
#endif

void* host_stack_pointer;
#if SIMT_ASAN
const void* host_stack_bottom;
size_t host_stack_bytes;
void* host_fake_stack;
#endif

#if SIMT_ASAN
// The sanitizer knows no kernels.
const bool reports_name_the_thread = [] {
  __asan_set_error_report_callback([](const char*) {
    if (!machine.thread) return;
    std::fprintf(stderr, "in kernel %s, block %s, %s\n", name_of_kernel().c_str(),
                 name_of(machine.block->index).c_str(), name_of(*machine.thread).c_str());
  });
  return true;
}();
#endif

void enter(Thread& thread) {
  machine.thread = &thread;
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(&host_fake_stack, thread.stack, kStackBytes);
#endif
  simt_switch(&host_stack_pointer, thread.stack_pointer);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
#endif
  machine.thread = nullptr;
}

// Back to the scheduler.
void leave() {
  settle();
  Thread& thread = *machine.thread;
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(thread.state == State::kDone ? nullptr : &thread.fake_stack,
                                 host_stack_bottom, host_stack_bytes);
#endif
  simt_switch(&thread.stack_pointer, host_stack_pointer);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(thread.fake_stack, &host_stack_bottom, &host_stack_bytes);
#endif
}

// Stacks are kept for the next block. There may be tens of thousands, and a process has few
// mappings: many stacks share one, with a page below them that must not be touched. Between them
// stands a number that must not change.
constexpr uint64_t kCanary = 0x5afe5afe5afe5afe;
std::vector<char*> free_stacks;

char* take_stack() {
  if (free_stacks.empty()) {
    constexpr size_t kBytes = kStacksPerMapping * kStackBytes;
    void* const memory = mmap(nullptr, kBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      std::perror("simt: no memory for stacks");
      std::abort();
    }
    for (size_t i = kStacksPerMapping; i-- > 0;) {
      free_stacks.push_back(static_cast<char*>(memory) + kGuardBytes + i * kStackBytes);
    }
  }
  char* const stack = free_stacks.back();
  free_stacks.pop_back();
#if SIMT_ASAN
  // A thread that was given up in the middle has left its redzones.
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
  std::memcpy(stack, &kCanary, sizeof kCanary);
  return stack;
}

void give_stack_back(char* stack) {
  if (std::memcmp(stack, &kCanary, sizeof kCanary) != 0) {
    std::fputs("simt: a thread's stack is full\n", stderr);
    std::abort();
  }
  free_stacks.push_back(stack);
}

// --- Blocks -------------------------------------------------------------------------------------

Index unflatten(uint64_t i, const dim3& size) {
  return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
          static_cast<unsigned>(i / size.x / size.y)};
}

std::unique_ptr<Block> begin_block(uint32_t number, unsigned slot) {
  const Launch& launch = *machine.launch;
  auto block = std::make_unique<Block>();
  block->index = unflatten(number, launch.grid);
  block->number = number;
  block->uid = machine.first_uid + number;
  block->slot = slot;
  const unsigned size = launch.block.x * launch.block.y * launch.block.z;
  block->threads.resize(size);
  block->warps.resize((size + kWarpSize - 1) / kWarpSize);
  for (unsigned i = 0; i < size; ++i) {
    Thread& thread = block->threads[i];
    thread.index = unflatten(i, launch.block);
    thread.number = static_cast<uint16_t>(i);
    thread.lane = static_cast<uint16_t>(i % kWarpSize);
    thread.warp = i / kWarpSize;
    thread.state = State::kReady;
    thread.stack = take_stack();
    thread.stack_pointer = new_stack_pointer(thread.stack, i);
    block->warps[thread.warp].lanes |= 1u << thread.lane;
    block->ready.push_back(thread.number);
  }
  begin_block_memory(*block, launch.shared_bytes);
  return block;
}

void end_block(Block& block) {
  end_block_memory(block);
  for (const Thread& thread : block.threads) give_stack_back(thread.stack);
}

// "thread (3, 0, 0) at f.cu:12", for the threads that are not done.
std::string waiting_threads(const Block& block) {
  std::string text;
  int count = 0;
  for (const Thread& thread : block.threads) {
    if (thread.state == State::kDone) continue;
    if (++count > 4) return text + ", ...";
    text += (count > 1 ? ", " : "") + name_of(thread);
    if (thread.state == State::kReady) continue;
    text += " at " + name_of(thread.site);
    if (thread.state == State::kCollective) {
      text += " (mask " + hexadecimal(thread.offer.mask) + ")";
    }
  }
  return text;
}

// --- Schedules ----------------------------------------------------------------------------------

// How a launch is scheduled; drawn from the seed.
struct Style {
  unsigned residents;     // blocks at once
  unsigned block_switch;  // one in so many steps changes the block
  unsigned order;         // of the ready threads: 0 any, 1 the last, 2 the first
  uint32_t interval;      // accesses between switches
};

Style draw_style(Random& random) {
  constexpr uint32_t kIntervals[] = {1u << 30, 1u << 30, 700, 60, 5};
  return {.residents = 1 + random.below(max_residents),
          .block_switch = random.one_in(2) ? 3u : 40u,
          .order = random.one_in(2) ? 0 : 1 + random.below(2),
          .interval = kIntervals[random.below(std::size(kIntervals))]};
}

uint16_t take_ready(Block& block, const Style& style) {
  auto& ready = block.ready;
  const auto size = static_cast<uint32_t>(ready.size());
  // Some threads must not wait for ever while others spin.
  const bool any = style.order == 0 || machine.random.one_in(8);
  const uint32_t i = any ? machine.random.below(size) : style.order == 1 ? size - 1 : 0;
  const uint16_t number = ready[i];
  ready[i] = ready.back();
  ready.pop_back();
  return number;
}

// The meeting whose mask names the thread, which is elsewhere.
const Meeting* awaiting(const Thread& thread) {
  for (const Meeting& meeting : machine.block->warps[thread.warp].meetings) {
    if (meeting.mask >> thread.lane & 1) return &meeting;
  }
  return nullptr;
}

std::string describe(const Meeting& meeting, const Thread& thread) {
  const unsigned lane = static_cast<unsigned>(std::countr_zero(meeting.arrived));
  return name_of(machine.block->threads[thread.warp * kWarpSize + lane]) + " waits for it in " +
         name_of(meeting.kind) + " at " + name_of(meeting.site) + ", mask " +
         hexadecimal(meeting.mask);
}

void run_thread() {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &host_stack_bottom, &host_stack_bytes);
#endif
  {
    const Launch& launch = *machine.launch;
    alignas(16) char arguments[5120];
    std::memcpy(arguments, launch.arguments, launch.arguments_size);
    launch.run(arguments);
  }
  Thread& thread = *machine.thread;
  Block& block = *machine.block;
  finish_copies(thread);
  if (block.arrived > 0) {
    fail("exits while " + name_of(block.threads[block.first_arrived]) +
         " waits in __syncthreads at " + name_of(block.barrier_site));
  }
  if (const Meeting* meeting = awaiting(thread)) fail("exits while " + describe(*meeting, thread));
  block.warps[thread.warp].exited |= 1u << thread.lane;
  ++block.done;
  thread.state = State::kDone;
  made_progress();
  leave();
  std::abort();  // nobody enters a thread that is done
}

void make_ready(Block& block, Thread& thread) {
  thread.state = State::kReady;
  block.ready.push_back(thread.number);
}

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

// --- What the lanes of a warp get from a collective ---------------------------------------------

int source_lane(const Thread& thread) {
  const Offer& offer = thread.offer;
  const int lane = thread.lane, begin = lane & ~(offer.width - 1), end = begin + offer.width;
  switch (offer.kind) {
    case Collective::kShuffle:
      return begin + (offer.lane & (offer.width - 1));
    case Collective::kShuffleUp:
      return lane - offer.lane < begin ? lane : lane - offer.lane;
    case Collective::kShuffleDown:
      return lane + offer.lane >= end ? lane : lane + offer.lane;
    default:
      return (lane ^ offer.lane) >= end ? lane : lane ^ offer.lane;
  }
}

void shuffle(Thread* lanes, uint32_t mask) {
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (!(mask >> i & 1)) continue;
    const int width = lanes[i].offer.width;
    if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width))) {
      fail("shuffles with width " + std::to_string(width) + " at " + name_of(lanes[i].site));
    }
    const int source = source_lane(lanes[i]);
    if (!(mask >> source & 1)) {
      fail("lane " + std::to_string(i) + " reads from lane " + std::to_string(source) +
           ", which mask " + hexadecimal(mask) + " leaves out, at " + name_of(lanes[i].site));
    }
    lanes[i].result = lanes[source].offer.value;
  }
}

uint32_t reduce(const Thread* lanes, uint32_t mask, Collective kind) {
  uint32_t result = 0;
  bool first = true;
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (!(mask >> i & 1)) continue;
    const uint32_t value = lanes[i].offer.value;
    // The order of signed numbers is that of unsigned ones with the sign bit flipped.
    const uint32_t flip = lanes[i].offer.is_signed ? 1u << 31 : 0;
    switch (kind) {
      case Collective::kBallot:
        result |= value << i;
        break;
      case Collective::kAny:
        result |= value;
        break;
      case Collective::kAll:
        result = first ? value : result & value;
        break;
      case Collective::kReduceAdd:
        result += value;
        break;
      case Collective::kReduceMin:
        if (first || (value ^ flip) < (result ^ flip)) result = value;
        break;
      default:
        if (first || (value ^ flip) > (result ^ flip)) result = value;
        break;
    }
    first = false;
  }
  return result;
}

// Tensor cores add up in fp32, and cut off instead of rounding.
float add_cut_off(float sum, double term) {
  const double exact = sum + term;
  const auto nearest = static_cast<float>(exact);
  return std::fabs(nearest) > std::fabs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
}

// D += A B of mma.m16n8k16; device.h draws the fragments.
void multiply(Thread* lanes) {
  float a[16][16], b[16][8];
  const auto to_float = lanes[0].offer.to_float;
  const auto half = [&](uint32_t pair, int i) {
    return to_float(static_cast<uint16_t>(pair >> (16 * i)));
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Offer& offer = lanes[lane].offer;
    for (int i = 0; i < 2; ++i) {
      a[g][2 * t + i] = half(offer.a[0], i);
      a[g + 8][2 * t + i] = half(offer.a[1], i);
      a[g][2 * t + 8 + i] = half(offer.a[2], i);
      a[g + 8][2 * t + 8 + i] = half(offer.a[3], i);
      b[2 * t + i][g] = half(offer.b[0], i);
      b[2 * t + 8 + i][g] = half(offer.b[1], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + i / 2 * 8, column = 2 * t + i % 2;
      float& sum = lanes[lane].offer.d[i];
      for (int k = 0; k < 16; ++k) {
        sum = add_cut_off(sum, static_cast<double>(a[row][k]) * b[k][column]);
      }
    }
  }
}

void synchronise(Block& block, Warp& warp, uint32_t mask) {
  uint32_t joined[kWarpSize] = {};
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (!(mask >> i & 1)) continue;
    for (unsigned j = 0; j < kWarpSize; ++j) joined[j] = std::max(joined[j], warp.clock[i][j]);
  }
  ++block.seq;
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (mask >> i & 1) joined[i] = block.seq;
  }
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (mask >> i & 1) std::copy(joined, joined + kWarpSize, warp.clock[i]);
  }
}

void complete(Block& block, Warp& warp, Thread* lanes, const Offer& offer) {
  switch (offer.kind) {
    case Collective::kSyncWarp:
      synchronise(block, warp, offer.mask);
      break;
    case Collective::kShuffle:
    case Collective::kShuffleUp:
    case Collective::kShuffleDown:
    case Collective::kShuffleXor:
      shuffle(lanes, offer.mask);
      break;
    case Collective::kMma:
      multiply(lanes);
      break;
    default: {
      const uint32_t result = reduce(lanes, offer.mask, offer.kind);
      for (unsigned i = 0; i < kWarpSize; ++i) {
        if (offer.mask >> i & 1) lanes[i].result = result;
      }
    }
  }
}

}  // namespace

// --- Errors -------------------------------------------------------------------------------------

// Without the parentheses that keep the commas of a template together.
std::string name_of_kernel() {
  const std::string name = machine.launch->name;
  return name[0] == '(' ? name.substr(1, name.size() - 2) : name;
}

std::string hexadecimal(uint64_t value) {
  char text[20];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string name_of(const Index& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::kSyncWarp:
      return "__syncwarp";
    case Collective::kShuffle:
      return "__shfl_sync";
    case Collective::kShuffleUp:
      return "__shfl_up_sync";
    case Collective::kShuffleDown:
      return "__shfl_down_sync";
    case Collective::kShuffleXor:
      return "__shfl_xor_sync";
    case Collective::kBallot:
      return "__ballot_sync";
    case Collective::kAny:
      return "__any_sync";
    case Collective::kAll:
      return "__all_sync";
    case Collective::kReduceAdd:
    case Collective::kReduceMin:
    case Collective::kReduceMax:
      return "__reduce_sync";
    case Collective::kMma:
      return "mma";
  }
  return "";
}

std::string name_of_thread(uint32_t number) {
  return "thread " + name_of(unflatten(number, machine.launch->block));
}
std::string name_of_block(uint32_t number) {
  return name_of(unflatten(number, machine.launch->grid));
}
std::string name_of(const Thread& thread) { return "thread " + name_of(thread.index); }

std::string name_of(Site site) {
  const std::string path = site.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

void fail(const std::string& what, std::vector<const void*> pcs) {
  const Thread& thread = *machine.thread;
  machine.error = "kernel " + name_of_kernel() + ", block " + name_of(machine.block->index) + ", " +
                  name_of(thread) + ": " + what;
  machine.error_pcs = std::move(pcs);
  leave();
  std::abort();  // a thread that failed is given up
}

// --- What kernels call --------------------------------------------------------------------------

Index thread_index() { return machine.thread->index; }
Index block_index() { return machine.block->index; }
Index block_size() {
  const dim3& size = machine.launch->block;
  return {size.x, size.y, size.z};
}
Index grid_size() {
  const dim3& size = machine.launch->grid;
  return {size.x, size.y, size.z};
}

bool seeded(int number) { return number == seeded_number; }
void seed_bug(int number) { seeded_number = number; }

void yield() {
  make_ready(*machine.block, *machine.thread);
  leave();
}
void pause() { yield(); }

int barrier(Barrier kind, int predicate, Site site) {
  settle();
  Block& block = *machine.block;
  Thread& thread = *machine.thread;
  thread.site = site;
  if (block.done > 0) {
    fail("is in __syncthreads at " + name_of(site) + ", which " + std::to_string(block.done) +
         " threads of the block never reach: they have exited");
  }
  if (const Meeting* meeting = awaiting(thread)) {
    fail("is in __syncthreads at " + name_of(site) + " while " + describe(*meeting, thread));
  }
  if (block.arrived == 0) {
    block.barrier_kind = kind;
    block.barrier_site = site;
    block.barrier_value = kind == Barrier::kAnd;
    block.first_arrived = thread.number;
  } else if (kind != block.barrier_kind || !same(site, block.barrier_site)) {
    fail("is in __syncthreads at " + name_of(site) + " while " +
         name_of(block.threads[block.first_arrived]) + " is in another one, at " +
         name_of(block.barrier_site));
  }
  switch (kind) {
    case Barrier::kAnd:
      block.barrier_value = block.barrier_value && predicate;
      break;
    case Barrier::kOr:
      block.barrier_value = block.barrier_value || predicate;
      break;
    default:
      block.barrier_value += predicate != 0;
  }
  ++block.arrived;
  block.warps[thread.warp].in_barrier |= 1u << thread.lane;
  thread.state = State::kBarrier;
  if (block.arrived < block.threads.size()) {
    leave();
  } else {
    block.arrived = 0;
    ++block.barriers;
    block.barrier_seq = ++block.seq;
    for (Warp& warp : block.warps) warp.in_barrier = 0;
    for (Thread& other : block.threads) {
      other.result = static_cast<uint32_t>(block.barrier_value);
      for (Shared& knowledge : other.unacquired) block.unacquired.push_back(std::move(knowledge));
      other.unacquired.clear();
      make_ready(block, other);
    }
    made_progress();
    leave();
  }
  return static_cast<int>(thread.result);
}

uint32_t collective(const Offer& offer, Site site) {
  settle();
  Block& block = *machine.block;
  Thread& thread = *machine.thread;
  Warp& warp = block.warps[thread.warp];
  thread.offer = offer;
  thread.site = site;
  const auto where = [&] {
    return std::string(name_of(offer.kind)) + " at " + name_of(site) + ", mask " +
           hexadecimal(offer.mask);
  };
  if (!(offer.mask >> thread.lane & 1)) fail("is not in the mask of its own " + where());
  if (const uint32_t absent = offer.mask & (~warp.lanes | warp.exited)) {
    fail("is in " + where() + ", which lane " + std::to_string(std::countr_zero(absent)) +
         " never reaches: it has exited, or the block has no such thread");
  }
  if (const uint32_t stuck = offer.mask & warp.in_barrier) {
    const auto lane = static_cast<unsigned>(std::countr_zero(stuck));
    fail("waits in " + where() + ", for " + name_of(block.threads[thread.warp * kWarpSize + lane]) +
         ", which waits in __syncthreads at " + name_of(block.barrier_site));
  }
  Meeting* meeting = nullptr;
  for (Meeting& other : warp.meetings) {
    if (other.kind == offer.kind && other.mask == offer.mask &&
        (offer.kind == Collective::kSyncWarp || same(other.site, site))) {
      meeting = &other;
    } else if ((other.mask >> thread.lane & 1) && (other.arrived & offer.mask)) {
      fail("is in " + where() + ", while " + describe(other, thread));
    }
  }
  if (!meeting) {
    warp.meetings.push_back({offer.kind, offer.mask, 0, site});
    meeting = &warp.meetings.back();
  }
  meeting->arrived |= 1u << thread.lane;
  if (meeting->arrived != offer.mask) {
    thread.state = State::kCollective;
    leave();
    return thread.result;
  }
  *meeting = warp.meetings.back();
  warp.meetings.pop_back();
  // Lanes that the warp lacks are in no mask, so what lies beyond the block is not read.
  Thread* const lanes = &block.threads[thread.warp * kWarpSize];
  complete(block, warp, lanes, offer);
  for (uint32_t rest = offer.mask & ~(1u << thread.lane); rest; rest &= rest - 1) {
    make_ready(block, lanes[std::countr_zero(rest)]);
  }
  if (machine.random.one_in(2)) yield();
  return thread.result;
}

void set_schedule(uint64_t seed, unsigned residents, void* stream) {
  if (residents > kMaxResident) {
    throw Error("expected 0 to " + std::to_string(kMaxResident) + " blocks at once, got " +
                std::to_string(residents));
  }
  schedule_seed = seed;
  max_residents = residents;
  expected_stream = stream;
  launches_in_schedule = 0;
}

void check_stream(const char* what, const void* stream) {
  if (stream != expected_stream) throw Error(std::string(what) + " is on another stream");
}

// --- Launches -----------------------------------------------------------------------------------

void check_size(const char* kernel, const dim3& grid, const dim3& block, size_t shared_bytes) {
  const auto expect = [&](bool condition, const std::string& what) {
    if (!condition) throw Error(std::string("launch of ") + kernel + ": " + what);
  };
  expect(grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
             grid.z <= 65535,
         "expected a grid of 1 to 2^31 - 1, 65535 and 65535 blocks, got " +
             name_of(Index{grid.x, grid.y, grid.z}));
  expect(block.x >= 1 && block.y >= 1 && block.z >= 1 && block.z <= 64 &&
             uint64_t{block.x} * block.y * block.z <= kMaxThreads,
         "expected 1 to 1024 threads in a block, got " + name_of(Index{block.x, block.y, block.z}));
  expect(shared_bytes <= kMaxShared, "expected at most " + std::to_string(kMaxShared) +
                                         " bytes of dynamic shared memory, got " +
                                         std::to_string(shared_bytes));
}

namespace {

void run_blocks() {
  if (max_residents == 0) return;
  Random& random = machine.random;
  const Style style = draw_style(random);
  machine.switch_interval = style.interval;
  machine.accesses_until_switch = 1 + random.below(style.interval);
  std::vector<uint32_t> waiting(machine.num_blocks);
  for (uint32_t i = 0; i < machine.num_blocks; ++i) {
    waiting[i] = i;
    std::swap(waiting[i], waiting[random.below(i + 1)]);
  }
  std::vector<std::unique_ptr<Block>> residents;
  std::vector<unsigned> slots;
  for (unsigned i = 0; i < style.residents; ++i) slots.push_back(i);

  const auto finish = [&] {
    machine.block = nullptr;
    for (const auto& block : residents) end_block(*block);
  };
  size_t current = 0;
  while (true) {
    while (!slots.empty() && !waiting.empty()) {
      residents.push_back(begin_block(waiting.back(), slots.back()));
      waiting.pop_back();
      slots.pop_back();
    }
    if (residents.empty()) break;
    if (current >= residents.size() || random.one_in(style.block_switch)) {
      current = random.below(static_cast<uint32_t>(residents.size()));
    }
    Block& block = *residents[current];
    machine.block = &block;
    if (block.ready.empty()) {
      machine.error = "kernel " + name_of_kernel() + ", block " + name_of(block.index) +
                      ": no thread can go on: " + waiting_threads(block);
    } else {
      enter(block.threads[take_ready(block, style)]);
    }
    ++machine.steps;
    if (machine.error.empty() &&
        (machine.steps - machine.steps_at_progress > kStepsWithoutProgress ||
         machine.steps > kMaxSteps)) {
      machine.error = "kernel " + name_of_kernel() + ", block " + name_of(block.index) +
                      ": the threads run on without progress: " + waiting_threads(block);
    }
    if (!machine.error.empty()) break;
    if (block.done == block.threads.size()) {
      slots.push_back(block.slot);
      end_block(block);
      std::swap(residents[current], residents.back());
      residents.pop_back();
    }
  }
  finish();
}

}  // namespace

void launch(const Launch& launch) {
  check_host();
  check_stream(launch.name, launch.stream);
  check_size(launch.name, launch.grid, launch.block, launch.shared_bytes);
  machine.launch = &launch;
  machine.random = Random(schedule_seed * 1000 + launches_in_schedule++);
  machine.num_blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  machine.first_uid = machine.next_uid;
  machine.next_uid += machine.num_blocks;
  machine.steps = machine.steps_at_progress = 0;
  machine.error.clear();
  machine.error_pcs.clear();
  begin_launch_memory();
  run_blocks();
  end_launch_memory();
  if (!machine.error.empty()) {
    std::string what = machine.error;
    for (const void* pc : machine.error_pcs) what += "\n  " + describe_code(pc);
    throw Error(what);
  }
}

}  // namespace simt
