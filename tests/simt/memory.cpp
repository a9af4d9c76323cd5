// Places the memory of the simulated device and watches every access to it.
//
// The kernels are compiled with -fsanitize=thread, which calls a function before each access; the
// functions are here, not in the sanitizer's library. For each 8 bytes of memory they keep the last
// few accesses, and from barriers, __syncwarp, fences and atomics which of them come before the
// present one. A conflicting access that does not is a race, whatever the schedule was. Compiled
// with AddressSanitizer instead, memory lies in blocks of the heap of exactly its size.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <span>
#include <tuple>
#include <utility>

#include "machine.h"

namespace simt {
namespace {

enum Kind : uint8_t { kRead = 0, kWrite = 1, kAtomic = 2, kConstant = 4 };  // bits

struct Record {
  uint32_t uid;  // of the block; 0: no record
  uint32_t seq;
  uint16_t thread;
  uint8_t bytes;  // of the granule
  uint8_t kind;
  uint32_t pc;  // from the beginning of this library
};

#if !SIMT_ASAN
constexpr size_t kGranule = 8;
constexpr size_t kRecords = 4;

struct alignas(64) Shadow {
  Record records[kRecords];
};

// [shared memory of the resident blocks | global memory]
constexpr size_t kSlotBytes = 256 << 10;
constexpr size_t kSharedBytes = kMaxResident * kSlotBytes;
constexpr size_t kArenaBytes = size_t{1} << 36;
constexpr size_t kSparse = size_t{256}
                           << 20;  // pieces of more are touched only where they are used
constexpr size_t kGap = 64;        // between two pieces of memory

struct Arena {
  char* data;
  Shadow* shadow;
  uint8_t* valid;    // per granule, a bit per byte: there is memory
  uint8_t* written;  // ... and somebody has written it
};

template <typename T>
T* reserve(size_t count) {
  void* const memory = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("simt: no memory");
    std::abort();
  }
  return static_cast<T*>(memory);
}

const Arena arena = {reserve<char>(kArenaBytes), reserve<Shadow>(kArenaBytes / kGranule),
                     reserve<uint8_t>(kArenaBytes / kGranule),
                     reserve<uint8_t>(kArenaBytes / kGranule)};

void set_bits(uint8_t* bits, size_t begin, size_t end, bool value) {
  for (size_t i = begin; i < end;) {
    if (i % kGranule == 0 && i + kGranule <= end) {
      bits[i / kGranule] = value ? 0xff : 0;
      i += kGranule;
    } else {
      const auto bit = static_cast<uint8_t>(1u << i % kGranule);
      bits[i / kGranule] =
          static_cast<uint8_t>(value ? bits[i / kGranule] | bit : bits[i / kGranule] & ~bit);
      ++i;
    }
  }
}

size_t next_free = kSharedBytes;
#endif

std::map<char*, size_t> allocations;
std::string host_error;

// The allocation around an address, or null.
const std::pair<char* const, size_t>* allocation_at(const char* address) {
  auto it = allocations.upper_bound(const_cast<char*>(address));
  if (it == allocations.begin()) return nullptr;
  --it;
  return address < it->first + it->second ? &*it : nullptr;
}

// What a location of global memory has held that atomics and `volatile` accesses meet at. A load
// may still get an old value, as long as nothing tells its thread of a newer one: neither the write
// nor somebody's read of that comes before it.
struct Version {
  uint64_t value;
  Shared released;  // by whoever wrote it, and before
  Record writer;
  std::vector<Record> readers;
};
constexpr size_t kVersions = 4;
struct Location {
  size_t size = 0;
  std::vector<Version> versions;  // the last is in memory
};
std::unordered_map<uintptr_t, Location> locations;

// --- Code ---------------------------------------------------------------------------------------

struct Library {
  uintptr_t base = 0, end = 0;
  std::string path;
};

const Library& library() {
  static const Library library = [] {
    Library found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* result) {
          uintptr_t end = 0;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type == PT_LOAD) end = std::max(end, header.p_vaddr + header.p_memsz);
          }
          const auto here = reinterpret_cast<uintptr_t>(&machine);
          if (here < info->dlpi_addr || here >= info->dlpi_addr + end) return 0;
          *static_cast<Library*>(result) = {info->dlpi_addr, info->dlpi_addr + end,
                                            info->dlpi_name};
          return 1;
        },
        &found);
    return found;
  }();
  return library;
}

