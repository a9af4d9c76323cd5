#include <torch/csrc/stable/library.h>

#include "../backend.h"
#include "../check.h"
#include "pairs.h"
#include "stream.h"

namespace moekv::MOEKV_BACKEND {
namespace {

constexpr const char* kOp = "ragged_attention";
// Of stored rows and tail together: kernels count them in 32 bits, and step beyond the last.
constexpr int64_t kMaxRows = INT32_MAX - 65535;

// The stored rows [num_stored, dim] or the tail [B, H, S, dim] must match the query in all but dim.
void check_dtype_and_device(const char* name, const Tensor& tensor, const Tensor& query) {
  check_dtype(kOp, name, tensor, query.scalar_type());
  check_device(kOp, name, tensor, query);
}

void copy_strides(const Tensor& tensor, int64_t* strides, int64_t count) {
  for (int64_t i = 0; i < count; ++i) strides[i] = tensor.stride(i);
}

// Stored rows: those of the query's dtype, or codes with their scales.
void check_stored(const Tensor& query, const Tensor& keys, const Tensor& values,
                  const std::optional<Tensor>& scales, int key_bits, int value_bits) {
  const int64_t key_dim = query.size(3), num_stored = keys.size(0);
  if (key_bits == 16) {
    MOEKV_CHECK(!scales, kOp, "expected scales only with quantised pairs");
    check_dtype_and_device("keys", keys, query);
    check_dtype_and_device("values", values, query);
    MOEKV_CHECK(keys.size(1) == key_dim, kOp, "expected keys [num_stored, ", key_dim, "], got ",
                shape(keys));
    MOEKV_CHECK(values.size(0) == num_stored, kOp, "expected values [", num_stored,
                ", value_dim], got ", shape(values));
    return;
  }
  const int64_t value_dim = values.size(1) * 8 / value_bits;
  check_code_dims(kOp, key_dim, value_dim, key_bits, value_bits);
  check_matrix(kOp, "keys", keys, query, ScalarType::Byte, num_stored, "num_stored",
               code_bytes(key_dim, key_bits));
  check_matrix(kOp, "values", values, query, ScalarType::Byte, num_stored, nullptr,
               code_bytes(value_dim, value_bits));
  MOEKV_CHECK(scales, kOp, "expected scales with quantised pairs, got none");
  check_matrix(kOp, "scales", *scales, query, ScalarType::Half, num_stored, nullptr,
               code_scales(key_dim, key_bits) + code_scales(value_dim, value_bits));
}

Tensor ragged_attention_op(const Tensor& query_in, const Tensor& keys_in, const Tensor& values_in,
                           const Tensor& begin_in, const Tensor& end_in,
                           const std::optional<Tensor>& tail_keys_in,
                           const std::optional<Tensor>& tail_values_in,
                           const std::optional<Tensor>& mask,
                           const std::optional<Tensor>& scales_in,
                           const std::optional<Tensor>& bias_in,
                           const std::optional<Tensor>& sinks_in, double scaling, double softcap,
                           const std::string& pairs) {
  const DType dtype = float_dtype(kOp, "query", query_in);
  check_rank(kOp, "query", query_in, 4, "[batch, num_query_heads, num_queries, head_dim]");
  check_rank(kOp, "keys", keys_in, 2, "[num_stored, head_dim]");
  check_rank(kOp, "values", values_in, 2, "[num_stored, value_dim]");
  check_rank(kOp, "begin", begin_in, 2, "[batch, num_kv_heads]");
  const int64_t batch = query_in.size(0), num_query_heads = query_in.size(1);
  const int64_t num_queries = query_in.size(2), key_dim = query_in.size(3);
  const int64_t num_kv_heads = begin_in.size(1);
  const auto [key_bits, value_bits] = bits_of(kOp, pairs, true);
  const int64_t value_dim = values_in.size(1) * (value_bits == 4 ? 2 : 1);
  check_stored(query_in, keys_in, values_in, scales_in, key_bits, value_bits);
  const int64_t num_tail = tail_keys_in && tail_keys_in->dim() == 4 ? tail_keys_in->size(2) : 0;
  MOEKV_CHECK(keys_in.size(0) <= kMaxRows - num_tail, kOp, "expected at most ", kMaxRows,
              " stored rows and tail positions, got ", keys_in.size(0), " and ", num_tail);
  check_logits(kOp, scaling, softcap);
  MOEKV_CHECK(begin_in.size(0) == batch && num_kv_heads >= 1 && num_query_heads % num_kv_heads == 0,
              kOp, "expected begin [", batch, ", num_kv_heads], num_kv_heads dividing ",
              num_query_heads, ", got ", shape(begin_in));
  MOEKV_CHECK(end_in.dim() == 2 && end_in.size(0) == batch && end_in.size(1) == num_kv_heads, kOp,
              "expected end like begin ", shape(begin_in), ", got ", shape(end_in));
  for (const auto& [name, tensor] : {std::pair{"begin", &begin_in}, std::pair{"end", &end_in}}) {
    check_dtype(kOp, name, *tensor, ScalarType::Int);
    check_device(kOp, name, *tensor, query_in);
  }
  MOEKV_CHECK(tail_keys_in.has_value() == tail_values_in.has_value(), kOp,
              "expected tail_keys and tail_values together, got one of them");
  MOEKV_CHECK(!mask || tail_keys_in, kOp, "expected mask only with a tail");

  const DeviceScope scope(query_in);
  const Tensor query = with_dense_rows(kOp, query_in), keys = with_dense_rows(kOp, keys_in);
  const Tensor values = with_dense_rows(kOp, values_in);
  std::optional<Tensor> scales;
  if (scales_in) scales = with_dense_rows(kOp, *scales_in);
  const std::optional<Tensor> bias =
      dense_vector(kOp, "bias", bias_in, ScalarType::Half, keys.size(0), query);
  const std::optional<Tensor> sinks =
      dense_vector(kOp, "sinks", sinks_in, ScalarType::Float, num_query_heads, query);
  const Tensor begin = contiguous(kOp, begin_in);
  const Tensor end = contiguous(kOp, end_in);
  Tensor output =
      new_tensor(kOp, query, {batch, num_queries, num_query_heads, value_dim}, query.scalar_type());

  RaggedAttentionParams params{};
  params.query = query.const_data_ptr();
  params.keys = keys.const_data_ptr();
  params.values = values.const_data_ptr();
  params.begin = static_cast<const int32_t*>(begin.const_data_ptr());
  params.end = static_cast<const int32_t*>(end.const_data_ptr());
  params.output = output.mutable_data_ptr();
  params.batch = batch;
  params.num_kv_heads = num_kv_heads;
  params.num_query_heads = num_query_heads;
  params.num_queries = num_queries;
  params.key_dim = key_dim;
  params.value_dim = value_dim;
  params.num_stored = keys.size(0);
  copy_strides(query, params.query_stride, 3);
  params.key_stride = keys.stride(0);
  params.value_stride = values.stride(0);
  params.scaling = static_cast<float>(scaling);
  params.softcap = static_cast<float>(softcap);
  params.key_bits = key_bits;
  params.value_bits = value_bits;
  if (scales) {
    params.scales = static_cast<const uint16_t*>(scales->const_data_ptr());
    params.scale_stride = scales->stride(0);
  }
  params.bias = data<uint16_t>(bias);
  params.sinks = data<float>(sinks);
  params.dtype = dtype;

  std::optional<Tensor> tail_keys, tail_values;
  if (tail_keys_in) {
    check_rank(kOp, "tail_keys", *tail_keys_in, 4, "[batch, num_kv_heads, num_tail, head_dim]");
    for (const auto& [name, tensor, dim] :
         {std::tuple{"tail_keys", &*tail_keys_in, key_dim},
          std::tuple{"tail_values", &*tail_values_in, value_dim}}) {
      MOEKV_CHECK(tensor->dim() == 4 && tensor->size(0) == batch &&
                      tensor->size(1) == num_kv_heads && tensor->size(2) == num_tail &&
                      tensor->size(3) == dim,
                  kOp, "expected ", name, " [", batch, ", ", num_kv_heads, ", ", num_tail, ", ",
                  dim, "], got ", shape(*tensor));
      check_dtype_and_device(name, *tensor, query);
    }
    MOEKV_CHECK(num_tail >= num_queries, kOp, "expected a tail of at least the ", num_queries,
                " queries themselves, got ", num_tail, " positions");
    tail_keys = with_dense_rows(kOp, *tail_keys_in);
    tail_values = with_dense_rows(kOp, *tail_values_in);
    params.tail_keys = tail_keys->const_data_ptr();
    params.tail_values = tail_values->const_data_ptr();
    params.num_tail = num_tail;
    copy_strides(*tail_keys, params.tail_key_stride, 3);
    copy_strides(*tail_values, params.tail_value_stride, 3);
  }
  if (mask) {
    check_rank(kOp, "mask", *mask, 4, "[batch, num_query_heads, num_queries, num_tail]");
    check_dtype(kOp, "mask", *mask, ScalarType::Bool);
    check_device(kOp, "mask", *mask, query);
    const int64_t expected[4] = {batch, num_query_heads, num_queries, params.num_tail};
    for (int64_t i = 0; i < 4; ++i) {
      MOEKV_CHECK(mask->size(i) == expected[i] || mask->size(i) == 1, kOp,
                  "expected mask broadcastable to [", batch, ", ", num_query_heads, ", ",
                  num_queries, ", ", params.num_tail, "], got ", shape(*mask));
      params.mask_stride[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
    }
    params.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  if (batch * num_queries * num_query_heads * value_dim == 0) return output;

  check_row_ranges(params);
  const Tensor workspace = new_workspace(kOp, query, ragged_attention_workspace_bytes(params));
  params.workspace = workspace.mutable_data_ptr();
  ragged_attention(params, scope.stream());
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moekv, MOEKV_DISPATCH_KEY, m) {
  m.impl("ragged_attention", TORCH_BOX(&ragged_attention_op));
}

}  // namespace moekv::MOEKV_BACKEND
