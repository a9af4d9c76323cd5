// What select_kept remembers of the rows of a group while it works on it, and how it divides them
// among threads.
#pragma once

#include "../params.h"
#include "parallel.h"

namespace moekv::cpu {
namespace {

constexpr int kSelectBins = 2048;
constexpr int64_t kSelectChunk = 16384;  // positions that are counted together

// Up to kSelectChunk positions of a row, of those that the scores decide.
struct SelectChunk {
  int64_t above, equal;  // scores above the row's threshold, and at it
  int64_t first_index;   // where its kept positions go
  int64_t ties;          // how many at the threshold are kept
  int32_t histogram[kSelectBins];
};

struct SelectRow {
  int64_t padding;     // positions kept of those before `start`
  int64_t start;       // first real position
  int64_t low, high;   // real positions outside [low, high) are kept in any case
  int64_t floor;       // of [low, high), how many are kept before rows compete
  int64_t floor_left;  // of these, how many were not yet seen above the threshold
  int64_t ties;        // how many scores at the threshold are kept
  int32_t threshold;
};

struct SelectPlan {
  int64_t chunks_per_row;
  int64_t slots;  // groups that are worked on at once, each on one thread; 1: one after another
  int64_t slot_bytes;
};

inline SelectPlan select_plan(const SelectKeptParams& p) {
  SelectPlan plan{};
  plan.chunks_per_row = (p.num_keys + kSelectChunk - 1) / kSelectChunk;
  const int64_t group_chunks = p.rows * plan.chunks_per_row;
  const int64_t threads = num_threads();
  plan.slots = p.groups < threads ? p.groups : threads;
  // Few groups that threads can share better than they can share out the groups.
  if (p.groups < threads && group_chunks > p.groups) plan.slots = 1;
  plan.slot_bytes = p.rows * sizeof(SelectRow) + group_chunks * sizeof(SelectChunk);
  return plan;
}

}  // namespace
}  // namespace moekv::cpu
