// Validation and conversion at the edge between torch and the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "params.h"

namespace moekv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(std::string_view op, const Parts&... parts) {
  std::ostringstream message;
  message << "moekv::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// MOEKV_CHECK(condition, "op", "expected ..., got ", x)
#define MOEKV_CHECK(condition, op, ...) \
  do {                                  \
    if (!(condition)) [[unlikely]] {    \
      ::moekv::fail(op, __VA_ARGS__);   \
    }                                   \
  } while (false)

// "[4, 8, 16]"
inline std::string shape(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// `dims` is the shape as the documentation writes it.
inline void check_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank,
                       const char* dims) {
  MOEKV_CHECK(tensor.dim() == rank, op, "expected ", name, " ", dims, ", got ", shape(tensor));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType type) {
  MOEKV_CHECK(tensor.scalar_type() == type, op, "expected ", name, " of dtype ", dtype_name(type),
              ", got ", dtype_name(tensor.scalar_type()));
}

inline void check_device(const char* op, const char* name, const Tensor& tensor,
                         const Tensor& like) {
  MOEKV_CHECK(
      tensor.get_device_index() == like.get_device_index() && tensor.is_cpu() == like.is_cpu(), op,
      "expected ", name, " on the device of the first argument");
}

inline DType float_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(op, "expected ", name, " of dtype float32, float16 or bfloat16, got ",
           dtype_name(tensor.scalar_type()));
  }
}

// A dense vector of `size` elements on the device of `like`.
inline void check_vector(const char* op, const char* name, const Tensor& tensor, ScalarType type,
                         int64_t size, const Tensor& like) {
  MOEKV_CHECK(tensor.dim() == 1 && tensor.size(0) == size, op, "expected ", name, " [", size,
              "], got ", shape(tensor));
  check_dtype(op, name, tensor, type);
  check_device(op, name, tensor, like);
  MOEKV_CHECK(tensor.is_contiguous(), op, "expected a contiguous ", name);
}

// What makes logits of products: softcap * tanh(scaling * product / softcap), 0: no softcap.
inline void check_logits(const char* op, double scaling, double softcap) {
  MOEKV_CHECK(std::isfinite(scaling) && scaling > 0, op, "expected scaling > 0, got ", scaling);
  MOEKV_CHECK(std::isfinite(softcap) && softcap >= 0, op, "expected softcap >= 0, got ", softcap);
}

// The tensor itself if its last dimension is dense, else a contiguous copy.
inline Tensor with_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool dense = last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return dense ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace moekv