uint32_t offset_of(const void* pc) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc) - library().base);
}

#if !SIMT_ASAN
const void* code_at(uint32_t offset) {
  return reinterpret_cast<const void*>(library().base + offset);
}

// --- Races --------------------------------------------------------------------------------------

bool comes_before(const Record& record, const Block& block, const Thread& thread) {
  if (record.uid < machine.first_uid) return true;  // of an earlier launch
  const uint32_t warp = record.thread / kWarpSize;
  if (record.uid == block.uid) {
    return record.thread == thread.number || record.seq < block.barrier_seq ||
           (warp == thread.warp &&
            record.seq < block.warps[warp].clock[thread.lane][record.thread % kWarpSize]);
  }
  if (block.known.empty()) return false;
  const Released& released = block.known[record.uid - machine.first_uid];
  return record.seq < released.barrier ||
         ((released.warp == warp || released.warp == kAnyWarp) && record.seq < released.seq);
}

const char* name_of_kind(uint8_t kind) {
  if (kind & kAtomic) return "an atomic";
  return kind & kWrite ? "a write" : "a read";
}

[[noreturn]] void fail_race(const Record& record, const char* memory, size_t begin, uint8_t kind,
                            const void* pc) {
  std::string other = name_of_thread(record.thread);
  if (record.uid != machine.block->uid) {
    other += " of block " + name_of_block(record.uid - machine.first_uid);
  }
  fail(std::string(name_of_kind(kind)) + " of " + memory + " memory at " + hexadecimal(begin) +
           " races with " + name_of_kind(record.kind) + " by " + other,
       {pc, code_at(record.pc)});
}

void check_races(Shadow& shadow, uint8_t bytes, uint8_t kind, bool shared, size_t begin,
                 const void* pc) {
  const Block& block = *machine.block;
  const Thread& thread = *machine.thread;
  Record* slot = nullptr;
  int best = 0;
  for (Record& record : shadow.records) {
    int fitness;  // of being overwritten
    if (record.uid < machine.first_uid) {
      fitness = 5;
    } else if (shared && record.uid != block.uid) {
      fitness = 5;  // of a block that had the same place
    } else {
      const bool before = comes_before(record, block, thread);
      if (record.bytes & bytes) {
        const bool conflict = ((record.kind | kind) & kWrite) && !(record.kind & kind & kAtomic);
        if (conflict && !before) fail_race(record, shared ? "shared" : "global", begin, kind, pc);
        const uint8_t both = record.kind | kind;
        if ((both & kConstant) && (both & kWrite)) {
          fail("a load through the read-only cache of global memory at " + hexadecimal(begin) +
                   " that the same kernel writes",
               {pc, code_at(record.pc)});
        }
      }
      const bool covered =
          (record.bytes & ~bytes) == 0 && ((record.kind & kWrite) <= (kind & kWrite));
      if (covered && record.uid == block.uid && record.thread == thread.number) {
        fitness = 6;
      } else if (before && covered) {
        fitness = 4;
      } else if (before) {
        fitness = 3;
      } else {
        fitness = 1 + (machine.random.next() & 1);
      }
    }
    if (fitness > best) {
      best = fitness;
      slot = &record;
    }
  }
  *slot = {block.uid, block.seq, thread.number, bytes, kind, offset_of(pc)};
}

// --- Accesses -----------------------------------------------------------------------------------

[[noreturn]] void fail_access(const char* what, const char* memory, size_t size, uint8_t kind,
                              uintptr_t address, const void* pc) {
  fail(std::string(name_of_kind(kind)) + " of " + std::to_string(size) + " bytes " + what + " " +
           memory + " memory, at " + hexadecimal(address),
       {pc});
}

void access_host(uintptr_t address, size_t size, uint8_t kind, const void* pc) {
  const auto offset = address - reinterpret_cast<uintptr_t>(arena.data);
  if (offset < kArenaBytes && host_error.empty()) {
    host_error = std::string("the host does ") + name_of_kind(kind) + " of " +
                 std::to_string(size) + " bytes of device memory\n  " + describe_code(pc);
  }
}

bool is_sparse(size_t begin, size_t size) {
  const auto* found = allocation_at(arena.data + begin);
  return found && found->second > kSparse &&
         arena.data + begin + size <= found->first + found->second;
}

