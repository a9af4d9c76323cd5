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

#include "machine.h"

namespace simt {
namespace {

enum Kind : uint8_t { kRead = 0, kWrite = 1, kAtomic = 2, kConstant = 4 };  // bits

#if !SIMT_ASAN
constexpr size_t kGranule = 8;
constexpr size_t kRecords = 4;

struct Record {
  uint32_t uid;  // of the block; 0: no record
  uint32_t seq;
  uint16_t thread;
  uint8_t bytes;  // of the granule
  uint8_t kind;
  uint32_t pc;  // from the beginning of this library
};
struct alignas(64) Shadow {
  Record records[kRecords];
};

// [shared memory of the resident blocks | global memory]
constexpr size_t kSlotBytes = 256 << 10;
constexpr size_t kSharedBytes = kMaxResident * kSlotBytes;
constexpr size_t kArenaBytes = size_t{1} << 30;
constexpr size_t kGap = 64;  // between two pieces of memory

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
// By address of the atomic: what its last writers have released.
std::unordered_map<uintptr_t, Knowledge> locations;

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
    if (bytes & ~arena.valid[granule]) {
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

void switch_now() {
  machine.accesses_until_switch = 1 + machine.random.below(2 * machine.switch_interval);
  yield();
}

// `volatile` accesses count as atomics that other threads may wait for.
inline void access(const void* pointer, size_t size, uint8_t kind, const void* pc) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const Thread* const thread = machine.thread;
  if (!thread) return access_host(address, size, kind, pc);
  if (address - reinterpret_cast<uintptr_t>(thread->stack) < kStackBytes) return;
  if (--machine.accesses_until_switch == 0) switch_now();
  access_watched(address, size, kind, pc);
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

// A strong access of global memory, `write` if it may pass on what the thread knows.
void communicate(const void* address, bool write) {
  Block& block = *machine.block;
  Thread& thread = *machine.thread;
  if (machine.num_blocks == 1) return;
  Knowledge& location = locations[reinterpret_cast<uintptr_t>(address)];
  if (thread.unacquired.empty() || thread.unacquired.back() != &location) {
    thread.unacquired.push_back(&location);
  }
  // The fence may stand before the last barrier: then the other threads of the block have one, too.
  if (!write || thread.fence_barriers == 0 || thread.fence_barriers < block.barriers) return;
  join(location, block.known);
  Knowledge own(machine.num_blocks);
  own[block.number] = {block.barrier_seq, ++block.seq, thread.warp};
  join(location, own);
}

}  // namespace

void fence() {
  Block& block = *machine.block;
  Thread& thread = *machine.thread;
  thread.fence_barriers = block.barriers + 1;
  for (const auto* knowledge : thread.unacquired) join(block.known, *knowledge);
  for (const auto* knowledge : block.unacquired) join(block.known, *knowledge);
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
  communicate(address, true);
  uint64_t value = 0;
  std::memcpy(&value, address, size);
  return value;
}

void atomic_end(void* address, size_t size, uint64_t value) {
  if (std::memcmp(address, &value, size) != 0) made_progress();
  std::memcpy(address, &value, size);
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
  set_bits(arena.valid, begin, begin + bytes, true);
  char* const data = arena.data + begin;
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
  set_bits(arena.valid, begin, begin + it->second, false);
  set_bits(arena.written, begin, begin + it->second, false);
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
  auto it = allocations.upper_bound(begin);
  const bool inside = it != allocations.begin() && (--it, begin + bytes <= it->first + it->second);
  if (!inside) throw Error("cudaMemsetAsync leaves the memory it was given");
  std::memset(pointer, 0, bytes);
  mark_written(pointer, bytes);
}

void begin_launch_memory() { locations.clear(); }

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

void access_volatile(void* pointer, size_t size, bool write, const void* pc) {
  if (!machine.thread) return access(pointer, size, write, pc);
  if (machine.random.one_in(4)) yield();
  access(pointer, size, kAtomic | (write ? kWrite : kRead), pc);
  communicate(pointer, write);
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
void __ubsan_handle_out_of_bounds_abort(void* data, uintptr_t index) {
  simt::fail_undefined(data, "index " + std::to_string(static_cast<int64_t>(index)) +
                                 " is out of the bounds of its array");
}
}
#endif
