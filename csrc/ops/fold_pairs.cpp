#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../backend.h"
#include "../check.h"
#include "stream.h"

namespace moekv::MOEKV_BACKEND {
namespace {

constexpr const char* kOp = "fold_pairs";

std::tuple<Tensor, Tensor, Tensor> fold_pairs_op(const Tensor& queries_in, const Tensor& keys_in,
                                                 const Tensor& values_in, const Tensor& indices_in,
                                                 const Tensor& offsets_in,
                                                 const std::optional<Tensor>& start_in,
                                                 double scaling, double softcap, double gate,
                                                 double least) {
  const DType dtype = float_dtype(kOp, "queries", queries_in);
  check_rank(kOp, "queries", queries_in, 4, "[batch, num_query_heads, num_queries, head_dim]");
  check_rank(kOp, "keys", keys_in, 4, "[batch, num_kv_heads, num_keys, head_dim]");
  check_rank(kOp, "values", values_in, 4, "[batch, num_kv_heads, num_keys, value_dim]");
  const int64_t batch = queries_in.size(0), num_query_heads = queries_in.size(1);
  const int64_t num_queries = queries_in.size(2), key_dim = queries_in.size(3);
  const int64_t num_kv_heads = keys_in.size(1), num_keys = keys_in.size(2);
  const int64_t value_dim = values_in.size(3);
  MOEKV_CHECK(keys_in.size(0) == batch && keys_in.size(3) == key_dim, kOp, "expected keys [", batch,
              ", num_kv_heads, num_keys, ", key_dim, "], got ", shape(keys_in));
  MOEKV_CHECK(values_in.size(0) == batch && values_in.size(1) == num_kv_heads &&
                  values_in.size(2) == num_keys,
              kOp, "expected values [", batch, ", ", num_kv_heads, ", ", num_keys,
              ", value_dim], got ", shape(values_in));
  for (const auto& [name, tensor] :
       {std::pair{"keys", &keys_in}, std::pair{"values", &values_in}}) {
    check_dtype(kOp, name, *tensor, queries_in.scalar_type());
    check_device(kOp, name, *tensor, queries_in);
  }
  MOEKV_CHECK(num_kv_heads >= 1 && num_query_heads >= 1 && num_query_heads % num_kv_heads == 0, kOp,
              "expected num_query_heads to be a multiple of num_kv_heads = ", num_kv_heads,
              ", got ", num_query_heads);
  MOEKV_CHECK(key_dim >= 1 && key_dim <= kMaxHeadDim && value_dim >= 1 && value_dim <= kMaxHeadDim,
              kOp, "expected head dims of 1 to ", kMaxHeadDim, ", got ", key_dim, " for keys and ",
              value_dim, " for values");
  const int64_t asked = num_query_heads / num_kv_heads * num_queries;
  MOEKV_CHECK(asked >= 1 && asked <= kMaxFoldQueries, kOp, "expected 1 to ", kMaxFoldQueries,
              " queries of each KV head, got ", asked);
  check_positions(kOp, num_keys);
  check_logits(kOp, scaling, softcap);
  MOEKV_CHECK(gate >= 0 && gate <= 1, kOp, "expected a gate between 0 and 1, got ", gate);
  MOEKV_CHECK(least >= 0 && least <= 1, kOp, "expected least between 0 and 1, got ", least);
  check_rank(kOp, "indices", indices_in, 1, "[num_kept]");
  const int64_t num_kept = indices_in.size(0);
  const Tensor indices =
      dense_vector(kOp, "indices", indices_in, ScalarType::Int, num_kept, queries_in);
  const Tensor offsets = dense_vector(kOp, "offsets", offsets_in, ScalarType::Int,
                                      batch * num_kv_heads + 1, queries_in);
  const std::optional<Tensor> start =
      dense_vector(kOp, "start", start_in, ScalarType::Int, batch, queries_in);

  const DeviceScope scope(queries_in);
  const Tensor queries = with_dense_rows(kOp, queries_in), keys = with_dense_rows(kOp, keys_in);
  const Tensor values = with_dense_rows(kOp, values_in);
  Tensor folded = new_tensor(kOp, values, {num_kept, value_dim}, values.scalar_type());
  Tensor bias = new_tensor(kOp, values, {num_kept}, ScalarType::Half);
  Tensor joined = new_tensor(kOp, values, {batch, num_kv_heads, num_keys}, ScalarType::Int);
  FoldPairsParams params{
      .queries = queries.const_data_ptr(),
      .keys = keys.const_data_ptr(),
      .values = values.const_data_ptr(),
      .indices = static_cast<const int32_t*>(indices.const_data_ptr()),
      .offsets = static_cast<const int32_t*>(offsets.const_data_ptr()),
      .start = data<int32_t>(start),
      .folded = folded.mutable_data_ptr(),
      .bias = static_cast<uint16_t*>(bias.mutable_data_ptr()),
      .joined = static_cast<int32_t*>(joined.mutable_data_ptr()),
      .workspace = nullptr,
      .batch = batch,
      .num_kv_heads = num_kv_heads,
      .num_query_heads = num_query_heads,
      .num_queries = num_queries,
      .num_keys = num_keys,
      .num_kept = num_kept,
      .key_dim = key_dim,
      .value_dim = value_dim,
      .query_stride = {queries.stride(0), queries.stride(1), queries.stride(2)},
      .key_stride = {keys.stride(0), keys.stride(1), keys.stride(2)},
      .value_stride = {values.stride(0), values.stride(1), values.stride(2)},
      .scaling = static_cast<float>(scaling),
      .softcap = static_cast<float>(softcap),
      .gate = static_cast<float>(gate),
      .least = static_cast<float>(least),
      .dtype = dtype,
  };
  check_kept(params);
  if (joined.numel() == 0) return {folded, bias, joined};
  const Tensor workspace = new_workspace(kOp, keys, fold_pairs_workspace_bytes(params));
  params.workspace = workspace.mutable_data_ptr();
  fold_pairs(params, scope.stream());
  return {folded, bias, joined};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moekv, MOEKV_DISPATCH_KEY, m) {
  m.impl("fold_pairs", TORCH_BOX(&fold_pairs_op));
}

}  // namespace moekv::MOEKV_BACKEND