void access_watched(uintptr_t address, size_t size, uint8_t kind, const void* pc) {
  const Block& block = *machine.block;
  const auto data = reinterpret_cast<uintptr_t>(arena.data);
  const size_t begin = address - data;
  if (begin >= kArenaBytes) {
    const bool in_library = address >= library().base && address < library().end;
    if (in_library && !(kind & kWrite)) return;  // a constant
    fail_access("of", "no kind of device", size, kind, address, pc);
  }
  const bool shared = begin < kSharedBytes;
  const char* const memory = shared ? "shared" : "global";
  if (shared && begin / kSlotBytes != block.slot) {
    fail_access("of another block's", memory, size, kind, address, pc);
  }
  for (size_t at = begin; at < begin + size;) {
    const size_t granule = at / kGranule, first = at % kGranule;
    const size_t count = std::min(kGranule - first, begin + size - at);
    const auto bytes = static_cast<uint8_t>(((1u << count) - 1) << first);
    if ((bytes & ~arena.valid[granule]) && !is_sparse(begin, size)) {
      fail_access("out of the bounds of", memory, size, kind, address, pc);
    }
    if (!(kind & kWrite) || (kind & kAtomic)) {
      if (bytes & ~arena.written[granule]) {
        fail_access("that nobody has written in", memory, size, kind, address, pc);
      }
    }
    if (kind & kWrite) arena.written[granule] |= bytes;
    check_races(arena.shadow[granule], bytes, kind, shared, begin, pc);
    at += count;
  }
  if (kind & kWrite) made_progress();
}

// --- Traffic ------------------------------------------------------------------------------------

// What one lane does in one execution of an instruction.
struct LaneAccess {
  uint32_t pc, uid, warp, nth;  // nth: of the lane's executions
  bool shared, write;
  uint16_t lane;
  uint32_t size;
  size_t begin;

  auto instruction() const { return std::tie(pc, shared, write); }
  // Lanes that do the same for the same time are taken to do it together.
  auto execution() const { return std::tie(pc, shared, write, uid, warp, nth); }
};
bool counts_traffic = false;
std::vector<LaneAccess> lane_accesses;  // of the launch
std::unordered_map<uint64_t, uint32_t> executions;
std::unordered_map<uint64_t, size_t> last_of_lane;  // in lane_accesses
std::vector<Traffic> traffic;

void note_traffic(uintptr_t address, size_t size, uint8_t kind, const void* pc) {
  const Thread& thread = *machine.thread;
  const size_t begin = address - reinterpret_cast<uintptr_t>(arena.data);
  if (begin >= kArenaBytes) return;
  LaneAccess access{.pc = offset_of(pc),
                    .uid = machine.block->uid,
                    .warp = thread.warp,
                    .nth = 0,
                    .shared = begin < kSharedBytes,
                    .write = (kind & kWrite) != 0,
                    .lane = thread.lane,
                    .size = static_cast<uint32_t>(size),
                    .begin = begin};
  const uint64_t number = (uint64_t{access.uid - machine.first_uid} * kMaxThreads + thread.number);
  // The compiler takes 16 bytes apart into words, each an instruction of its own.
  if (const auto last = last_of_lane.find(number); last != last_of_lane.end()) {
    LaneAccess& before = lane_accesses[last->second];
    const bool goes_on = before.shared == access.shared && before.write == access.write &&
                         before.pc != access.pc && before.begin + before.size == begin &&
                         before.begin / 16 == begin / 16;
    if (goes_on) {
      before.size += access.size;
      return;
    }
  }
  last_of_lane[number] = lane_accesses.size();
  access.nth = executions[(number << 32 | access.pc) * 4 + access.shared * 2 + access.write]++;
  lane_accesses.push_back(access);
}

size_t count_distinct(std::vector<size_t>& numbers) {
  std::ranges::sort(numbers);
  return static_cast<size_t>(std::ranges::unique(numbers).begin() - numbers.begin());
}

// Sectors of global memory that lanes touch.
void add_sectors(std::span<const LaneAccess> lanes, Traffic& sum) {
  std::vector<size_t> sectors, bytes;
  for (const LaneAccess& x : lanes) {
    for (size_t i = x.begin; i < x.begin + x.size; ++i) {
      sectors.push_back(i / 32);
      bytes.push_back(i);
    }
  }
  const size_t count = count_distinct(bytes);
  sum.bytes += count;
  sum.units += count_distinct(sectors);
  sum.least += (count + 31) / 32;
}

