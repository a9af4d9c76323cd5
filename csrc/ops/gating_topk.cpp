#include <torch/csrc/stable/library.h>

#include <cfloat>
#include <tuple>

#include "../backend.h"
#include "../check.h"
#include "stream.h"

namespace moekv::MOEKV_BACKEND {
namespace {

constexpr const char* kOp = "gating_topk";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gating_topk_op(
    const Tensor& logits_in, const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& importance, int64_t k, double temperature) {
  check_rank(kOp, "logits", logits_in, 2, "[num_tokens, num_experts]");
  const DType dtype = float_dtype(kOp, "logits", logits_in);
  const Tensor logits = with_dense_rows(logits_in);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  MOEKV_CHECK(num_experts >= 1 && num_experts <= kMaxExperts, kOp, "expected 1 to ", kMaxExperts,
              " experts, got ", num_experts);
  MOEKV_CHECK(k >= 1 && k <= num_experts, kOp,
              "expected k between 1 and num_experts = ", num_experts, ", got ", k);
  const auto inv_temperature = static_cast<float>(1.0 / temperature);
  MOEKV_CHECK(temperature > 0, kOp, "expected temperature > 0, got ", temperature);
  MOEKV_CHECK(inv_temperature > 0 && inv_temperature <= FLT_MAX, kOp,
              "expected a temperature whose inverse fits float32, got ", temperature);
  if (bias) check_vector(kOp, "bias", *bias, ScalarType::Float, num_experts, logits);
  if (mask) check_vector(kOp, "mask", *mask, ScalarType::Bool, num_tokens, logits);

  if (importance) {
    check_vector(kOp, "importance", *importance, ScalarType::Float, num_tokens, logits);
  }

  const DeviceScope scope(logits);
  Tensor weights = torch::stable::new_empty(logits, {num_tokens, k}, ScalarType::Float);
  Tensor experts = torch::stable::new_empty(logits, {num_tokens, k}, ScalarType::Int);
  Tensor prob_sum = torch::stable::new_empty(logits, {num_experts}, ScalarType::Float);
  Tensor load = torch::stable::new_empty(logits, {num_experts}, ScalarType::Long);

  Tensor entropy = torch::stable::new_empty(logits, {}, ScalarType::Float);

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
      .inv_temperature = inv_temperature,
      .dtype = dtype,
  };
  const Tensor workspace = new_workspace(logits, gating_topk_workspace_bytes(params));
  params.workspace = workspace.mutable_data_ptr();
  gating_topk(params, scope.stream());
  return {weights, experts, prob_sum, load, entropy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moekv, MOEKV_DISPATCH_KEY, m) {
  m.impl("gating_topk", TORCH_BOX(&gating_topk_op));
}

}  // namespace moekv::MOEKV_BACKEND
