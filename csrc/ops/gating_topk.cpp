#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../backend.h"
#include "../check.h"
#include "stream.h"

namespace moekv::MOEKV_BACKEND {
namespace {

constexpr const char* kOp = "gating_topk";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gating_topk_op(
    const Tensor& logits_in, const std::optional<Tensor>& bias_in,
    const std::optional<Tensor>& mask_in, const std::optional<Tensor>& importance_in, int64_t k,
    double temperature) {
  check_rank(kOp, "logits", logits_in, 2, "[num_tokens, num_experts]");
  const DType dtype = float_dtype(kOp, "logits", logits_in);
  const int64_t num_tokens = logits_in.size(0), num_experts = logits_in.size(1);
  MOEKV_CHECK(num_experts >= 1 && num_experts <= kMaxExperts, kOp, "expected 1 to ", kMaxExperts,
              " experts, got ", num_experts);
  MOEKV_CHECK(k >= 1 && k <= num_experts, kOp,
              "expected k between 1 and num_experts = ", num_experts, ", got ", k);
  check_factor(kOp, "temperature", temperature);
  const std::optional<Tensor> bias =
      dense_vector(kOp, "bias", bias_in, ScalarType::Float, num_experts, logits_in);
  const std::optional<Tensor> mask =
      dense_vector(kOp, "mask", mask_in, ScalarType::Bool, num_tokens, logits_in);
  const std::optional<Tensor> importance =
      dense_vector(kOp, "importance", importance_in, ScalarType::Float, num_tokens, logits_in);

  const DeviceScope scope(logits_in);
  const Tensor logits = with_dense_rows(kOp, logits_in);
  Tensor weights = new_tensor(kOp, logits, {num_tokens, k}, ScalarType::Float);
  Tensor experts = new_tensor(kOp, logits, {num_tokens, k}, ScalarType::Int);
  Tensor prob_sum = new_tensor(kOp, logits, {num_experts}, ScalarType::Float);
  Tensor load = new_tensor(kOp, logits, {num_experts}, ScalarType::Long);
  Tensor entropy = new_tensor(kOp, logits, {}, ScalarType::Float);

  GatingTopkParams params{
      .logits = logits.const_data_ptr(),
      .bias = data<float>(bias),
      .mask = data<bool>(mask),
      .importance = data<float>(importance),
      .weights = static_cast<float*>(weights.mutable_data_ptr()),
      .experts = static_cast<int32_t*>(experts.mutable_data_ptr()),
      .prob_sum = static_cast<float*>(prob_sum.mutable_data_ptr()),
      .load = static_cast<int64_t*>(load.mutable_data_ptr()),
      .entropy = static_cast<float*>(entropy.mutable_data_ptr()),
      .workspace = nullptr,
      .num_tokens = num_tokens,
      .num_experts = num_experts,
      .k = k,
      .logits_stride = logits.stride(0),
      .inv_temperature = static_cast<float>(1.0 / temperature),
      .dtype = dtype,
  };
  const Tensor workspace = new_workspace(kOp, logits, gating_topk_workspace_bytes(params));
  params.workspace = workspace.mutable_data_ptr();
  gating_topk(params, scope.stream());
  return {weights, experts, prob_sum, load, entropy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moekv, MOEKV_DISPATCH_KEY, m) {
  m.impl("gating_topk", TORCH_BOX(&gating_topk_op));
}

}  // namespace moekv::MOEKV_BACKEND