// Passes over the banks of shared memory: 32 words of 4 bytes, each in its own bank. Lanes take
// turns where they have more than a word each.
void add_passes(std::span<const LaneAccess> lanes, Traffic& sum) {
  const size_t at_once = lanes[0].size == 16 ? 8 : lanes[0].size == 8 ? 16 : 32;
  for (size_t first = 0; first < kWarpSize; first += at_once) {
    std::vector<size_t> words;
    for (const LaneAccess& x : lanes) {
      if (x.lane < first || x.lane >= first + at_once) continue;
      for (size_t i = x.begin / 4; i < (x.begin + x.size + 3) / 4; ++i) words.push_back(i);
    }
    if (words.empty()) continue;
    words.resize(count_distinct(words));
    size_t banks[32] = {};
    for (const size_t word : words) ++banks[word % 32];
    sum.bytes += 4 * words.size();
    sum.units += *std::ranges::max_element(banks);
    sum.least += (words.size() + 31) / 32;
  }
}

void switch_now() {
  machine.accesses_until_switch = 1 + machine.random.below(2 * machine.switch_interval);
  yield();
}

// `volatile` accesses count as atomics that other threads may wait for.
inline void access(const void* pointer, size_t size, uint8_t kind, const void* pc) {
  settle();
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const Thread* const thread = machine.thread;
  if (!thread) return access_host(address, size, kind, pc);
  if (address - reinterpret_cast<uintptr_t>(thread->stack) < kStackBytes) return;
  if (--machine.accesses_until_switch == 0) switch_now();
  access_watched(address, size, kind, pc);
  if (counts_traffic && !(kind & kAtomic)) note_traffic(address, size, kind, pc);
}
#else
// AddressSanitizer sees the accesses themselves.
void access(const void*, size_t, uint8_t, const void*) {}
#endif

// --- Releases and acquisitions ------------------------------------------------------------------

void join(Knowledge& to, const Knowledge& from) {
  if (from.empty()) return;
  to.resize(machine.num_blocks);
  for (size_t i = 0; i < from.size(); ++i) {
    const Released& news = from[i];
    Released& known = to[i];
    if (news.seq > known.seq) {
      known.warp = known.seq > 0 && known.warp != news.warp ? kAnyWarp : news.warp;
      known.seq = news.seq;
    } else if (news.seq > 0 && known.warp != news.warp) {
      known.warp = kAnyWarp;
    }
    known.barrier = std::max(known.barrier, news.barrier);
  }
}

bool is_global([[maybe_unused]] uintptr_t address) {
#if SIMT_ASAN
  return true;  // it makes no difference to what the sanitizer sees
#else
  return address - reinterpret_cast<uintptr_t>(arena.data) >= kSharedBytes;
#endif
}

uint64_t load(uintptr_t address, size_t size) {
  uint64_t value = 0;
  std::memcpy(&value, reinterpret_cast<const void*>(address), size);
  return value;
}

// What memory holds while a thread makes a load that gets an old value, or makes a store.
struct Unsettled {
  uintptr_t address = 0;  // 0: there is none
  bool write = false;
  uint64_t value = 0;  // what is to be there after a load
};
Unsettled unsettled;

Record record_of_now() {
  return {.uid = machine.block->uid,
          .seq = machine.block->seq,
          .thread = machine.thread->number,
          .bytes = 0,
          .kind = 0,
          .pc = 0};
}

Location& location_at(uintptr_t address, size_t size) {
  Location& location = locations[address];
  const uint64_t value = load(address, size);
  // A plain store came between: the races that it may have are found elsewhere.
  const bool known = !location.versions.empty() && location.size == size &&
                     location.versions.back().value == value;
  if (!known) {
    Shared released = location.versions.empty() ? nullptr : location.versions.back().released;
    location = {.size = size, .versions = {}};
    location.versions.push_back({value, std::move(released), {}, {}});
  }
  return location;
}

void remember(std::vector<Shared>& unacquired, const Shared& released) {
  if (!released) return;
  if (unacquired.empty() || unacquired.back() != released) unacquired.push_back(released);
}

