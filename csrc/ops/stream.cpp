// The stream on which torch's current work runs. Compiled for CUDA alone.
#include "stream.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace moekv::MOEKV_BACKEND {

Stream DeviceScope::stream() const {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
  return stream;
}

}  // namespace moekv::MOEKV_BACKEND
