#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../backend.h"
#include "../check.h"
#include "pairs.h"
#include "stream.h"

namespace moekv::MOEKV_BACKEND {
namespace {

constexpr const char* kOp = "quantize_pairs";

std::tuple<Tensor, Tensor, Tensor> quantize_pairs_op(const Tensor& keys_in, const Tensor& values_in,
                                                     const std::string& pairs) {
  const DType dtype = float_dtype(kOp, "keys", keys_in);
  check_rank(kOp, "keys", keys_in, 2, "[num_pairs, head_dim]");
  MOEKV_CHECK(values_in.dim() == 2 && values_in.size(0) == keys_in.size(0), kOp,
              "expected values [", keys_in.size(0), ", value_dim], got ", shape(values_in));
  check_dtype(kOp, "values", values_in, keys_in.scalar_type());
  check_device(kOp, "values", values_in, keys_in);
  const auto [key_bits, value_bits] = bits_of(kOp, pairs, false);
  const int64_t key_dim = keys_in.size(1), value_dim = values_in.size(1);
  check_code_dims(kOp, key_dim, value_dim, key_bits, value_bits);

  const DeviceScope scope(keys_in);
  const Tensor keys = with_dense_rows(kOp, keys_in), values = with_dense_rows(kOp, values_in);
  const int64_t num_pairs = keys.size(0);
  Tensor key_codes =
      new_tensor(kOp, keys, {num_pairs, code_bytes(key_dim, key_bits)}, ScalarType::Byte);
  Tensor value_codes =
      new_tensor(kOp, keys, {num_pairs, code_bytes(value_dim, value_bits)}, ScalarType::Byte);
  Tensor scales = new_tensor(
      kOp, keys, {num_pairs, code_scales(key_dim, key_bits) + code_scales(value_dim, value_bits)},
      ScalarType::Half);
  if (num_pairs == 0) return {key_codes, value_codes, scales};

  QuantizePairsParams params{};
  params.keys = keys.const_data_ptr();
  params.values = values.const_data_ptr();
  params.key_codes = static_cast<uint8_t*>(key_codes.mutable_data_ptr());
  params.value_codes = static_cast<uint8_t*>(value_codes.mutable_data_ptr());
  params.scales = static_cast<uint16_t*>(scales.mutable_data_ptr());
  params.num_pairs = num_pairs;
  params.key_dim = key_dim;
  params.value_dim = value_dim;
  params.key_stride = keys.stride(0);
  params.value_stride = values.stride(0);
  params.key_bits = key_bits;
  params.value_bits = value_bits;
  params.dtype = dtype;
  quantize_pairs(params, scope.stream());
  return {key_codes, value_codes, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moekv, MOEKV_DISPATCH_KEY, m) {
  m.impl("quantize_pairs", TORCH_BOX(&quantize_pairs_op));
}

}  // namespace moekv::MOEKV_BACKEND