// The store that follows, or that an atomic is about to do, passes on what the thread knows.
Shared released_now(const Location& location) {
  Block& block = *machine.block;
  const Thread& thread = *machine.thread;
  const Shared& before = location.versions.back().released;
  // The fence may stand before the last barrier: then the other threads of the block have one, too.
  if (thread.fence_barriers == 0 || thread.fence_barriers < block.barriers) return before;
  auto released = std::make_shared<Knowledge>(before ? *before : Knowledge());
  join(*released, block.known);
  Knowledge own(machine.num_blocks);
  own[block.number] = {block.barrier_seq, ++block.seq, thread.warp};
  join(*released, own);
  return released;
}

void add_version(Location& location, uint64_t value) {
  const Record writer = record_of_now();  // it comes before what it releases
  location.versions.push_back({value, released_now(location), writer, {}});
  if (location.versions.size() > kVersions) location.versions.erase(location.versions.begin());
}

void note_reader(Version& version) {
  const Record now = record_of_now();
  const auto same = [&](const Record& x) { return x.uid == now.uid && x.thread == now.thread; };
  if (std::ranges::none_of(version.readers, same)) version.readers.push_back(now);
}

}  // namespace

void settle() {
  if (!unsettled.address) return;
  const Unsettled now = unsettled;
  unsettled = {};
  Location& location = locations[now.address];
  if (now.write) {
    add_version(location, load(now.address, location.size));
  } else {
    std::memcpy(reinterpret_cast<void*>(now.address), &now.value, location.size);
  }
}

void fence() {
  settle();
  Block& block = *machine.block;
  Thread& thread = *machine.thread;
  thread.fence_barriers = block.barriers + 1;
  for (const Shared& knowledge : thread.unacquired) join(block.known, *knowledge);
  for (const Shared& knowledge : block.unacquired) join(block.known, *knowledge);
  thread.unacquired.clear();
  block.unacquired.clear();
}

// --- Atomics ------------------------------------------------------------------------------------

uint64_t atomic_begin(const void* address, size_t size) {
  const void* const pc = __builtin_return_address(0);
  if (reinterpret_cast<uintptr_t>(address) % size != 0) {
    fail("an atomic of " + std::to_string(size) + " bytes at the misaligned address " +
             hexadecimal(reinterpret_cast<uintptr_t>(address)),
         {pc});
  }
  if (machine.random.one_in(4)) yield();
  access(address, size, kWrite | kAtomic, pc);
  if (machine.num_blocks > 1 && is_global(reinterpret_cast<uintptr_t>(address))) {
    Version& version = location_at(reinterpret_cast<uintptr_t>(address), size).versions.back();
    note_reader(version);
    remember(machine.thread->unacquired, version.released);
  }
  return load(reinterpret_cast<uintptr_t>(address), size);
}

void atomic_end(void* address, size_t size, uint64_t value) {
  if (std::memcmp(address, &value, size) != 0) made_progress();
  std::memcpy(address, &value, size);
  if (machine.num_blocks > 1 && is_global(reinterpret_cast<uintptr_t>(address))) {
    Location& location = locations[reinterpret_cast<uintptr_t>(address)];
    add_version(location, value);
  }
}

void load_constant(const void* address, size_t size) {
  access(address, size, kConstant, __builtin_return_address(0));
}

// --- Asynchronous copies ------------------------------------------------------------------------

namespace {

void finish(const AsyncCopy& copy) {
#if SIMT_ASAN
  __asan_unpoison_memory_region(copy.target, 16);
#endif
  access(copy.source, 16, kRead, copy.pc);
  access(copy.target, 16, kWrite, copy.pc);
  std::memcpy(copy.target, copy.source, 16);
}

}  // namespace

void copy_async_16(void* shared, const void* global) {
  Thread& thread = *machine.thread;
  const void* const pc = __builtin_return_address(0);
  for (const void* address : {static_cast<const void*>(shared), global}) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
      fail("an asynchronous copy of 16 bytes at the misaligned address " +
               hexadecimal(reinterpret_cast<uintptr_t>(address)),
           {pc});
    }
  }
  // Until it is done, what is there must not be read.
  access(shared, 16, kWrite, pc);
  std::memset(shared, 0xff, 16);
#if SIMT_ASAN
  __asan_poison_memory_region(shared, 16);
#else
  const auto begin = static_cast<size_t>(static_cast<char*>(shared) - arena.data);
  if (begin >= kSharedBytes) fail("an asynchronous copy to global memory", {pc});
  set_bits(arena.written, begin, begin + 16, false);
#endif
  thread.copies.push_back({shared, global, thread.copy_groups, pc});
}

