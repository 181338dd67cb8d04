// Box decoding on the GPU, forward and backward: one launch each in place of a dozen over small
// tensors.
//
// One thread decodes one box, reading and writing it with one vector access an operand. Budget of
// both kernels: 36 registers (52 with a float64 operand), no shared memory, no spills. At a few
// hundred to a few thousand boxes the launch is the cost, so small blocks spread them over the
// multiprocessors.
// budget: apply_deltas_forward_kernel: 52 registers, 0 bytes shared, 64 threads
// budget: apply_deltas_backward_kernel: 52 registers, 0 bytes shared, 64 threads
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/apply_deltas_args.h"
#include "common/cuda.cuh"
#include "common/delta_math.h"

namespace sparse_rcnn {
namespace {

constexpr int kThreads = 64;

template <class A, class T>
__device__ __forceinline__ void load_four(const T* from, A (&to)[4]) {
  const Vec<T, 4> values = load_vec_const<4>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[i] = static_cast<A>(values[i]);
  }
}

template <class A, class T>
__device__ __forceinline__ void store_four(const A (&from)[4], T* to) {
  Vec<T, 4> values;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = static_cast<T>(from[i]);
  }
  store_vec(to, values);
}

template <class D, class B, class A>
__global__ void __launch_bounds__(kThreads)
    apply_deltas_forward_kernel(const D* deltas, const B* boxes, DeltaCode<A> code, A* decoded,
                                int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  A delta[4], box[4], out[4];
  load_four(deltas + 4 * i, delta);
  load_four(boxes + 4 * i, box);
  decode_box(delta, box, code, out);
  store_four(out, decoded + 4 * i);
}

template <class D, class B, class A>
__global__ void __launch_bounds__(kThreads)
    apply_deltas_backward_kernel(const A* grad, const D* deltas, const B* boxes, DeltaCode<A> code,
                                 D* grad_deltas, B* grad_boxes, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  A out[4], delta[4], box[4], grad_delta[4], grad_box[4];
  load_four(grad + 4 * i, out);
  load_four(deltas + 4 * i, delta);
  load_four(boxes + 4 * i, box);
  decode_box_backward(out, delta, box, code, grad_delta, grad_box);
  store_four(grad_delta, grad_deltas + 4 * i);
  store_four(grad_box, grad_boxes + 4 * i);
}

// A view can start anywhere; the kernels read four elements at once.
Tensor aligned(const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return address % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

dim3 grid_of(int64_t count) { return dim3(static_cast<unsigned>(ceil_div(count, kThreads))); }

Tensor apply_deltas_cuda(const Tensor& deltas, const Tensor& boxes, std::vector<double> weights,
                         std::optional<double> lower, std::optional<double> upper) {
  const ApplyDeltasInputs inputs = parse_apply_deltas(deltas, boxes);
  const DeviceGuard guard(inputs.boxes);
  const Tensor dense_deltas = aligned(inputs.deltas), dense_boxes = aligned(inputs.boxes);
  const Tensor decoded =
      torch::stable::new_empty(dense_boxes, dense_boxes.sizes(), inputs.computation);
  with_types_of(inputs, [&](auto delta, auto box) {
    using D = decltype(delta);
    using B = decltype(box);
    using A = DecodeType<D, B>;
    launch(apply_deltas_forward_kernel<D, B, A>, grid_of(inputs.count), dim3(kThreads), 0,
           current_stream(dense_boxes), dense_deltas.const_data_ptr<D>(),
           dense_boxes.const_data_ptr<B>(), make_delta_code<A>(weights, lower, upper),
           decoded.mutable_data_ptr<A>(), inputs.count);
  });
  return dense(decoded, inputs.result);
}

std::tuple<Tensor, Tensor> apply_deltas_backward_cuda(const Tensor& grad, const Tensor& deltas,
                                                      const Tensor& boxes,
                                                      std::vector<double> weights,
                                                      std::optional<double> lower,
                                                      std::optional<double> upper) {
  const ApplyDeltasInputs inputs = parse_apply_deltas(deltas, boxes);
  const DeviceGuard guard(inputs.boxes);
  const Tensor dense_grad = aligned(parse_apply_deltas_grad(grad, inputs));
  const Tensor dense_deltas = aligned(inputs.deltas), dense_boxes = aligned(inputs.boxes);
  const Tensor grad_deltas = torch::stable::empty_like(dense_deltas);
  const Tensor grad_boxes = torch::stable::empty_like(dense_boxes);
  with_types_of(inputs, [&](auto delta, auto box) {
    using D = decltype(delta);
    using B = decltype(box);
    using A = DecodeType<D, B>;
    launch(apply_deltas_backward_kernel<D, B, A>, grid_of(inputs.count), dim3(kThreads), 0,
           current_stream(dense_boxes), dense_grad.const_data_ptr<A>(),
           dense_deltas.const_data_ptr<D>(), dense_boxes.const_data_ptr<B>(),
           make_delta_code<A>(weights, lower, upper), grad_deltas.mutable_data_ptr<D>(),
           grad_boxes.mutable_data_ptr<B>(), inputs.count);
  });
  return {grad_deltas, dense(grad_boxes, boxes.scalar_type())};
}

}  // namespace
}  // namespace sparse_rcnn

SPARSE_RCNN_CUDA_IMPL(m) {
  m.impl("apply_deltas", TORCH_BOX(&sparse_rcnn::apply_deltas_cuda));
  m.impl("apply_deltas_backward", TORCH_BOX(&sparse_rcnn::apply_deltas_backward_cuda));
}
