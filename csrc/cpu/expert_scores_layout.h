// How expert_scores divides its work and its workspace. Both depend on the shapes alone, so that
// results do not depend on the number of threads.
#pragma once

#include <cstddef>

#include "../params.h"

namespace moekv::cpu {
namespace {

// Keys per unit of work, counted from the first real key of a row: a left-padded row is computed as
// it would be alone. K and V of a unit stay in L2, where every kind after the first finds them.
constexpr int64_t kChunkKeys = 384;

// Rows of queries are padded to whole panels of every instruction set, head dims to whole vectors.
constexpr int64_t kQueryMultiple = 32, kDimMultiple = 32;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct ExpertScoresLayout {
  int64_t rows;     // batch * num_kv_heads
  int64_t chunks;   // of the longest row
  int64_t queries;  // of a KV head's group, padded
  int64_t dim;      // key_dim, padded
  // Offsets in bytes.
  size_t packed;  // [rows, queries, dim] packed queries, up to kPackedBytes per element
  size_t peak;    // [rows, chunks, queries] fp32: largest logit of the chunk, then of the row
  size_t total;   // [rows, chunks, queries] fp32: sum of exp(logit - peak)
  size_t shift;   // [rows, queries] fp32: log2 of a query's share, over the softmax's denominator
  size_t anchor;  // [rows, chunks, dim] fp32: sum of normalised keys
  size_t mass;    // [rows, num_keys] fp32: column sums, where MASS is not an output
  size_t spread;  // [rows, num_keys] fp32: LAG's spread of the values
  size_t bytes;
};

constexpr int64_t kPackedBytes = 6;  // three bf16 stand for one fp32

inline ExpertScoresLayout expert_scores_layout(const ExpertScoresParams& p) {
  const auto asked = [&](ScoreKind kind) { return p.scores[static_cast<int>(kind)] != nullptr; };
  const bool attention = asked(ScoreKind::kMass) || asked(ScoreKind::kAttention);
  ExpertScoresLayout layout{};
  layout.rows = p.batch * p.num_kv_heads;
  layout.chunks = (p.num_keys + kChunkKeys - 1) / kChunkKeys;
  layout.queries = round_up(p.num_query_heads / p.num_kv_heads * p.num_queries, kQueryMultiple);
  layout.dim = round_up(p.key_dim, kDimMultiple);
  const auto take = [&](bool needed, int64_t elements, int64_t element_bytes) {
    const size_t offset = layout.bytes;
    if (needed) layout.bytes += static_cast<size_t>(round_up(elements * element_bytes, 64));
    return offset;
  };
  const int64_t rows = layout.rows, partials = rows * layout.chunks;
  layout.packed = take(attention, rows * layout.queries * layout.dim, kPackedBytes);
  layout.peak = take(attention, partials * layout.queries, 4);
  layout.total = take(attention, partials * layout.queries, 4);
  layout.shift = take(attention, rows * layout.queries, 4);
  layout.anchor = take(asked(ScoreKind::kDiversity), partials * layout.dim, 4);
  layout.mass = take(attention && !asked(ScoreKind::kMass), rows * p.num_keys, 4);
  layout.spread = take(asked(ScoreKind::kLag), rows * p.num_keys, 4);
  return layout;
}

}  // namespace
}  // namespace moekv::cpu
