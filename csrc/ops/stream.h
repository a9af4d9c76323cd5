// The device side of an op: which device is current, and on which stream the kernels run.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../backend.h"
#include "../check.h"

#ifdef MOEKV_CUDA
#define MOEKV_DISPATCH_KEY CUDA
#else
#define MOEKV_DISPATCH_KEY CPU
#endif

namespace moekv::MOEKV_BACKEND {

#ifdef MOEKV_CUDA
// Makes the tensor's device current for the life of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor)
      : guard_(tensor.get_device_index()), device_(tensor.get_device_index()) {}
  Stream stream() const;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::accelerator::DeviceIndex device_;
};
#else
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) {}
  Stream stream() const { return nullptr; }
};
#endif

// A byte tensor beside `like`; at least one byte, so that its pointer is never null.
inline Tensor new_workspace(const char* op, const Tensor& like, size_t bytes) {
  return new_tensor(op, like, {static_cast<int64_t>(bytes) + 1}, ScalarType::Byte);
}

}  // namespace moekv::MOEKV_BACKEND
