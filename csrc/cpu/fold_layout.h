// How fold_pairs divides its work and its workspace, by shapes alone.
#pragma once

#include "expert_scores_layout.h"

namespace moekv::cpu {
namespace {

struct FoldLayout {
  int64_t rows;     // batch * num_kv_heads
  int64_t chunks;   // of the longest row
  int64_t queries;  // of a KV head's group, padded
  // Offsets in bytes.
  size_t packed;    // [rows, queries, dim] packed queries, up to kPackedBytes per element
  size_t peak;      // [rows, chunks, queries] fp32: largest logit of the chunk, then of the row
  size_t total;     // [rows, chunks, queries] fp32: sum of exp(logit - peak)
  size_t shift;     // [rows, queries] fp32: minus log2 of a query's denominator
  size_t patterns;  // [rows, num_keys, queries] bf16: a key's shares, as a vector of length 1
  size_t looks;     // [rows, num_keys] fp32: the mean of a key's shares
  size_t weights;   // [rows, num_keys] fp32, of the evicted keys
  size_t kept;      // packed patterns of the kept keys, panels of each row
  size_t sums;      // [num_kept, value_dim] fp32
  size_t totals;    // [num_kept] fp32
  size_t bytes;

  // Where the packed patterns of a row begin, whose first kept key is `first` of all.
  size_t kept_of(int64_t row, int64_t first) const {
    const int64_t panels = first / kQueryMultiple + row;  // no more than those before it need
    return kept + static_cast<size_t>(panels * kQueryMultiple * queries * kPackedBytes);
  }
};

inline FoldLayout fold_layout(const FoldPairsParams& p) {
  FoldLayout layout{};
  layout.rows = p.batch * p.num_kv_heads;
  layout.chunks = (p.num_keys + kChunkKeys - 1) / kChunkKeys;
  layout.queries = round_up(p.num_query_heads / p.num_kv_heads * p.num_queries, kQueryMultiple);
  const auto take = [&](int64_t elements, int64_t element_bytes) {
    const size_t offset = layout.bytes;
    layout.bytes += static_cast<size_t>(round_up(elements * element_bytes, 64));
    return offset;
  };
  const int64_t rows = layout.rows, partials = rows * layout.chunks;
  const int64_t kept = (p.num_kept / kQueryMultiple + rows) * kQueryMultiple;
  layout.packed = take(rows * layout.queries * round_up(p.key_dim, kDimMultiple), kPackedBytes);
  layout.peak = take(partials * layout.queries, 4);
  layout.total = take(partials * layout.queries, 4);
  layout.shift = take(rows * layout.queries, 4);
  layout.patterns = take(rows * p.num_keys * layout.queries, 2);
  layout.looks = take(rows * p.num_keys, 4);
  layout.weights = take(rows * p.num_keys, 4);
  layout.kept = take(kept * layout.queries, kPackedBytes);
  layout.sums = take(p.num_kept * p.value_dim, 4);
  layout.totals = take(p.num_kept, 4);
  return layout;
}

}  // namespace
}  // namespace moekv::cpu
