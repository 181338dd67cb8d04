// The arguments that dynamic_conv and roi_dynamic_conv share, checked once for the CPU and the CUDA
// kernels; what Python's own checks leave to these says common/check.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>

#include "common/check.h"

namespace sparse_rcnn {

struct DynamicConvSizes {
  int64_t bins;      // P
  int64_t channels;  // C
  int64_t inner;     // D

  int64_t features() const { return bins * channels; }
  int64_t parameters() const { return 2 * channels * inner; }
  int64_t norms() const { return 2 * (inner + channels); }
};

// The operands of an interaction beside the RoI features, checked and contiguous.
struct DynamicConvOperands {
  Tensor parameters;  // [R, 2 * C * D]
  Tensor norms[4];    // weight and bias of the first norm [D] and of the second [C]
  int64_t rois;       // R
  DynamicConvSizes sizes;
  ScalarType dtype;

  Tensor new_grad_norms() const {
    return torch::stable::new_empty(norms[0], {rois, sizes.norms()});
  }
};

// `features` is on the device, and of the dtype, that all have in common.
inline DynamicConvOperands parse_dynamic_conv(const Tensor& features, int64_t rois, int64_t bins,
                                              int64_t channels, const Tensor& parameters,
                                              const Tensor& norm1_weight, const Tensor& norm1_bias,
                                              const Tensor& norm2_weight,
                                              const Tensor& norm2_bias) {
  const ScalarType dtype = features.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "features: expected float32, float64, bfloat16 or float16, got ",
                  torch::headeronly::toString(dtype));
  check_shape("norm1_weight", norm1_weight, {-1});
  const int64_t inner = norm1_weight.size(0);
  STD_TORCH_CHECK(channels >= 1 && inner >= 1, "features, norm1_weight: expected C, D >= 1, got ",
                  channels, ", ", inner);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(rois <= kMost && bins <= kMost && channels <= kMost / 2 && inner <= kMost / 2,
                  "features: expected sizes below 2^31, got R = ", rois, ", P = ", bins,
                  ", C = ", channels, ", D = ", inner);
  const DynamicConvSizes sizes{bins, channels, inner};
  check_shape("parameters", parameters, {rois, sizes.parameters()});
  check_dtype("parameters", parameters, dtype);
  check_same_device("parameters", parameters, features);
  DynamicConvOperands operands{.parameters = torch::stable::contiguous(parameters),
                               .norms = {norm1_weight, norm1_bias, norm2_weight, norm2_bias},
                               .rois = rois,
                               .sizes = sizes,
                               .dtype = dtype};
  constexpr const char* kNames[] = {"norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"};
  for (int index = 0; index < 4; ++index) {
    Tensor& norm = operands.norms[index];
    check_shape(kNames[index], norm, {index < 2 ? inner : channels});
    check_dtype(kNames[index], norm, accumulation_type(dtype));
    check_same_device(kNames[index], norm, features);
    norm = torch::stable::contiguous(norm);
  }
  return operands;
}

// parse_dynamic_conv() of the RoI features themselves, [R, P, C].
inline DynamicConvOperands parse_dynamic_conv(const Tensor& roi_features, const Tensor& parameters,
                                              const Tensor& norm1_weight, const Tensor& norm1_bias,
                                              const Tensor& norm2_weight,
                                              const Tensor& norm2_bias) {
  check_shape("roi_features", roi_features, {-1, -1, -1});
  return parse_dynamic_conv(roi_features, roi_features.size(0), roi_features.size(1),
                            roi_features.size(2), parameters, norm1_weight, norm1_bias,
                            norm2_weight, norm2_bias);
}

// The gradient of the result of dynamic_conv, [R, P, C].
inline void check_dynamic_conv_grad(const Tensor& grad, const DynamicConvOperands& operands) {
  check_shape("grad", grad, {operands.rois, operands.sizes.bins, operands.sizes.channels});
  check_dtype("grad", grad, operands.dtype);
  check_same_device("grad", grad, operands.parameters);
}

}  // namespace sparse_rcnn
