// Checks of what index tensors hold. They come before anything is written.
#include <stdexcept>
#include <string>

#include "../backend.h"

namespace moekv::cpu {
namespace {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string message = "moekv::";
  const auto append = [&](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      message += std::to_string(part);
    } else {
      message += part;
    }
  };
  (append(parts), ...);
  throw std::runtime_error(message);
}

// Kept positions of rows: offsets from 0 on, indices that ascend in each row. `num_each`: of every
// row, where there are no offsets.
void check_rows_of_indices(const char* op, const int32_t* indices, const int32_t* offsets,
                           int64_t rows, int64_t num_each, int64_t num_indices, int64_t num_keys) {
  for (int64_t row = 0; row < rows; ++row) {
    int64_t begin = row * num_each, end = begin + num_each;
    if (offsets) {
      begin = offsets[row];
      end = offsets[row + 1];
      if (begin > end || end > num_indices || (row == 0 && begin != 0)) {
        fail(op, ": expected offsets ascending from 0 to ", num_indices, ", got ", begin, " and ",
             end, " for row ", row);
      }
    }
    // Ascending: then the first and the last bound the others.
    bool ascending = true;
    for (int64_t i = begin + 1; i < end; ++i) ascending &= indices[i - 1] < indices[i];
    if (begin < end && (!ascending || indices[begin] < 0 || indices[end - 1] >= num_keys)) {
      int64_t bad = begin;
      int32_t previous = -1;
      while (indices[bad] > previous && indices[bad] < num_keys) previous = indices[bad++];
      fail(op, ": expected indices ascending in each row, between 0 and ", num_keys - 1, ", got ",
           indices[bad], bad > begin ? " after " + std::to_string(previous) : "", " in row ", row);
    }
  }
  if (offsets && offsets[rows] != num_indices) {
    fail(op, ": expected offsets to end at the ", num_indices, " indices, got ", offsets[rows]);
  }
}

}  // namespace

void check_experts(const MixScoresParams& p) {
  const int64_t heads = p.expert_stride[1] == 0 ? 1 : p.num_kv_heads;
  const bool dense = p.expert_stride[2] == p.k;
  const int64_t run = dense ? p.num_keys * p.k : p.k;  // ids without a gap
  const int64_t num_runs = dense ? 1 : p.num_keys;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < num_runs; ++i) {
        const int32_t* experts =
            p.experts + b * p.expert_stride[0] + h * p.expert_stride[1] + i * p.expert_stride[2];
        // Without an early end, so that the loop is vectorised.
        bool known = true;
        for (int64_t j = 0; j < run; ++j) {
          known &= static_cast<uint32_t>(experts[j]) < static_cast<uint32_t>(p.num_experts);
        }
        for (int64_t j = 0; !known && j < run; ++j) {
          if (experts[j] < 0 || experts[j] >= p.num_experts) {
            fail("mix_scores: expected experts between 0 and ", p.num_experts - 1, ", got ",
                 experts[j], " at position ", dense ? j / p.k : i);
          }
        }
      }
    }
  }
}

void check_indices(const KvCompactParams& p) {
  check_rows_of_indices("kv_compact_", p.indices, p.offsets, p.batch * p.num_kv_heads, p.num_kept,
                        p.num_indices, p.num_keys);
}

void check_kept(const FoldPairsParams& p) {
  check_rows_of_indices("fold_pairs", p.indices, p.offsets, p.batch * p.num_kv_heads, 0, p.num_kept,
                        p.num_keys);
}

void check_row_ranges(const RaggedAttentionParams& p) {
  for (int64_t row = 0; row < p.batch * p.num_kv_heads; ++row) {
    if (p.begin[row] < 0 || p.end[row] < p.begin[row] || p.end[row] > p.num_stored) {
      fail("ragged_attention: expected 0 <= begin <= end <= ", p.num_stored,
           " stored rows, got begin ", p.begin[row], " and end ", p.end[row], " for row ", row);
    }
  }
}

}  // namespace moekv::cpu
