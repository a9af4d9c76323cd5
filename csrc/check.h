// Validation and conversion at the edge between torch and the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

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
inline std::string shape(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}
inline std::string shape(const Tensor& tensor) {
  std::vector<int64_t> sizes(tensor.dim());
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = tensor.size(static_cast<int64_t>(i));
  return shape(sizes);
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
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
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

// Kernels count positions in 32 bits.
inline void check_positions(const char* op, int64_t num_keys) {
  MOEKV_CHECK(num_keys <= INT32_MAX, op, "expected at most 2^31 - 1 positions, got ", num_keys);
}

// Factors, their inverses and their quotients are normal numbers of fp32 within these bounds.
constexpr double kLeastFactor = 1e-18, kMostFactor = 1e18;

inline void check_factor(const char* op, const char* name, double factor) {
  MOEKV_CHECK(factor >= kLeastFactor && factor <= kMostFactor, op, "expected ", name,
              " between 1e-18 and 1e18, got ", factor);
}

// What makes logits of products: softcap * tanh(scaling * product / softcap), 0: no softcap.
inline void check_logits(const char* op, double scaling, double softcap) {
  check_factor(op, "scaling", scaling);
  if (softcap != 0) check_factor(op, "a softcap of 0 or", softcap);
}

// What torch says of memory that is not there does not come through its stable ABI.
inline Tensor new_tensor(const char* op, const Tensor& like, const std::vector<int64_t>& sizes,
                         ScalarType type) {
  try {
    return torch::stable::new_empty(like, sizes, type);
  } catch (const std::exception&) {
    fail(op, "expected memory for ", dtype_name(type), " ", shape(sizes), ", got none");
  }
}

inline Tensor contiguous(const char* op, const Tensor& tensor) {
  try {
    return torch::stable::contiguous(tensor);
  } catch (const std::exception&) {
    fail(op, "expected memory for a dense copy of ", dtype_name(tensor.scalar_type()), " ",
         shape(tensor), ", got none");
  }
}

// The tensor itself if its last dimension is dense, else a contiguous copy.
inline Tensor with_dense_rows(const char* op, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool dense = last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return dense ? tensor : contiguous(op, tensor);
}

// A vector of `size` elements on the device of `like`, dense.
inline Tensor dense_vector(const char* op, const char* name, const Tensor& tensor, ScalarType type,
                           int64_t size, const Tensor& like) {
  MOEKV_CHECK(tensor.dim() == 1 && tensor.size(0) == size, op, "expected ", name, " [", size,
              "], got ", shape(tensor));
  check_dtype(op, name, tensor, type);
  check_device(op, name, tensor, like);
  return contiguous(op, tensor);
}

inline std::optional<Tensor> dense_vector(const char* op, const char* name,
                                          const std::optional<Tensor>& tensor, ScalarType type,
                                          int64_t size, const Tensor& like) {
  if (!tensor) return tensor;
  return dense_vector(op, name, *tensor, type, size, like);
}

// A rotation of `count` tokens, [batch or 1, count, channels], fp32.
inline std::optional<Tensor> dense_turn(const char* op, const char* name,
                                        const std::optional<Tensor>& tensor, int64_t batch,
                                        int64_t count, int64_t most, const Tensor& like) {
  if (!tensor) return tensor;
  const bool fits = tensor->dim() == 3 && (tensor->size(0) == 1 || tensor->size(0) == batch) &&
                    tensor->size(1) == count && tensor->size(2) % 2 == 0 && tensor->size(2) <= most;
  MOEKV_CHECK(fits, op, "expected ", name, " [", batch, " or 1, ", count,
              ", an even number of up to ", most, " channels], got ", shape(*tensor));
  check_dtype(op, name, *tensor, ScalarType::Float);
  check_device(op, name, *tensor, like);
  return contiguous(op, *tensor);
}

template <typename T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace moekv
