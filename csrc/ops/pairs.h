// Formats of stored pairs, as the ops name them.
#pragma once

#include <string>
#include <utility>

#include "../check.h"

namespace moekv {

// Bits of a key's channel and of a value's; 16: those of the model's dtype.
inline std::pair<int, int> bits_of(const char* op, const std::string& pairs, bool plain) {
  if (plain && pairs == "16") return {16, 16};
  if (pairs == "k8v8") return {8, 8};
  if (pairs == "k8v4") return {8, 4};
  if (pairs == "k4v4") return {4, 4};
  fail(op, "expected pairs to be one of ", plain ? "16, " : "", "k8v8, k8v4, k4v4, got '", pairs,
       "'");
}

inline void check_code_dims(const char* op, int64_t key_dim, int64_t value_dim, int key_bits,
                            int value_bits) {
  for (const auto& [name, dim, bits] :
       {std::tuple{"keys", key_dim, key_bits}, std::tuple{"values", value_dim, value_bits}}) {
    MOEKV_CHECK(dim >= 1 && dim <= kMaxCodeDim, op, "expected head dims of 1 to ", kMaxCodeDim,
                ", got ", dim, " for ", name);
    MOEKV_CHECK(bits == 8 || dim % 2 == 0, op, "expected an even head dim of ", name,
                " in 4 bits, got ", dim);
  }
}

// `rows` is the name of their number, if any will do.
inline void check_matrix(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                         ScalarType type, int64_t num_rows, const char* rows, int64_t columns) {
  const bool fits = tensor.dim() == 2 && (rows || tensor.size(0) == num_rows);
  MOEKV_CHECK(fits && tensor.size(1) == columns, op, "expected ", name, " [",
              rows ? std::string(rows) : std::to_string(num_rows), ", ", columns, "], got ",
              shape(tensor));
  check_dtype(op, name, tensor, type);
  check_device(op, name, tensor, like);
}

}  // namespace moekv
