// The arguments of linear_assignment, checked and packed for the CPU and CUDA kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "common/check.h"

namespace sparse_rcnn {

struct LinearAssignmentInputs {
  Tensor cost;    // [Q, N, M] contiguous, float32 or float64
  Tensor counts;  // [Q] contiguous int64
  int64_t problems;
  int32_t proposals;  // N
  int32_t targets;    // M, padding included
};

inline LinearAssignmentInputs parse_linear_assignment(const Tensor& cost, const Tensor& counts) {
  check_shape("cost", cost, {-1, -1, -1});
  check_shape("counts", counts, {cost.size(0)});
  check_dtype("counts", counts, ScalarType::Long);
  check_same_device("counts", counts, cost);
  STD_TORCH_CHECK(
      cost.scalar_type() == ScalarType::Float || cost.scalar_type() == ScalarType::Double,
      "cost: expected float32 or float64");
  STD_TORCH_CHECK(std::max(cost.size(1), cost.size(2)) <= (1 << 24) &&
                      cost.size(0) <= std::numeric_limits<int32_t>::max(),
                  "cost: expected at most 2^24 proposals and targets, got ", shape_of(cost));
  return {.cost = torch::stable::contiguous(cost),
          .counts = torch::stable::contiguous(counts),
          .problems = cost.size(0),
          .proposals = static_cast<int32_t>(cost.size(1)),
          .targets = static_cast<int32_t>(cost.size(2))};
}

}  // namespace sparse_rcnn
