#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>

#include "../backend.h"
#include "../check.h"
#include "stream.h"

namespace moekv::MOEKV_BACKEND {
namespace {

constexpr const char* kOp = "kv_compact_";

// The bytes from the first to the last element.
struct Extent {
  const char* begin;
  const char* end;

  bool overlaps(const Extent& other) const { return begin < other.end && other.begin < end; }
};

Extent extent_of(const Tensor& tensor) {
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  if (tensor.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

// A tensor that is moved within itself must not hold an element twice, as expanded ones do.
void check_movable(const char* name, const Tensor& tensor, bool packed) {
  if (packed) {
    MOEKV_CHECK(tensor.is_contiguous(), kOp, "expected contiguous ", name, " with packed=True");
    return;
  }
  MOEKV_CHECK(tensor.size(3) <= 1 || tensor.stride(3) == 1, kOp, "expected ", name,
              " with a dense last dimension, got stride ", tensor.stride(3));
  if (tensor.numel() == 0) return;
  std::array<int64_t, 3> dims{0, 1, 2};
  std::sort(dims.begin(), dims.end(),
            [&](int64_t a, int64_t b) { return tensor.stride(a) < tensor.stride(b); });
  int64_t extent = tensor.size(3);
  for (const int64_t dim : dims) {
    if (tensor.size(dim) == 1) continue;
    MOEKV_CHECK(tensor.stride(dim) >= extent, kOp, "expected ", name,
                " whose elements do not overlap, got stride ", tensor.stride(dim), " in dimension ",
                dim);
    extent = (tensor.size(dim) - 1) * tensor.stride(dim) + extent;
  }
}

void copy_byte_strides(const Tensor& tensor, int64_t (&strides)[3]) {
  const auto element = static_cast<int64_t>(tensor.element_size());
  for (int64_t i = 0; i < 3; ++i) strides[i] = tensor.stride(i) * element;
}

void kv_compact_op(const Tensor& keys, const Tensor& values, const Tensor& indices_in,
                   const std::optional<Tensor>& offsets_in, bool packed) {
  check_rank(kOp, "keys", keys, 4, "[batch, num_kv_heads, num_keys, head_dim]");
  check_rank(kOp, "values", values, 4, "[batch, num_kv_heads, num_keys, value_dim]");
  float_dtype(kOp, "keys", keys);
  check_dtype(kOp, "values", values, keys.scalar_type());
  const int64_t batch = keys.size(0), num_kv_heads = keys.size(1), num_keys = keys.size(2);
  const int64_t rows = batch * num_kv_heads;
  MOEKV_CHECK(
      values.size(0) == batch && values.size(1) == num_kv_heads && values.size(2) == num_keys, kOp,
      "expected values [", batch, ", ", num_kv_heads, ", ", num_keys, ", value_dim], got ",
      shape(values));
  check_positions(kOp, num_keys);
  check_device(kOp, "values", values, keys);
  check_movable("keys", keys, packed);
  check_movable("values", values, packed);
  const Extent key_extent = extent_of(keys), value_extent = extent_of(values);
  MOEKV_CHECK(!key_extent.overlaps(value_extent), kOp,
              "expected keys and values in separate memory, got overlapping ranges");

  check_dtype(kOp, "indices", indices_in, ScalarType::Int);
  check_device(kOp, "indices", indices_in, keys);
  MOEKV_CHECK(indices_in.numel() <= INT32_MAX, kOp, "expected at most 2^31 - 1 indices, got ",
              indices_in.numel());
  if (offsets_in) {
    check_rank(kOp, "indices", indices_in, 1, "[num_indices] where there are offsets");
  } else {
    MOEKV_CHECK(
        indices_in.dim() == 3 && indices_in.size(0) == batch && indices_in.size(1) == num_kv_heads,
        kOp, "expected indices [", batch, ", ", num_kv_heads,
        ", num_kept] where there are no offsets, ", "got ", shape(indices_in));
  }
  const std::optional<Tensor> offsets =
      dense_vector(kOp, "offsets", offsets_in, ScalarType::Int, rows + 1, keys);
  const Tensor indices = contiguous(kOp, indices_in);
  // What says where pairs go must not change while they move.
  const auto check_apart = [&](const char* name, const Tensor& tensor) {
    const Extent extent = extent_of(tensor);
    MOEKV_CHECK(!extent.overlaps(key_extent) && !extent.overlaps(value_extent), kOp, "expected ",
                name, " in memory apart from keys and values, got overlapping ranges");
  };
  check_apart("indices", indices);
  if (offsets) check_apart("offsets", *offsets);

  const DeviceScope scope(keys);
  KvCompactParams params{};
  params.keys = keys.mutable_data_ptr();
  params.values = values.mutable_data_ptr();
  params.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  params.offsets = data<int32_t>(offsets);
  params.batch = batch;
  params.num_kv_heads = num_kv_heads;
  params.num_keys = num_keys;
  params.num_kept = offsets ? 0 : indices.size(2);
  params.num_indices = indices.numel();
  params.key_bytes = keys.size(3) * static_cast<int64_t>(keys.element_size());
  params.value_bytes = values.size(3) * static_cast<int64_t>(values.element_size());
  copy_byte_strides(keys, params.key_stride);
  copy_byte_strides(values, params.value_stride);
  params.packed = packed;
  check_indices(params);
  if (params.num_indices == 0) return;

  const Tensor workspace = new_workspace(kOp, keys, kv_compact_workspace_bytes(params));
  params.workspace = workspace.mutable_data_ptr();
  kv_compact(params, scope.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moekv, MOEKV_DISPATCH_KEY, m) {
  m.impl("kv_compact_", TORCH_BOX(&kv_compact_op));
}

}  // namespace moekv::MOEKV_BACKEND
