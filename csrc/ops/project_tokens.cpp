#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../backend.h"
#include "../check.h"
#include "stream.h"

namespace moekv::MOEKV_BACKEND {
namespace {

constexpr const char* kOp = "project_tokens";

std::tuple<Tensor, Tensor> project_tokens_op(const Tensor& hidden_states_in,
                                             const Tensor& weight_in,
                                             const std::optional<Tensor>& mask_in) {
  check_rank(kOp, "hidden_states", hidden_states_in, 3, "[batch, num_tokens, hidden_size]");
  const DType dtype = float_dtype(kOp, "hidden_states", hidden_states_in);
  const int64_t batch = hidden_states_in.size(0), num_tokens = hidden_states_in.size(1);
  const int64_t hidden_size = hidden_states_in.size(2);
  check_rank(kOp, "weight", weight_in, 2, "[num_projections, hidden_size]");
  MOEKV_CHECK(weight_in.size(1) == hidden_size, kOp, "expected weight [num_projections, ",
              hidden_size, "], got ", shape(weight_in));
  check_dtype(kOp, "weight", weight_in, hidden_states_in.scalar_type());
  check_device(kOp, "weight", weight_in, hidden_states_in);
  const int64_t num_projections = weight_in.size(0);
  if (mask_in) {
    MOEKV_CHECK(mask_in->dim() == 2 && mask_in->size(0) == batch && mask_in->size(1) == num_tokens,
                kOp, "expected mask [", batch, ", ", num_tokens, "], got ", shape(*mask_in));
    check_dtype(kOp, "mask", *mask_in, ScalarType::Bool);
    check_device(kOp, "mask", *mask_in, hidden_states_in);
  }

  const DeviceScope scope(hidden_states_in);
  const Tensor hidden_states = with_dense_rows(kOp, hidden_states_in);
  const Tensor weight = with_dense_rows(kOp, weight_in);
  Tensor projected =
      new_tensor(kOp, hidden_states, {batch, num_tokens, num_projections}, ScalarType::Float);
  std::optional<Tensor> mask;
  if (mask_in) mask = contiguous(kOp, *mask_in);
  Tensor standout = new_tensor(kOp, hidden_states, {batch, num_tokens}, ScalarType::Float);
  if (standout.numel() == 0) return {projected, standout};

  ProjectTokensParams params{
      .hidden_states = hidden_states.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .mask = data<bool>(mask),
      .projected = static_cast<float*>(projected.mutable_data_ptr()),
      .standout = static_cast<float*>(standout.mutable_data_ptr()),
      .workspace = nullptr,
      .batch = batch,
      .num_tokens = num_tokens,
      .num_channels = hidden_size,
      .num_projections = num_projections,
      .stride = {hidden_states.stride(0), hidden_states.stride(1)},
      .weight_stride = weight.stride(0),
      .dtype = dtype,
  };
  const Tensor workspace =
      new_workspace(kOp, hidden_states, project_tokens_workspace_bytes(params));
  params.workspace = workspace.mutable_data_ptr();
  project_tokens(params, scope.stream());
  return {projected, standout};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moekv, MOEKV_DISPATCH_KEY, m) {
  m.impl("project_tokens", TORCH_BOX(&project_tokens_op));
}

}  // namespace moekv::MOEKV_BACKEND
