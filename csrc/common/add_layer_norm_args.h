// The arguments of add_layer_norm, checked and made dense once for the CPU and CUDA kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "common/check.h"

namespace sparse_rcnn {

struct AddLayerNormInputs {
  Tensor x;                        // [..., C], contiguous
  std::optional<Tensor> residual;  // the same
  Tensor weight;                   // [C] of the accumulation type
  Tensor bias;
  int64_t rows;
  int64_t channels;

  const void* residual_data() const {
    return residual.has_value() ? residual->const_data_ptr() : nullptr;
  }
};

inline Tensor parse_like_x(const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(shape_of(tensor) == shape_of(x), name, ": expected shape ", shape_of(x), ", got ",
                  shape_of(tensor));
  check_dtype(name, tensor, x.scalar_type());
  check_same_device(name, tensor, x);
  return torch::stable::contiguous(tensor);
}

inline Tensor parse_norm_parameter(const char* name, const Tensor& tensor, const Tensor& x) {
  check_shape(name, tensor, {x.size(-1)});
  check_dtype(name, tensor, accumulation_type(x.scalar_type()));
  check_same_device(name, tensor, x);
  return torch::stable::contiguous(tensor);
}

inline AddLayerNormInputs parse_add_layer_norm(const Tensor& x,
                                               const std::optional<Tensor>& residual,
                                               const Tensor& weight, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "x: expected [..., C] with C >= 1, got ",
                  shape_of(x));
  AddLayerNormInputs inputs{.x = torch::stable::contiguous(x),
                            .residual = std::nullopt,
                            .weight = parse_norm_parameter("weight", weight, x),
                            .bias = parse_norm_parameter("bias", bias, x),
                            .rows = x.numel() / x.size(-1),
                            .channels = x.size(-1)};
  if (residual.has_value()) {
    inputs.residual = parse_like_x("residual", *residual, x);
  }
  return inputs;
}

}  // namespace sparse_rcnn
