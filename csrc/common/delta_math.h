// Decoding of one box and its gradient, for the CPU and CUDA kernels; specification:
// apply_deltas_reference.
//
// Everything is of one type A, see DecodeType.
#pragma once

#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

namespace sparse_rcnn {

// The wider of the deltas' and the boxes' type, at least float: what is computed in, and the
// result's type.
template <typename D, typename B>
using DecodeType =
    std::conditional_t<std::is_same_v<D, double> || std::is_same_v<B, double>, double, float>;

// How deltas are to be read: divided by weights, dw and dh clamped to [lower, upper].
template <typename A>
struct DeltaCode {
  A weights[4];
  A lower;
  A upper;
  bool clamped;  // whether there is a bound: without one a delta of NaN has a gradient too
};

template <typename A>
DeltaCode<A> make_delta_code(const std::vector<double>& weights, std::optional<double> lower,
                             std::optional<double> upper) {
  STD_TORCH_CHECK(weights.size() == 4, "weights: expected four numbers, got ", weights.size());
  constexpr double infinity = std::numeric_limits<double>::infinity();
  DeltaCode<A> code;
  for (int i = 0; i < 4; ++i) {
    code.weights[i] = static_cast<A>(weights[i]);
  }
  code.lower = static_cast<A>(lower.value_or(-infinity));
  code.upper = static_cast<A>(upper.value_or(infinity));
  code.clamped = lower.has_value() || upper.has_value();
  return code;
}

// The factor of the box's size along an axis. The comparisons let NaN through, as torch.clamp does.
template <typename A>
C10_HOST_DEVICE inline A size_factor(A delta, int axis, const DeltaCode<A>& code) {
  A scale = delta / code.weights[2 + axis];
  scale = scale < code.lower ? code.lower : scale;
  scale = scale > code.upper ? code.upper : scale;
  return std::exp(scale);
}

// deltas dx, dy, dw, dh and a box x1, y1, x2, y2 -> the moved and scaled box.
template <typename A>
C10_HOST_DEVICE inline void decode_box(const A* deltas, const A* box, const DeltaCode<A>& code,
                                       A* decoded) {
  for (int axis = 0; axis < 2; ++axis) {
    const A size = box[2 + axis] - box[axis];
    const A center = box[axis] + A(0.5) * size;
    const A new_center = deltas[axis] / code.weights[axis] * size + center;
    const A half = A(0.5) * (size_factor(deltas[2 + axis], axis, code) * size);
    decoded[axis] = new_center - half;
    decoded[2 + axis] = new_center + half;
  }
}

// The gradients of deltas and box from that of the decoded box. A delta at a bound or beyond it has
// none, as in current PyTorch; 2.11's torch.clamp still let the gradient through at the bound
// itself.
template <typename A>
C10_HOST_DEVICE inline void decode_box_backward(const A* grad, const A* deltas, const A* box,
                                                const DeltaCode<A>& code, A* grad_deltas,
                                                A* grad_box) {
  for (int axis = 0; axis < 2; ++axis) {
    const A size = box[2 + axis] - box[axis];
    const A factor = size_factor(deltas[2 + axis], axis, code);
    const A grad_center = grad[axis] + grad[2 + axis];
    const A grad_new_size = A(0.5) * (grad[2 + axis] - grad[axis]);
    const A scale = deltas[2 + axis] / code.weights[2 + axis];
    const bool passes = !code.clamped || (scale > code.lower && scale < code.upper);
    grad_deltas[axis] = grad_center * size / code.weights[axis];
    grad_deltas[2 + axis] =
        passes ? grad_new_size * size * factor / code.weights[2 + axis] : A(0);
    // size = far - near, center = near + size / 2
    const A grad_size = grad_center * (deltas[axis] / code.weights[axis]) + grad_new_size * factor +
                        A(0.5) * grad_center;
    grad_box[axis] = grad_center - grad_size;
    grad_box[2 + axis] = grad_size;
  }
}

}  // namespace sparse_rcnn
