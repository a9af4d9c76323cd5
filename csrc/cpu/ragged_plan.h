// How ragged_attention divides its keys: every head's stored rows and tail are cut into segments of
// one length, which depends on the shapes alone, so that results do not depend on the number of
// threads.
#pragma once

#include "../params.h"

namespace moekv::cpu {
namespace {

struct RaggedPlan {
  int64_t rows;         // heads: batch * num_kv_heads
  int64_t row_queries;  // queries of a head's group: (num_query_heads / num_kv_heads) * num_queries
  int64_t segment;      // keys per segment
  int64_t num_items;    // segments of all rows
};

inline int64_t ragged_row_keys(const RaggedAttentionParams& p, int64_t row) {
  return p.end[row] - p.begin[row] + p.num_tail;
}

inline int64_t ragged_row_items(const RaggedAttentionParams& p, int64_t segment, int64_t row) {
  return (ragged_row_keys(p, row) + segment - 1) / segment;
}

inline RaggedPlan ragged_plan(const RaggedAttentionParams& p) {
  RaggedPlan plan{};
  plan.rows = p.batch * p.num_kv_heads;
  plan.row_queries = p.num_query_heads / p.num_kv_heads * p.num_queries;
  int64_t total = 0;
  for (int64_t row = 0; row < plan.rows; ++row) total += ragged_row_keys(p, row);
  // Enough segments to share out evenly among many threads, few enough that the partial results of
  // many queries stay small.
  int64_t wanted = 2048 / plan.row_queries;
  wanted = wanted < 32 ? 32 : wanted > 256 ? 256 : wanted;
  plan.segment = (total + wanted - 1) / wanted;
  if (plan.segment < 256) plan.segment = 256;
  for (int64_t row = 0; row < plan.rows; ++row) {
    plan.num_items += ragged_row_items(p, plan.segment, row);
  }
  return plan;
}

inline int64_t whole_groups(int64_t dim) {
  return (dim + kCodeGroup - 1) / kCodeGroup * kCodeGroup;
}

// The workspace: first item of each row [rows + 1] int64, the scaled queries [B, Hq, Q, D] fp32,
// for quantised rows once more in whole groups of channels, then per item and query the largest
// score, the sum of weights and the weighted values [Dv, or whole groups] so far.
inline int64_t ragged_partial_floats(const RaggedAttentionParams& p) {
  return (p.key_bits == 16 ? p.value_dim : whole_groups(p.value_dim)) + 2;
}
inline int64_t ragged_query_floats(const RaggedAttentionParams& p) {
  return p.batch * p.num_query_heads * p.num_queries * p.key_dim;
}
inline int64_t ragged_coded_dim(const RaggedAttentionParams& p) {
  return p.key_bits == 16 ? 0 : whole_groups(p.key_dim);
}
inline int64_t ragged_coded_query_floats(const RaggedAttentionParams& p) {
  return p.batch * p.num_query_heads * p.num_queries * ragged_coded_dim(p);
}

}  // namespace
}  // namespace moekv::cpu
