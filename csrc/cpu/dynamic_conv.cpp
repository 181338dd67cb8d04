// The dynamic interaction on the CPU: a thread takes one RoI after the other, and all that lies
// between its inputs and its outputs stays in the cache of its core. A RoI's generated parameters
// are used by nothing else, so they are streamed from memory once, and fetched ahead: while one RoI
// is multiplied, the next one's operands arrive.
#include "cpu/dynamic_conv.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#define SPARSE_RCNN_KERNELS "cpu/dynamic_conv_kernels.h"
#include "cpu/for_each_isa.h"

namespace sparse_rcnn {

template <typename T>
DynamicConvKernels<T> dynamic_conv_kernels() {
  return {.forward_space = SPARSE_RCNN_BEST(forward_space<T>),
          .forward = SPARSE_RCNN_BEST(forward_roi<T>),
          .backward_space = SPARSE_RCNN_BEST(backward_space<T>),
          .backward = SPARSE_RCNN_BEST(backward_roi<T>),
          .narrow = SPARSE_RCNN_BEST(narrow_values<T>)};
}
template DynamicConvKernels<float> dynamic_conv_kernels();
template DynamicConvKernels<double> dynamic_conv_kernels();
template DynamicConvKernels<BFloat16Bits> dynamic_conv_kernels();
template DynamicConvKernels<HalfBits> dynamic_conv_kernels();

namespace {

template <typename T>
void run_forward(const DynamicConvOperands& operands, const Tensor& roi_features, double eps,
                 const Tensor& result) {
  const DynamicConvKernels<T> kernels = dynamic_conv_kernels<T>();
  const PaddedNorms<Accumulation<T>> norms(operands, eps);
  const DynamicConvSizes sizes = operands.sizes;
  const T* x = static_cast<const T*>(roi_features.const_data_ptr());
  const T* parameters = static_cast<const T*>(operands.parameters.const_data_ptr());
  T* out = static_cast<T*>(result.mutable_data_ptr());
  for_each_roi(operands.rois, [&] {
    return [&, space = ThreadMemory(kernels.forward_space(sizes))](int64_t roi, int64_t next) {
      Ahead ahead;
      if (next >= 0) {
        ahead.add(parameters + next * sizes.parameters(), sizes.parameters());
        ahead.add(x + next * sizes.features(), sizes.features());
        ahead.add(out + next * sizes.features(), sizes.features());
      }
      kernels.forward(sizes, norms.get(), x + roi * sizes.features(),
                      parameters + roi * sizes.parameters(), ahead, space.get(),
                      out + roi * sizes.features());
    };
  });
}

struct DynamicConvGrads {
  Tensor roi_features;  // [R, P, C]
  Tensor parameters;    // [R, 2 * C * D]
  Tensor norms;         // [R, 2 * (D + C)], of the accumulation type
};

template <typename T>
void run_backward(const DynamicConvOperands& operands, const Tensor& roi_features,
                  const Tensor& result_grad, double eps, const DynamicConvGrads& grads) {
  using A = Accumulation<T>;
  constexpr bool narrows = sizeof(T) != sizeof(A);
  const DynamicConvKernels<T> kernels = dynamic_conv_kernels<T>();
  const PaddedNorms<A> norms(operands, eps);
  const DynamicConvSizes sizes = operands.sizes;
  const int64_t features = sizes.features(), weights = sizes.parameters();
  const T* x = static_cast<const T*>(roi_features.const_data_ptr());
  const T* parameters = static_cast<const T*>(operands.parameters.const_data_ptr());
  const T* grad = static_cast<const T*>(result_grad.const_data_ptr());
  T* grad_x = static_cast<T*>(grads.roi_features.mutable_data_ptr());
  T* grad_parameters = static_cast<T*>(grads.parameters.mutable_data_ptr());
  A* grad_norms = static_cast<A*>(grads.norms.mutable_data_ptr());
  for_each_roi(operands.rois, [&] {
    return [&, space = ThreadMemory(kernels.backward_space(sizes)),
            sums = std::vector<A>(narrows ? features : 0)](int64_t roi, int64_t next) mutable {
      Ahead ahead;
      if (next >= 0) {
        ahead.add(parameters + next * weights, weights);
        ahead.add(x + next * features, features);
        ahead.add(grad + next * features, features);
        ahead.add(grad_parameters + next * weights, weights);
        ahead.add(grad_x + next * features, features);
      }
      T* stored = grad_x + roi * features;
      A* wide = narrows ? sums.data() : reinterpret_cast<A*>(stored);
      kernels.backward(sizes, norms.get(), grad + roi * features, x + roi * features,
                       parameters + roi * weights, ahead, space.get(), wide,
                       grad_parameters + roi * weights, grad_norms + roi * sizes.norms());
      if (narrows) kernels.narrow(wide, features, stored);
    };
  });
}

Tensor dynamic_conv_cpu(const Tensor& roi_features, const Tensor& parameters,
                        const Tensor& norm1_weight, const Tensor& norm1_bias,
                        const Tensor& norm2_weight, const Tensor& norm2_bias, double eps,
                        bool /*allow_tf32*/) {
  const DynamicConvOperands operands = parse_dynamic_conv(
      roi_features, parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias);
  const Tensor x = torch::stable::contiguous(roi_features);
  const Tensor out = torch::stable::new_empty(x, x.sizes());
  with_stored_type(operands.dtype,
                   [&](auto value) { run_forward<decltype(value)>(operands, x, eps, out); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> dynamic_conv_backward_cpu(
    const Tensor& grad, const Tensor& roi_features, const Tensor& parameters,
    const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& norm2_weight,
    const Tensor& norm2_bias, double eps, bool /*allow_tf32*/) {
  const DynamicConvOperands operands = parse_dynamic_conv(
      roi_features, parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias);
  check_dynamic_conv_grad(grad, operands);
  const Tensor x = torch::stable::contiguous(roi_features);
  const Tensor dense_grad = torch::stable::contiguous(grad);
  const DynamicConvGrads grads{
      .roi_features = torch::stable::new_empty(x, x.sizes()),
      .parameters = torch::stable::new_empty(operands.parameters, operands.parameters.sizes()),
      .norms = operands.new_grad_norms()};
  with_stored_type(operands.dtype, [&](auto value) {
    run_backward<decltype(value)>(operands, x, dense_grad, eps, grads);
  });
  return {grads.roi_features, grads.parameters, grads.norms};
}

}  // namespace
}  // namespace sparse_rcnn

STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CPU, m) {
  m.impl("dynamic_conv", TORCH_BOX(&sparse_rcnn::dynamic_conv_cpu));
  m.impl("dynamic_conv_backward", TORCH_BOX(&sparse_rcnn::dynamic_conv_backward_cpu));
}
