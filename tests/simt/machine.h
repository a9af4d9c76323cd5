// What the parts of the simulator share: machine.cpp runs threads and lets them meet, memory.cpp
// places memory and watches accesses to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "simt.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

namespace simt {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = SIMT_ASAN ? 256 << 10 : 64 << 10;
constexpr size_t kStacksPerMapping = 256;
constexpr unsigned kMaxResident = 128;          // blocks at once, see set_schedule
constexpr size_t kMaxShared = 99 * 1024;        // the least that a supported GPU gives a block
constexpr size_t kMaxStaticShared = 48 * 1024;  // the compiler's limit

// xoshiro-like quality is not needed: a fast generator that a seed fixes.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull) {}
  uint32_t next() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state_ >> 33);
  }
  uint32_t below(uint32_t bound) { return next() % bound; }
  bool one_in(uint32_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

// What other blocks may know of a block: all that its threads did before `barrier`, and what the
// threads of `warp` did before `seq`.
struct Released {
  uint32_t barrier = 0, seq = 0;
  uint32_t warp = 0;
};
constexpr uint32_t kAnyWarp = ~0u;
using Knowledge = std::vector<Released>;  // by block number; empty: nothing
using Shared = std::shared_ptr<const Knowledge>;

struct AsyncCopy {
  void* target;
  const void* source;
  unsigned group;
  const void* pc;
};

enum class State : uint8_t { kReady, kBarrier, kCollective, kDone };

struct Thread {
  Index index;
  uint16_t number, lane;
  uint32_t warp;
  State state;
  // Where it waits.
  Offer offer;
  Site site;
  uint32_t result;
  // The memory model: fences, and atomics whose releases await an acquiring fence.
  uint32_t fence_barriers;  // barriers passed at the last fence, plus one; 0: no fence yet
  std::vector<Shared> unacquired;
  std::vector<AsyncCopy> copies;
  unsigned copy_groups;
  // The fiber.
  char* stack;
  void* stack_pointer;
  void* fake_stack;
};

struct SharedArray {
  const void* key;
  const char* name;
  char* data;
  size_t size;
};

// Lanes that wait for the rest of their mask.
struct Meeting {
  Collective kind;
  uint32_t mask, arrived;
  Site site;  // of the first to arrive
};

struct Warp {
  uint32_t lanes = 0, exited = 0, in_barrier = 0;
  std::vector<Meeting> meetings;
  // clock[i][j]: lane i knows what lane j did before.
  uint32_t clock[kWarpSize][kWarpSize] = {};
};

struct Block {
  Index index;
  uint32_t number;  // in the launch
  uint32_t uid;     // over all launches
  unsigned slot;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<uint16_t> ready;
  // The barrier that threads wait in.
  unsigned arrived = 0, done = 0;
  Barrier barrier_kind;
  int barrier_value;
  Site barrier_site;
  uint16_t first_arrived;
  uint32_t barriers = 0;  // passed
  // A counter of events that order accesses, and its value at the last barrier.
  uint32_t seq = 1, barrier_seq = 0;
  Knowledge known;
  std::vector<Shared> unacquired;
  // Shared memory.
  std::vector<SharedArray> arrays;
  char* dynamic = nullptr;
  size_t shared_used = 0, static_bytes = 0;
};

struct Machine {
  const Launch* launch = nullptr;
  Random random{0};
  Block* block = nullptr;
  Thread* thread = nullptr;  // null: the host runs
  uint32_t first_uid = 1, next_uid = 1;
  uint32_t num_blocks = 0;
  uint32_t accesses_until_switch = 0, switch_interval = 0;
  uint64_t steps = 0, steps_at_progress = 0;
  std::string error;
  std::vector<const void*> error_pcs;
};
extern Machine machine;

// Ends the launch with an error that names kernel, block and thread. `pcs`: code that it tells of.
[[noreturn]] void fail(const std::string& what, std::vector<const void*> pcs = {});
std::string name_of_kernel();
std::string name_of(const Index& index);
std::string name_of(const Thread& thread);
const char* name_of(Collective kind);
std::string name_of(Site site);
std::string name_of_thread(uint32_t number);
std::string name_of_block(uint32_t number);
std::string hexadecimal(uint64_t value);

void yield();
inline void made_progress() { machine.steps_at_progress = machine.steps; }

// memory.cpp, called by machine.cpp
void begin_block_memory(Block& block, size_t dynamic_bytes);
void end_block_memory(Block& block);
void begin_launch_memory();
void end_launch_memory();
void finish_copies(Thread& thread);
void settle();  // before anything else sees memory: a load that got an old value has been made
// Throws if no GPU takes such a launch.
void check_size(const char* kernel, const dim3& grid, const dim3& block, size_t shared_bytes);
void check_host();  // throws what the launcher has done wrong since the last call
std::string describe_code(const void* pc);

// memory.cpp, for the tests' bindings
void* allocate(size_t bytes);
void release(void* pointer);
void mark_written(void* pointer, size_t bytes);

// How well accesses of warps fit the units in which memory moves: of global memory sectors of 32
// bytes, of shared memory passes over its 32 banks.
struct Traffic {
  std::string kernel, place;  // the line in the source
  bool shared, write;
  uint64_t bytes, units, least;  // least: units if all bytes lay side by side
};
void count_traffic(bool on);
std::vector<Traffic> take_traffic();  // since it was switched on or last taken

// Launches are scheduled as `seed` draws, with 1 to `residents` blocks at once, on this stream;
// with 0 they are checked and not executed.
void set_schedule(uint64_t seed, unsigned residents, void* stream);
void seed_bug(int number);  // 0: none

}  // namespace simt
