// The arguments of apply_deltas, checked once for the CPU and CUDA kernels, and the choice of the
// kernel's types.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/check.h"

namespace sparse_rcnn {

struct ApplyDeltasInputs {
  Tensor deltas;           // [..., 4], contiguous
  Tensor boxes;            // [..., 4], contiguous, float32 or float64
  ScalarType computation;  // what the kernels compute in and write: see DecodeType
  ScalarType result;       // what the operator returns: the wider of the arguments' types
  int64_t count;           // boxes
};

inline Tensor dense(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(
      tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

inline ApplyDeltasInputs parse_apply_deltas(const Tensor& deltas, const Tensor& boxes) {
  STD_TORCH_CHECK(boxes.dim() >= 1 && boxes.size(-1) == 4, "boxes: expected shape [..., 4], got ",
                  shape_of(boxes));
  STD_TORCH_CHECK(shape_of(deltas) == shape_of(boxes), "deltas: expected shape ", shape_of(boxes),
                  ", got ", shape_of(deltas));
  check_same_device("deltas", deltas, boxes);
  const ScalarType types[] = {deltas.scalar_type(), boxes.scalar_type()};
  const bool wide = types[0] == ScalarType::Double || types[1] == ScalarType::Double;
  const ScalarType computation = wide ? ScalarType::Double : ScalarType::Float;
  // Boxes of a half type lose whole pixels: too rare a thing to have kernels of its own.
  const bool half_boxes = types[1] == ScalarType::BFloat16 || types[1] == ScalarType::Half;
  return {.deltas = torch::stable::contiguous(deltas),
          .boxes = dense(boxes, half_boxes ? ScalarType::Float : types[1]),
          .computation = computation,
          .result = half_boxes && types[0] == types[1] ? types[0] : computation,
          .count = boxes.numel() / 4};
}

// The gradient of the result, in the type that the kernels compute in.
inline Tensor parse_apply_deltas_grad(const Tensor& grad, const ApplyDeltasInputs& inputs) {
  STD_TORCH_CHECK(shape_of(grad) == shape_of(inputs.boxes), "grad: expected shape ",
                  shape_of(inputs.boxes), ", got ", shape_of(grad));
  check_dtype("grad", grad, inputs.result);
  check_same_device("grad", grad, inputs.boxes);
  return dense(grad, inputs.computation);
}

// Calls body(D{}, B{}), D being the C++ type of the deltas and B that of the boxes.
template <typename Body>
void with_types_of(const ApplyDeltasInputs& inputs, const Body& body) {
  const auto with_boxes = [&](auto box) {
    switch (inputs.deltas.scalar_type()) {
      case ScalarType::Float: return body(float{}, box);
      case ScalarType::Double: return body(double{}, box);
      case ScalarType::BFloat16: return body(torch::headeronly::BFloat16{}, box);
      case ScalarType::Half: return body(torch::headeronly::Half{}, box);
      default: STD_TORCH_CHECK(false, "deltas: expected float32, float64, bfloat16 or float16");
    }
  };
  switch (inputs.boxes.scalar_type()) {
    case ScalarType::Float: return with_boxes(float{});
    case ScalarType::Double: return with_boxes(double{});
    default: STD_TORCH_CHECK(false, "boxes: expected float32, float64, bfloat16 or float16");
  }
}

}  // namespace sparse_rcnn