void copy_async_commit() { ++machine.thread->copy_groups; }

void copy_async_wait(int pending) {
  Thread& thread = *machine.thread;
  size_t done = 0;
  for (const AsyncCopy& copy : thread.copies) {
    const bool due = static_cast<int>(thread.copy_groups - copy.group) > pending;
    // Others may be done as well.
    if (!due && !machine.random.one_in(4)) break;
    finish(copy);
    ++done;
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<ptrdiff_t>(done));
}

void finish_copies(Thread& thread) {
  for (const AsyncCopy& copy : thread.copies) finish(copy);
  thread.copies.clear();
}

// --- Shared memory ------------------------------------------------------------------------------

namespace {

// Every byte is 0xff, which makes floats NaN.
char* place_shared(Block& block, size_t size, size_t alignment) {
#if SIMT_ASAN
  (void)block;
  void* memory = nullptr;
  if (posix_memalign(&memory, std::max<size_t>(alignment, 16), size) != 0) std::abort();
  std::memset(memory, 0xff, size);
  return static_cast<char*>(memory);
#else
  // Aligned as asked, and no better.
  const size_t step = std::max<size_t>(alignment, 8);
  size_t begin = (block.shared_used + kGap + 2 * step - 1) / (2 * step) * (2 * step) + step;
  block.shared_used = begin + size;
  begin += block.slot * kSlotBytes;
  set_bits(arena.valid, begin, begin + size, true);
  std::memset(arena.data + begin, 0xff, size);
  return arena.data + begin;
#endif
}

}  // namespace

void begin_block_memory(Block& block, size_t dynamic_bytes) {
  if (dynamic_bytes > 0) block.dynamic = place_shared(block, dynamic_bytes, 16);
}

void end_block_memory(Block& block) {
#if SIMT_ASAN
  for (Thread& thread : block.threads) {
    for (const AsyncCopy& copy : thread.copies) __asan_unpoison_memory_region(copy.target, 16);
  }
  for (const SharedArray& array : block.arrays) std::free(array.data);
  std::free(block.dynamic);
#else
  const size_t begin = block.slot * kSlotBytes;
  set_bits(arena.valid, begin, begin + block.shared_used, false);
  set_bits(arena.written, begin, begin + block.shared_used, false);
#endif
}

void* shared_array(const void* key, const char* name, size_t size, size_t alignment) {
  Block& block = *machine.block;
  for (const SharedArray& array : block.arrays) {
    if (array.key == key) return array.data;
  }
  block.static_bytes += (size + 15) / 16 * 16;
  if (block.static_bytes > kMaxStaticShared ||
      block.static_bytes + machine.launch->shared_bytes > kMaxShared) {
    fail(std::string("shared memory is full: with ") + name + " the block needs " +
         std::to_string(block.static_bytes) + " static and " +
         std::to_string(machine.launch->shared_bytes) + " dynamic bytes");
  }
  block.arrays.push_back({key, name, place_shared(block, size, alignment), size});
  return block.arrays.back().data;
}

void* dynamic_shared() {
  if (!machine.block->dynamic)
    fail("uses dynamic shared memory, of which the launch asked for none");
  return machine.block->dynamic;
}

// --- Global memory ------------------------------------------------------------------------------

void* allocate(size_t bytes) {
#if SIMT_ASAN
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, std::max<size_t>(bytes, 1)) != 0) std::abort();
  char* const data = static_cast<char*>(memory);
#else
  const size_t begin = (next_free + kGap + 255) / 256 * 256;
  if (begin + bytes + kGap > kArenaBytes) throw Error("the simulated device has no more memory");
  next_free = begin + bytes;
  char* const data = arena.data + begin;
  allocations[data] = bytes;
  if (bytes > kSparse) return data;
  set_bits(arena.valid, begin, begin + bytes, true);
#endif
  allocations[data] = bytes;
  std::memset(data, 0xff, bytes);
  return data;
}

