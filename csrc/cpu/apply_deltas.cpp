// Box decoding on the CPU: one pass over the boxes in place of a dozen operators over small
// tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/apply_deltas_args.h"
#include "common/delta_math.h"

namespace sparse_rcnn {
namespace {

constexpr int64_t kBoxesPerTask = 2048;

template <typename A, typename T>
void load4(const T* from, A* to) {
  for (int i = 0; i < 4; ++i) {
    to[i] = static_cast<A>(from[i]);
  }
}

template <typename A, typename T>
void store4(const A* from, T* to) {
  for (int i = 0; i < 4; ++i) {
    to[i] = static_cast<T>(from[i]);
  }
}

template <typename D, typename B>
void decode(const ApplyDeltasInputs& inputs, const DeltaCode<DecodeType<D, B>>& code,
            const Tensor& decoded) {
  using A = DecodeType<D, B>;
  const D* deltas = inputs.deltas.const_data_ptr<D>();
  const B* boxes = inputs.boxes.const_data_ptr<B>();
  A* out = decoded.mutable_data_ptr<A>();
  torch::stable::parallel_for(0, inputs.count, kBoxesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A delta[4], box[4];
      load4(deltas + 4 * i, delta);
      load4(boxes + 4 * i, box);
      decode_box(delta, box, code, out + 4 * i);
    }
  });
}

template <typename D, typename B>
void decode_backward(const Tensor& grad, const ApplyDeltasInputs& inputs,
                     const DeltaCode<DecodeType<D, B>>& code, const Tensor& grad_deltas,
                     const Tensor& grad_boxes) {
  using A = DecodeType<D, B>;
  const A* grads = grad.const_data_ptr<A>();
  const D* deltas = inputs.deltas.const_data_ptr<D>();
  const B* boxes = inputs.boxes.const_data_ptr<B>();
  D* out_deltas = grad_deltas.mutable_data_ptr<D>();
  B* out_boxes = grad_boxes.mutable_data_ptr<B>();
  torch::stable::parallel_for(0, inputs.count, kBoxesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A delta[4], box[4], grad_delta[4], grad_box[4];
      load4(deltas + 4 * i, delta);
      load4(boxes + 4 * i, box);
      decode_box_backward(grads + 4 * i, delta, box, code, grad_delta, grad_box);
      store4(grad_delta, out_deltas + 4 * i);
      store4(grad_box, out_boxes + 4 * i);
    }
  });
}

Tensor apply_deltas_cpu(const Tensor& deltas, const Tensor& boxes, std::vector<double> weights,
                        std::optional<double> lower, std::optional<double> upper) {
  const ApplyDeltasInputs inputs = parse_apply_deltas(deltas, boxes);
  const Tensor decoded =
      torch::stable::new_empty(inputs.boxes, inputs.boxes.sizes(), inputs.computation);
  with_types_of(inputs, [&](auto delta, auto box) {
    using D = decltype(delta);
    using B = decltype(box);
    decode<D, B>(inputs, make_delta_code<DecodeType<D, B>>(weights, lower, upper), decoded);
  });
  return dense(decoded, inputs.result);
}

std::tuple<Tensor, Tensor> apply_deltas_backward_cpu(const Tensor& grad, const Tensor& deltas,
                                                     const Tensor& boxes,
                                                     std::vector<double> weights,
                                                     std::optional<double> lower,
                                                     std::optional<double> upper) {
  const ApplyDeltasInputs inputs = parse_apply_deltas(deltas, boxes);
  const Tensor dense_grad = parse_apply_deltas_grad(grad, inputs);
  const Tensor grad_deltas = torch::stable::empty_like(inputs.deltas);
  const Tensor grad_boxes = torch::stable::empty_like(inputs.boxes);
  with_types_of(inputs, [&](auto delta, auto box) {
    using D = decltype(delta);
    using B = decltype(box);
    decode_backward<D, B>(dense_grad, inputs,
                          make_delta_code<DecodeType<D, B>>(weights, lower, upper), grad_deltas,
                          grad_boxes);
  });
  return {grad_deltas, dense(grad_boxes, boxes.scalar_type())};
}

}  // namespace
}  // namespace sparse_rcnn

STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CPU, m) {
  m.impl("apply_deltas", TORCH_BOX(&sparse_rcnn::apply_deltas_cpu));
  m.impl("apply_deltas_backward", TORCH_BOX(&sparse_rcnn::apply_deltas_backward_cpu));
}
