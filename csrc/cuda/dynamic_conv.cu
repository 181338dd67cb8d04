// dynamic_conv on the GPU: one block a RoI, one launch in place of six or more. The kernels and
// their budgets: dynamic_conv_forward.cuh and dynamic_conv_backward.cuh take bfloat16, float16 and,
// with allow_tf32, float32 by tensor cores, for P up to 64, C a multiple of 16 up to 256, D a
// multiple of 16 up to 64 (and shared memory up to 99 KB: with C = 256 and D = 64 the backward goes
// up to P = 49, in TF32 to 51, the forward in TF32 to 59); dynamic_conv_simt.cuh takes the rest,
// float32 exactly. No atomics: the same bits in every run.
#include "cuda/dynamic_conv.cuh"
#include "cuda/dynamic_conv_backward.cuh"
#include "cuda/dynamic_conv_forward.cuh"
#include "cuda/dynamic_conv_simt.cuh"

namespace sparse_rcnn {
namespace {

template <class T>
void launch_dynamic_conv(const DynamicConvInputs& inputs, const Tensor& roi_features,
                         const Tensor& out) {
  const T* const x = roi_features.const_data_ptr<T>();
  if constexpr (kTensorCoreType<T>) {
    if (launch_forward<T>(inputs, StoredRois<T>{x, nullptr}, out)) return;
  }
  const SimtLaunch<acc_t<T>> simt(inputs, simt_forward_elements(inputs.sizes));
  launch(dynamic_conv_forward_simt_kernel<T, SimtStoredRois<T>>, simt.grid, dim3(kSimtThreads),
         simt.shared_bytes, current_stream(roi_features), inputs.args<T>(),
         SimtStoredRois<T>{x, nullptr}, out.mutable_data_ptr<T>(), simt.workspace);
}

template <class T>
void launch_dynamic_conv_backward(const DynamicConvInputs& inputs, const Tensor& grad,
                                  const Tensor& roi_features, const Tensor& grad_roi_features,
                                  const Tensor& grad_parameters, const Tensor& grad_norms) {
  const DynamicConvGrads<T> grads{grad.const_data_ptr<T>(), grad_parameters.mutable_data_ptr<T>(),
                                  grad_norms.mutable_data_ptr<acc_t<T>>()};
  const cudaStream_t stream = current_stream(roi_features);
  const T* const x = roi_features.const_data_ptr<T>();
  T* const grad_x = grad_roi_features.mutable_data_ptr<T>();
  if constexpr (kTensorCoreType<T>) {
    if (launch_backward<T>(inputs, StoredRois<T>{x, grad_x}, grads, stream)) return;
  }
  const SimtLaunch<acc_t<T>> simt(inputs, simt_backward_elements(inputs.sizes));
  launch(dynamic_conv_backward_simt_kernel<T, SimtStoredRois<T>>, simt.grid, dim3(kSimtThreads),
         simt.shared_bytes, stream, inputs.args<T>(), SimtStoredRois<T>{x, grad_x}, grads,
         simt.workspace);
}

}  // namespace

Tensor dynamic_conv_cuda(const Tensor& roi_features, const Tensor& parameters,
                         const Tensor& norm1_weight, const Tensor& norm1_bias,
                         const Tensor& norm2_weight, const Tensor& norm2_bias, double eps,
                         bool allow_tf32) {
  const DynamicConvInputs inputs(parse_dynamic_conv(roi_features, parameters, norm1_weight,
                                                    norm1_bias, norm2_weight, norm2_bias),
                                 eps, allow_tf32);
  const DeviceGuard guard(roi_features);
  const Tensor x = aligned(roi_features);
  const Tensor out = torch::stable::new_empty(x, x.sizes());
  with_element_type("roi_features", inputs.dtype, [&](auto element) {
    launch_dynamic_conv<decltype(element)>(inputs, x, out);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> dynamic_conv_backward_cuda(
    const Tensor& grad, const Tensor& roi_features, const Tensor& parameters,
    const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& norm2_weight,
    const Tensor& norm2_bias, double eps, bool allow_tf32) {
  const DynamicConvInputs inputs(parse_dynamic_conv(roi_features, parameters, norm1_weight,
                                                    norm1_bias, norm2_weight, norm2_bias),
                                 eps, allow_tf32);
  const DeviceGuard guard(roi_features);
  check_dynamic_conv_grad(grad, inputs);
  const Tensor x = aligned(roi_features), dense_grad = aligned(grad);
  const Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  const Tensor grad_parameters =
      torch::stable::new_empty(inputs.parameters, inputs.parameters.sizes());
  const Tensor grad_norms = inputs.new_grad_norms();
  with_element_type("roi_features", inputs.dtype, [&](auto element) {
    launch_dynamic_conv_backward<decltype(element)>(inputs, dense_grad, x, grad_x, grad_parameters,
                                                    grad_norms);
  });
  return {grad_x, grad_parameters, grad_norms};
}

}  // namespace sparse_rcnn

SPARSE_RCNN_CUDA_IMPL(m) {
  m.impl("dynamic_conv", TORCH_BOX(&sparse_rcnn::dynamic_conv_cuda));
  m.impl("dynamic_conv_backward", TORCH_BOX(&sparse_rcnn::dynamic_conv_backward_cuda));
}
