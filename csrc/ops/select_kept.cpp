#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../backend.h"
#include "../check.h"
#include "stream.h"

namespace moekv::MOEKV_BACKEND {
namespace {

constexpr const char* kOp = "select_kept";

std::tuple<Tensor, Tensor> select_kept_op(const Tensor& scores_in,
                                          const std::optional<Tensor>& start_in,
                                          const std::vector<int64_t>& total, int64_t sinks,
                                          int64_t window, int64_t floor) {
  check_rank(kOp, "scores", scores_in, 3, "[groups, rows, num_keys]");
  const DType dtype = float_dtype(kOp, "scores", scores_in);
  const int64_t groups = scores_in.size(0), rows = scores_in.size(1), num_keys = scores_in.size(2);
  check_positions(kOp, num_keys);
  MOEKV_CHECK(rows <= INT32_MAX, kOp, "expected at most 2^31 - 1 rows in a group, got ", rows);
  MOEKV_CHECK(static_cast<int64_t>(total.size()) == groups, kOp, "expected ", groups,
              " totals, one per group, got ", total.size());
  MOEKV_CHECK(sinks >= 0, kOp, "expected sinks >= 0, got ", sinks);
  MOEKV_CHECK(window >= 0, kOp, "expected window >= 0, got ", window);
  MOEKV_CHECK(floor >= 0, kOp, "expected floor >= 0, got ", floor);
  int64_t num_indices = 0;
  for (int64_t g = 0; g < groups; ++g) {
    MOEKV_CHECK(total[g] >= rows && total[g] <= rows * num_keys, kOp, "expected total[", g,
                "] between ", rows, " (one pair per row) and ", rows * num_keys, " (all), got ",
                total[g]);
    num_indices += total[g];
  }
  MOEKV_CHECK(num_indices <= INT32_MAX, kOp, "expected at most 2^31 - 1 kept pairs, got ",
              num_indices);

  const DeviceScope scope(scores_in);
  const Tensor scores = with_dense_rows(kOp, scores_in);
  std::optional<Tensor> start;
  if (start_in) {
    MOEKV_CHECK(start_in->dim() == 2 && start_in->size(0) == groups && start_in->size(1) == rows,
                kOp, "expected start [", groups, ", ", rows, "], got ", shape(*start_in));
    check_dtype(kOp, "start", *start_in, ScalarType::Int);
    check_device(kOp, "start", *start_in, scores);
    start = contiguous(kOp, *start_in);
  }
  Tensor indices = new_tensor(kOp, scores, {num_indices}, ScalarType::Int);
  Tensor offsets = new_tensor(kOp, scores, {groups * rows + 1}, ScalarType::Int);

  SelectKeptParams params{};
  params.scores = scores.const_data_ptr();
  params.start = data<int32_t>(start);
  params.total = total.data();
  params.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  params.offsets = static_cast<int32_t*>(offsets.mutable_data_ptr());
  params.groups = groups;
  params.rows = rows;
  params.num_keys = num_keys;
  params.score_stride[0] = scores.stride(0);
  params.score_stride[1] = scores.stride(1);
  params.sinks = sinks;
  params.window = window;
  params.floor = floor;
  params.dtype = dtype;
  const Tensor workspace = new_workspace(kOp, scores, select_kept_workspace_bytes(params));
  params.workspace = workspace.mutable_data_ptr();
  select_kept(params, scope.stream());
  return {indices, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moekv, MOEKV_DISPATCH_KEY, m) {
  m.impl("select_kept", TORCH_BOX(&select_kept_op));
}

}  // namespace moekv::MOEKV_BACKEND
