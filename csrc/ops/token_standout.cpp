#include <torch/csrc/stable/library.h>

#include "../backend.h"
#include "../check.h"
#include "stream.h"

namespace moekv::MOEKV_BACKEND {
namespace {

constexpr const char* kOp = "token_standout";

Tensor token_standout_op(const Tensor& hidden_states_in, const std::optional<Tensor>& mask_in) {
  check_rank(kOp, "hidden_states", hidden_states_in, 3, "[batch, num_tokens, hidden_size]");
  const DType dtype = float_dtype(kOp, "hidden_states", hidden_states_in);
  const int64_t batch = hidden_states_in.size(0), num_tokens = hidden_states_in.size(1);
  if (mask_in) {
    MOEKV_CHECK(mask_in->dim() == 2 && mask_in->size(0) == batch && mask_in->size(1) == num_tokens,
                kOp, "expected mask [", batch, ", ", num_tokens, "], got ", shape(*mask_in));
    check_dtype(kOp, "mask", *mask_in, ScalarType::Bool);
    check_device(kOp, "mask", *mask_in, hidden_states_in);
  }

  const DeviceScope scope(hidden_states_in);
  const Tensor hidden_states = with_dense_rows(hidden_states_in);
  std::optional<Tensor> mask;
  if (mask_in) mask = torch::stable::contiguous(*mask_in);
  Tensor standout = torch::stable::new_empty(hidden_states, {batch, num_tokens}, ScalarType::Float);
  if (standout.numel() == 0) return standout;

  TokenStandoutParams params{
      .hidden_states = hidden_states.const_data_ptr(),
      .mask = data<bool>(mask),
      .standout = static_cast<float*>(standout.mutable_data_ptr()),
      .workspace = nullptr,
      .batch = batch,
      .num_tokens = num_tokens,
      .num_channels = hidden_states.size(2),
      .stride = {hidden_states.stride(0), hidden_states.stride(1)},
      .dtype = dtype,
  };
  const Tensor workspace = new_workspace(hidden_states, token_standout_workspace_bytes(params));
  params.workspace = workspace.mutable_data_ptr();
  token_standout(params, scope.stream());
  return standout;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moekv, MOEKV_DISPATCH_KEY, m) {
  m.impl("token_standout", TORCH_BOX(&token_standout_op));
}

}  // namespace moekv::MOEKV_BACKEND
