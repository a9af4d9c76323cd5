// One KV head of one batch row as the scores see it: positions count from the first real key, so
// that nothing after this knows of padding.
#pragma once

#include "../params.h"
#include "vec.h"

namespace moekv::cpu::MOEKV_ISA {
namespace {

constexpr int kMaxDim = 256;

template <typename T>
struct HeadView {
  const T* keys;     // [length, key_dim]
  const T* values;   // [length, value_dim]
  const T* queries;  // [group, num_queries, key_dim], the last positions
  int64_t length, group, num_queries, key_dim, value_dim;
  int64_t key_stride, value_stride, query_head_stride, query_stride;
  int64_t start;                  // padding positions before the first real key
  float* scores[kNumScoreKinds];  // [length], null where not asked for
  float* mass;                    // [length], the MASS output where there is one

  HeadView(const ExpertScoresParams& p, int64_t row) {
    const int64_t b = row / p.num_kv_heads, h = row % p.num_kv_heads;
    start = p.start ? p.start[b] : 0;
    if (start < 0) start = 0;
    if (start > p.num_keys) start = p.num_keys;
    length = p.num_keys - start;
    group = p.num_query_heads / p.num_kv_heads;
    num_queries = p.num_queries < length ? p.num_queries : length;
    key_dim = p.key_dim;
    value_dim = p.value_dim;
    key_stride = p.key_stride[2];
    value_stride = p.value_stride[2];
    query_head_stride = p.query_stride[1];
    query_stride = p.query_stride[2];
    keys = static_cast<const T*>(p.keys) + b * p.key_stride[0] + h * p.key_stride[1] +
           start * key_stride;
    values = static_cast<const T*>(p.values) + b * p.value_stride[0] + h * p.value_stride[1] +
             start * value_stride;
    queries = static_cast<const T*>(p.queries) + b * p.query_stride[0] +
              h * group * query_head_stride + (p.num_queries - num_queries) * query_stride;
    for (int kind = 0; kind < kNumScoreKinds; ++kind) {
      scores[kind] = p.scores[kind] ? p.scores[kind] + row * p.num_keys + start : nullptr;
    }
    mass = score(ScoreKind::kMass);
  }

  float* score(ScoreKind kind) const { return scores[static_cast<int>(kind)]; }

  // Queries of the group in rows of one position after another: row m is query m / group of head
  // m % group.
  int64_t query_rows() const { return group * num_queries; }
  const T* query_row(int64_t m) const {
    return queries + m % group * query_head_stride + m / group * query_stride;
  }

  // Asks for the keys or values [begin, end), as far as there are any.
  void prefetch_keys(int64_t begin, int64_t end) const {
    prefetch(keys, key_stride, key_dim, begin, end);
  }
  void prefetch_values(int64_t begin, int64_t end) const {
    prefetch(values, value_stride, value_dim, begin, end);
  }

  void score_padding() const {
    for (int kind = 0; kind < kNumScoreKinds; ++kind) {
      const bool is_mass = kind == static_cast<int>(ScoreKind::kMass);
      for (int64_t i = 1; scores[kind] && i <= start; ++i) {
        scores[kind][-i] = is_mass ? 0.0f : -__builtin_inff();
      }
    }
  }

 private:
  void prefetch(const T* rows, int64_t stride, int64_t dim, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end && i < length; ++i) {
      const char* row = reinterpret_cast<const char*>(rows + i * stride);
      for (size_t byte = 0; byte < dim * sizeof(T); byte += 64) {
        __builtin_prefetch(row + byte, 0, 2);  // to L2
      }
    }
  }
};

}  // namespace
}  // namespace moekv::cpu::MOEKV_ISA