void release(void* pointer) {
  const auto it = allocations.find(static_cast<char*>(pointer));
  if (it == allocations.end()) std::abort();
#if SIMT_ASAN
  std::free(pointer);
#else
  const auto begin = static_cast<size_t>(it->first - arena.data);
  if (it->second > kSparse) {
    const auto forget = [&](auto* array, size_t unit) {
      // Whole pages of it: it lies 64 bytes of memory, 512 of what is known of it, from others.
      auto* const from = reinterpret_cast<char*>(array) + begin / unit * sizeof *array;
      const auto page = [](auto* x) {
        return (reinterpret_cast<uintptr_t>(x) + 4095) / 4096 * 4096;
      };
      auto* const to = reinterpret_cast<char*>(array) + (begin + it->second) / unit * sizeof *array;
      madvise(reinterpret_cast<void*>(page(from)), page(to) - page(from), MADV_DONTNEED);
    };
    forget(arena.data, 1);
    forget(arena.shadow, kGranule);
    forget(arena.written, kGranule);
  } else {
    set_bits(arena.valid, begin, begin + it->second, false);
    set_bits(arena.written, begin, begin + it->second, false);
  }
  if (allocations.size() == 1) next_free = kSharedBytes;
#endif
  allocations.erase(it);
}

void mark_written([[maybe_unused]] void* pointer, [[maybe_unused]] size_t bytes) {
#if !SIMT_ASAN
  const auto begin = static_cast<size_t>(static_cast<char*>(pointer) - arena.data);
  set_bits(arena.written, begin, begin + bytes, true);
#endif
}

void zero(void* pointer, size_t bytes) {
  if (bytes == 0) return;
  char* const begin = static_cast<char*>(pointer);
  const auto* const found = allocation_at(begin);
  if (!found || begin + bytes > found->first + found->second)
    throw Error("cudaMemsetAsync leaves the memory it was given");
  std::memset(pointer, 0, bytes);
  mark_written(pointer, bytes);
}

void begin_launch_memory() {
#if !SIMT_ASAN
  lane_accesses.clear();
  executions.clear();
  last_of_lane.clear();
#endif
  locations.clear();
  unsettled = {};
}

#if SIMT_ASAN
void end_launch_memory() {}
void count_traffic(bool) {}
std::vector<Traffic> take_traffic() { return {}; }
#else
namespace {

std::vector<std::string> places_of(const std::vector<uint32_t>& pcs) {
  std::string command = "addr2line -e '" + library().path + "'";
  for (const uint32_t pc : pcs) command += " " + hexadecimal(pc - 1);
  std::vector<std::string> places;
  if (FILE* const pipe = popen(command.c_str(), "r")) {
    char buffer[4096];
    while (std::fgets(buffer, sizeof buffer, pipe)) {
      const std::string line = buffer;
      places.push_back(
          line.substr(line.rfind('/') + 1, line.find_first_of(" \n") - line.rfind('/') - 1));
    }
    pclose(pipe);
  }
  places.resize(pcs.size());
  return places;
}

template <typename Of>
std::vector<std::span<const LaneAccess>> groups_of(std::span<const LaneAccess> all, const Of& of) {
  std::vector<std::span<const LaneAccess>> groups;
  for (size_t begin = 0, end; begin < all.size(); begin = end) {
    for (end = begin + 1; end < all.size() && of(all[end]) == of(all[begin]);) ++end;
    groups.push_back(all.subspan(begin, end - begin));
  }
  return groups;
}

}  // namespace

void end_launch_memory() {
  if (lane_accesses.empty()) return;
  const auto execution = [](const LaneAccess& x) { return x.execution(); };
  std::ranges::stable_sort(lane_accesses, {}, execution);
  const auto instructions =
      groups_of(lane_accesses, [](const LaneAccess& x) { return x.instruction(); });
  std::vector<uint32_t> pcs;
  for (const auto& group : instructions) pcs.push_back(group[0].pc);
  const auto places = places_of(pcs);
  for (size_t i = 0; i < instructions.size(); ++i) {
    const LaneAccess& first = instructions[i][0];
    Traffic sum{name_of_kernel(), places[i], first.shared, first.write, 0, 0, 0};
    for (const auto& lanes : groups_of(instructions[i], execution)) {
      first.shared ? add_passes(lanes, sum) : add_sectors(lanes, sum);
    }
    traffic.push_back(sum);
  }
  lane_accesses.clear();
}

void count_traffic(bool on) {
  counts_traffic = on;
  traffic.clear();
}
std::vector<Traffic> take_traffic() { return std::exchange(traffic, {}); }
#endif

void check_host() {
  if (host_error.empty()) return;
  const std::string error = std::move(host_error);
  host_error.clear();
  throw Error(error);
}

