#include <torch/csrc/stable/library.h>

#include "../backend.h"
#include "../check.h"
#include "stream.h"

namespace moekv::MOEKV_BACKEND {
namespace {

constexpr const char* kOp = "expected_attention";

Tensor expected_attention_op(const Tensor& queries_in, const Tensor& keys_in,
                             const std::optional<Tensor>& start_in,
                             const std::optional<Tensor>& cos_in,
                             const std::optional<Tensor>& sin_in, double scaling, double softcap) {
  check_rank(kOp, "queries", queries_in, 4, "[batch, num_query_heads, num_keys, head_dim]");
  check_rank(kOp, "keys", keys_in, 4, "[batch, num_kv_heads, num_keys, head_dim]");
  const DType dtype = float_dtype(kOp, "queries", queries_in);
  const int64_t batch = queries_in.size(0), num_query_heads = queries_in.size(1);
  const int64_t num_keys = queries_in.size(2), head_dim = queries_in.size(3);
  const int64_t num_kv_heads = keys_in.size(1);
  MOEKV_CHECK(
      keys_in.size(0) == batch && keys_in.size(2) == num_keys && keys_in.size(3) == head_dim, kOp,
      "expected keys [", batch, ", num_kv_heads, ", num_keys, ", ", head_dim, "], got ",
      shape(keys_in));
  check_dtype(kOp, "keys", keys_in, queries_in.scalar_type());
  check_device(kOp, "keys", keys_in, queries_in);
  MOEKV_CHECK(num_kv_heads >= 1 && num_query_heads >= 1 && num_query_heads % num_kv_heads == 0, kOp,
              "expected num_query_heads to be a multiple of num_kv_heads = ", num_kv_heads,
              ", got ", num_query_heads);
  MOEKV_CHECK(head_dim >= 1 && head_dim <= kMaxHeadDim, kOp, "expected a head dim of 1 to ",
              kMaxHeadDim, ", got ", head_dim);
  check_positions(kOp, num_keys);
  const std::optional<Tensor> start =
      dense_vector(kOp, "start", start_in, ScalarType::Int, batch, queries_in);
  check_logits(kOp, scaling, softcap);
  MOEKV_CHECK(cos_in.has_value() == sin_in.has_value(), kOp,
              "expected cos and sin or neither, got ", cos_in ? "cos" : "sin", " alone");
  const std::optional<Tensor> cos =
      dense_turn(kOp, "cos", cos_in, batch, num_keys, head_dim, queries_in);
  const std::optional<Tensor> sin =
      dense_turn(kOp, "sin", sin_in, batch, num_keys, head_dim, queries_in);
  MOEKV_CHECK(!cos || (cos->size(0) == sin->size(0) && cos->size(2) == sin->size(2)), kOp,
              "expected cos and sin of one shape, got ", shape(*cos), " and ", shape(*sin));

  const DeviceScope scope(queries_in);
  const Tensor queries = with_dense_rows(kOp, queries_in), keys = with_dense_rows(kOp, keys_in);
  Tensor scores = new_tensor(kOp, keys, {batch, num_kv_heads, num_keys}, ScalarType::Float);
  if (scores.numel() == 0) return scores;
  ExpectedAttentionParams params{
      .queries = queries.const_data_ptr(),
      .keys = keys.const_data_ptr(),
      .start = data<int32_t>(start),
      .scores = static_cast<float*>(scores.mutable_data_ptr()),
      .workspace = nullptr,
      .batch = batch,
      .num_kv_heads = num_kv_heads,
      .num_query_heads = num_query_heads,
      .num_keys = num_keys,
      .head_dim = head_dim,
      .query_stride = {queries.stride(0), queries.stride(1), queries.stride(2)},
      .key_stride = {keys.stride(0), keys.stride(1), keys.stride(2)},
      .scaling = static_cast<float>(scaling),
      .softcap = static_cast<float>(softcap),
      .dtype = dtype,
      .cos = data<float>(cos),
      .sin = data<float>(sin),
      .turn_stride = cos && cos->size(0) > 1 ? cos->stride(0) : 0,
      .turned = cos ? cos->size(2) : 0,
  };
  const Tensor workspace = new_workspace(kOp, keys, expected_attention_workspace_bytes(params));
  params.workspace = workspace.mutable_data_ptr();
  expected_attention(params, scope.stream());
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moekv, MOEKV_DISPATCH_KEY, m) {
  m.impl("expected_attention", TORCH_BOX(&expected_attention_op));
}

}  // namespace moekv::MOEKV_BACKEND
