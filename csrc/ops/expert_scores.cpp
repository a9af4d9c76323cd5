#include <torch/csrc/stable/library.h>

#include <vector>

#include "../backend.h"
#include "../check.h"
#include "stream.h"

namespace moekv::MOEKV_BACKEND {
namespace {

constexpr const char* kOp = "expert_scores";

void copy_strides(const Tensor& tensor, int64_t (&strides)[3]) {
  for (int i = 0; i < 3; ++i) strides[i] = tensor.stride(i);
}

Tensor expert_scores_op(const Tensor& keys_in, const Tensor& values_in, const Tensor& queries_in,
                        const std::optional<Tensor>& start_in, std::vector<int64_t> kinds,
                        double scaling, double softcap, int64_t pool, int64_t lag) {
  check_rank(kOp, "keys", keys_in, 4, "[batch, num_kv_heads, num_keys, head_dim]");
  check_rank(kOp, "values", values_in, 4, "[batch, num_kv_heads, num_keys, value_dim]");
  check_rank(kOp, "queries", queries_in, 4, "[batch, num_query_heads, num_queries, head_dim]");
  const DType dtype = float_dtype(kOp, "keys", keys_in);
  const int64_t batch = keys_in.size(0), num_kv_heads = keys_in.size(1);
  const int64_t num_keys = keys_in.size(2), key_dim = keys_in.size(3);
  const int64_t num_query_heads = queries_in.size(1), num_queries = queries_in.size(2);
  const int64_t value_dim = values_in.size(3);
  check_dtype(kOp, "values", values_in, keys_in.scalar_type());
  check_dtype(kOp, "queries", queries_in, keys_in.scalar_type());
  check_device(kOp, "values", values_in, keys_in);
  check_device(kOp, "queries", queries_in, keys_in);
  MOEKV_CHECK(values_in.size(0) == batch && values_in.size(1) == num_kv_heads &&
                  values_in.size(2) == num_keys,
              kOp, "expected values [", batch, ", ", num_kv_heads, ", ", num_keys,
              ", value_dim], got ", shape(values_in));
  MOEKV_CHECK(queries_in.size(0) == batch && queries_in.size(3) == key_dim, kOp,
              "expected queries [", batch, ", num_query_heads, num_queries, ", key_dim, "], got ",
              shape(queries_in));
  MOEKV_CHECK(num_kv_heads >= 1 && num_query_heads % num_kv_heads == 0, kOp,
              "expected num_query_heads to be a multiple of num_kv_heads = ", num_kv_heads,
              ", got ", num_query_heads);
  MOEKV_CHECK(key_dim >= 1 && key_dim <= kMaxHeadDim && value_dim >= 1 && value_dim <= kMaxHeadDim,
              kOp, "expected head dims of 1 to ", kMaxHeadDim, ", got ", key_dim, " for keys and ",
              value_dim, " for values");
  MOEKV_CHECK(num_queries <= num_keys, kOp, "expected queries of at most num_keys = ", num_keys,
              " positions, got ", num_queries);
  check_positions(kOp, num_keys);
  const std::optional<Tensor> start =
      dense_vector(kOp, "start", start_in, ScalarType::Int, batch, keys_in);
  check_logits(kOp, scaling, softcap);
  MOEKV_CHECK(pool >= 1 && pool % 2 == 1, kOp, "expected an odd pool >= 1, got ", pool);
  MOEKV_CHECK(lag >= 1, kOp, "expected lag >= 1, got ", lag);

  const DeviceScope scope(keys_in);
  const Tensor keys = with_dense_rows(kOp, keys_in), values = with_dense_rows(kOp, values_in);
  const Tensor queries = with_dense_rows(kOp, queries_in);
  const int64_t num_kinds = static_cast<int64_t>(kinds.size());
  Tensor scores =
      new_tensor(kOp, keys, {num_kinds, batch, num_kv_heads, num_keys}, ScalarType::Float);
  ExpertScoresParams params{
      .keys = keys.const_data_ptr(),
      .values = values.const_data_ptr(),
      .queries = queries.const_data_ptr(),
      .start = data<int32_t>(start),
      .scores = {},
      .workspace = nullptr,
      .batch = batch,
      .num_kv_heads = num_kv_heads,
      .num_query_heads = num_query_heads,
      .num_keys = num_keys,
      .num_queries = num_queries,
      .key_dim = key_dim,
      .value_dim = value_dim,
      .key_stride = {},
      .value_stride = {},
      .query_stride = {},
      .pool = pool,
      .lag = lag,
      .scaling = static_cast<float>(scaling),
      .softcap = static_cast<float>(softcap),
      .dtype = dtype,
  };
  copy_strides(keys, params.key_stride);
  copy_strides(values, params.value_stride);
  copy_strides(queries, params.query_stride);
  const int64_t slice = batch * num_kv_heads * num_keys;
  for (int64_t i = 0; i < num_kinds; ++i) {
    MOEKV_CHECK(kinds[i] >= 0 && kinds[i] < kNumScoreKinds, kOp, "expected kinds of 0 to ",
                kNumScoreKinds - 1, ", got ", kinds[i]);
    float*& out = params.scores[kinds[i]];
    MOEKV_CHECK(!out, kOp, "expected distinct kinds, got ", kinds[i], " twice");
    out = static_cast<float*>(scores.mutable_data_ptr()) + i * slice;
  }
  const bool attention = params.scores[static_cast<int>(ScoreKind::kMass)] ||
                         params.scores[static_cast<int>(ScoreKind::kAttention)];
  MOEKV_CHECK(!attention || (num_query_heads >= 1 && (num_queries >= 1 || num_keys == 0)), kOp,
              "expected at least one query for MASS and ATTENTION, got ", shape(queries_in));
  if (num_kinds * slice == 0) return scores;

  const Tensor workspace = new_workspace(kOp, keys, expert_scores_workspace_bytes(params));
  params.workspace = workspace.mutable_data_ptr();
  expert_scores(params, scope.stream());
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moekv, MOEKV_DISPATCH_KEY, m) {
  m.impl("expert_scores", TORCH_BOX(&expert_scores_op));
}

}  // namespace moekv::MOEKV_BACKEND