// "kernel at f.cu:12", with what it is inlined into, from the debug information.
std::string describe_code(const void* pc) {
  const std::string command = "addr2line -Cfpi -e '" + library().path + "' " +
                              hexadecimal(offset_of(pc) - 1) + " 2>/dev/null";
  std::string text;
  if (FILE* const pipe = popen(command.c_str(), "r")) {
    char buffer[4096];
    while (std::fgets(buffer, sizeof buffer, pipe))
      text += text.empty() ? buffer : std::string("    ") + buffer;
    pclose(pipe);
  }
  text.resize(std::min(text.find(" (discriminator"), text.find_last_not_of('\n') + 1));
  return text;
}

}  // namespace simt

// --- What the compiler calls --------------------------------------------------------------------

#if !SIMT_ASAN
using simt::access;

#define SIMT_PC __builtin_return_address(0)
#define SIMT_ACCESS(size)                                                                      \
  void __tsan_read##size(void* p) { access(p, size, simt::kRead, SIMT_PC); }                   \
  void __tsan_write##size(void* p) { access(p, size, simt::kWrite, SIMT_PC); }                 \
  void __tsan_volatile_read##size(void* p) { simt::access_volatile(p, size, false, SIMT_PC); } \
  void __tsan_volatile_write##size(void* p) { simt::access_volatile(p, size, true, SIMT_PC); }

namespace simt {
namespace {

bool comes_before(const Version& version) {
  const Block& block = *machine.block;
  const Thread& thread = *machine.thread;
  const auto before = [&](const Record& record) { return comes_before(record, block, thread); };
  return before(version.writer) || std::ranges::any_of(version.readers, before);
}

// The version that a `volatile` load gets.
Version& draw_version(Location& location) {
  auto& versions = location.versions;
  size_t oldest = versions.size() - 1;
  while (oldest > 0 && !comes_before(versions[oldest])) --oldest;
  const auto choices = static_cast<uint32_t>(versions.size() - oldest);
  // Some load gets the last: whoever waits for it goes on.
  const bool last = choices == 1 || machine.random.one_in(2);
  return last ? versions.back() : versions[oldest + machine.random.below(choices)];
}

void access_volatile(void* pointer, size_t size, bool write, const void* pc) {
  if (!machine.thread) return access(pointer, size, write, pc);
  if (machine.random.one_in(4)) yield();
  access(pointer, size, kAtomic | (write ? kWrite : kRead), pc);
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (machine.num_blocks == 1 || !is_global(address)) return;
  Location& location = location_at(address, size);
  if (write) {
    unsettled = {.address = address, .write = true, .value = 0};
    return;
  }
  const uint64_t last = location.versions.back().value;
  Version& version = draw_version(location);
  note_reader(version);
  remember(machine.thread->unacquired, version.released);
  if (version.value == last) return;
  std::memcpy(pointer, &version.value, size);
  unsettled = {.address = address, .write = false, .value = last};
}

// Compiled code holds the place in the source at the front of what it passes.
struct UbsanLocation {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void fail_undefined(const void* data, const std::string& what) {
  const auto& location = *static_cast<const UbsanLocation*>(data);
  const std::string text = what + ", at " + location.file + ":" + std::to_string(location.line);
  if (machine.thread) fail(text);
  std::fprintf(stderr, "simt: the host: %s\n", text.c_str());
  std::abort();
}

}  // namespace
}  // namespace simt

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
void __tsan_read_range(void* p, size_t size) { access(p, size, simt::kRead, SIMT_PC); }
void __tsan_write_range(void* p, size_t size) { access(p, size, simt::kWrite, SIMT_PC); }
void __ubsan_handle_type_mismatch_v1_abort(void* data, uintptr_t pointer) {
  simt::fail_undefined(data, "a misaligned access at " + simt::hexadecimal(pointer));
}
#define SIMT_OVERFLOW(name)                                             \
  void __ubsan_handle_##name##_overflow_abort(void* data, uintptr_t) {  \
    simt::fail_undefined(data, "a signed integer overflows in " #name); \
  }
SIMT_OVERFLOW(add)
SIMT_OVERFLOW(sub)
SIMT_OVERFLOW(mul)
SIMT_OVERFLOW(divrem)
SIMT_OVERFLOW(negate)
void __ubsan_handle_out_of_bounds_abort(void* data, uintptr_t index) {
  simt::fail_undefined(data, "index " + std::to_string(static_cast<int64_t>(index)) +
                                 " is out of the bounds of its array");
}
}
#endif
