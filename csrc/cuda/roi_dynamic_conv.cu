// roi_dynamic_conv on the GPU: multiscale_roi_align and dynamic_conv by one block a RoI. The block
// pools its RoI into the place where dynamic_conv's kernels expect x, while W1 is on its way, so
// that the RoI features are never in global memory; the backward pools them again and adds dx, from
// shared memory, into grad_cells (roi_align.cuh). Budgets: dynamic_conv_forward.cuh,
// dynamic_conv_backward.cuh, dynamic_conv_simt.cuh; the forward needs 1.8 KB more, for the taps.
//
// Fused, for float32 boxes, are bfloat16 and float16 in the sizes of the tensor-core kernels, and
// float32 with C a multiple of 4 whose intermediates fit into shared memory. All else, and a
// deterministic backward, goes by way of RoI features, or their gradient, in global memory.
//
// Predicted for an H200, not measured: the forward is bound by the gather of the footprints from
// the L2 cache, 170 to 210 KB a RoI beside 89 KB of parameters and result. At 5 TB/s that is 7 us
// of one of 132 multiprocessors a RoI: 21 us for 300 RoIs, 0.25 ms for 4800.
// budget: pool_rois_kernel: 72 registers, 65536 bytes shared, 256 threads
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "common/roi_align_args.h"
#include "cuda/dynamic_conv.cuh"
#include "cuda/dynamic_conv_backward.cuh"
#include "cuda/dynamic_conv_forward.cuh"
#include "cuda/dynamic_conv_simt.cuh"
#include "cuda/roi_align.cuh"

namespace sparse_rcnn {
namespace {

// Pools box `roi` into target[bin * pitch + channel]; follow it by a barrier. `scratch` is
// roi_taps_bytes(). Without kDoubleBoxes the boxes must be float.
template <int N, bool kDoubleBoxes, class T>
__device__ __forceinline__ void pool_roi(const RoiAlignArgs& args, int64_t roi, T* target,
                                         int64_t pitch, char* scratch) {
  using A = acc_t<T>;
  const auto taps = make_roi_taps<TapOrder::by_bin, A, kDoubleBoxes>(args, roi, scratch);
  pool_bins<N, T>(args, taps, 0, args.output_size, [&](int bin, int channel, const Vec<A, N>& sum) {
    Vec<T, N> rounded;
#pragma unroll
    for (int e = 0; e < N; ++e) rounded[e] = from_acc<T>(sum[e]);
    store_vec(target + bin * pitch + channel, rounded);
  });
}

// Adds dx[bin * pitch + channel], of box `roi`, into grad_cells; the boxes are float.
template <class T>
__device__ __forceinline__ void scatter_roi(const RoiAlignArgs& args, int64_t roi, const T* dx,
                                            int pitch, acc_t<T>* grad_cells, char* scratch) {
  __syncthreads();
  const auto taps = make_roi_taps<TapOrder::by_cell, acc_t<T>, false>(args, roi, scratch);
  scatter_cells<4>(args, taps, 0, static_cast<int>(args.channels), grad_cells,
                   [&](int bin, int channel) { return load_vec<4>(dx + bin * pitch + channel); });
}

// Where the gradient of the RoI features goes: into grad_cells, or to `rois`, or nowhere.
template <class T>
struct RoiGrad {
  acc_t<T>* cells;
  T* rois;  // [R, P, C]
};

// The source of x for the tensor-core kernels.
template <class T>
struct PooledRois {
  RoiAlignArgs align;
  RoiGrad<T> grad;

  __host__ __device__ size_t scratch_bytes() const { return roi_taps_bytes<acc_t<T>>(align); }

  __device__ void start(const Tile<T>&, int64_t, int, int, int, int) const {}
  __device__ void finish(const Tile<T>& x, int64_t roi, char* scratch) const {
    pool_roi<kVecWidth<T>, false>(align, roi, x.data, x.pitch, scratch);
    __syncthreads();
  }

  __device__ bool wants_grad() const { return grad.cells != nullptr || grad.rois != nullptr; }
  template <class Block>
  __device__ void backward(const Block& block) const {
    if (grad.rois != nullptr) {
      backward_x(block, grad.rois + block.roi * block.P * block.C, block.C);
      return;
    }
    backward_x(block, block.grad.data, block.grad.pitch);
    scatter_roi(align, block.roi, block.grad.data, block.grad.pitch, grad.cells,
                reinterpret_cast<char*>(block.x.data));
  }
};

// The source of x for the SIMT kernels in float32: pooled into the workspace, in the backward
// for each of its two uses.
struct SimtPooledRois {
  RoiAlignArgs align;
  RoiGrad<float> grad;

  __device__ const float* fetch(int64_t roi, int64_t, float* place, float* staging) const {
    pool_roi<4, false>(align, roi, place, align.channels, reinterpret_cast<char*>(staging));
    __syncthreads();
    return place;
  }
  __device__ float* grad_place(int64_t roi, int64_t size, float* place) const {
    return grad.rois != nullptr ? grad.rois + roi * size : grad.cells != nullptr ? place : nullptr;
  }
  __device__ void backward(int64_t roi, int64_t, float* place, float* staging) const {
    if (grad.rois != nullptr) return;
    scatter_roi(align, roi, place, static_cast<int>(align.channels), grad.cells,
                reinterpret_cast<char*>(staging));
  }
};

// RoI features for what is not fused.
template <class T>
__global__ void __launch_bounds__(kTileThreads, 3)
    pool_rois_kernel(const __grid_constant__ RoiAlignArgs args, T* rois) {
  const int64_t roi = blockIdx.x;
  pool_roi<1, true>(args, roi, rois + roi * args.output_size * args.output_size * args.channels,
                    args.channels, dynamic_shared<char>());
}

// All that both directions begin with.
struct Inputs {
  RoiAlignInputs align;
  DynamicConvInputs conv;

  Tensor new_rois() const {
    return torch::stable::new_empty(
        align.maps[0], {align.args.images, align.args.proposals, conv.bins, conv.channels});
  }
  Tensor pooled() const {
    const Tensor rois = new_rois();
    with_element_type("features", conv.dtype, [&](auto element) {
      using T = decltype(element);
      launch(pool_rois_kernel<T>, one_block_a_roi(conv.rois), dim3(kTileThreads),
             roi_taps_bytes<acc_t<T>>(align.args), current_stream(rois), align.args,
             rois.mutable_data_ptr<T>());
    });
    return torch::stable::view(rois, {conv.rois, conv.bins, conv.channels});
  }
};

bool fits(size_t shared_bytes) { return shared_bytes <= kSharedLimit; }

// Whether the float32 kernels take it fused, with a workspace of so many elements.
bool suits_simt(const Inputs& inputs, int64_t elements) {
  return inputs.conv.dtype == ScalarType::Float && has_vector_channels<float>(inputs.align.args) &&
         roi_taps_bytes<float>(inputs.align.args) <= kSimtStaging * sizeof(float) &&
         fits((kSimtStaging + elements) * sizeof(float));
}

template <class T>
bool launch_fused_forward(const Inputs& inputs, double eps, const Tensor& out) {
  const DynamicConvArgs<T> args = inputs.conv.args<T>(eps);
  const PooledRois<T> rois{inputs.align.args, {}};
  const ForwardPlan<T> plan(args.bins, args.channels, args.inner);
  const size_t shared = plan.scratch + rois.scratch_bytes();
  if (!suits_tensor_cores(inputs.conv.bins, inputs.conv.channels, inputs.conv.inner) ||
      !has_vector_channels<T>(rois.align) || !fits(shared)) {
    return false;
  }
  const auto kernel = is_usual_size(args) ? dynamic_conv_forward_kernel<T, PooledRois<T>, 256, 64>
                                          : dynamic_conv_forward_kernel<T, PooledRois<T>, 0, 0>;
  launch(kernel, one_block_a_roi(args.rois), dim3(kTileThreads), shared, current_stream(out), args,
         rois, out.mutable_data_ptr<T>());
  return true;
}

template <>
bool launch_fused_forward<float>(const Inputs& inputs, double eps, const Tensor& out) {
  const int64_t elements = simt_forward_elements(inputs.conv);
  if (!suits_simt(inputs, elements)) return false;
  const SimtLaunch<float> simt(inputs.conv, elements);
  launch(dynamic_conv_forward_simt_kernel<float, SimtPooledRois>, simt.grid, dim3(kSimtThreads),
         simt.shared_bytes, current_stream(out), inputs.conv.args<float>(eps),
         SimtPooledRois{inputs.align.args, {}}, out.mutable_data_ptr<float>(), simt.workspace);
  return true;
}

template <>
bool launch_fused_forward<double>(const Inputs&, double, const Tensor&) {
  return false;
}

template <class T>
bool launch_fused_backward(const Inputs& inputs, double eps, const DynamicConvGrads<T>& grads,
                           const RoiGrad<T>& roi_grad, cudaStream_t stream) {
  const DynamicConvArgs<T> args = inputs.conv.args<T>(eps);
  const PooledRois<T> rois{inputs.align.args, roi_grad};
  const BackwardPlan<T> plan(args.bins, args.channels, args.inner, rois.scratch_bytes());
  if (!suits_tensor_cores(inputs.conv.bins, inputs.conv.channels, inputs.conv.inner) ||
      !has_vector_channels<T>(rois.align) || !fits(plan.end)) {
    return false;
  }
  const auto kernel = is_usual_size(args) ? dynamic_conv_backward_kernel<T, PooledRois<T>, 256, 64>
                                          : dynamic_conv_backward_kernel<T, PooledRois<T>, 0, 0>;
  launch(kernel, one_block_a_roi(args.rois), dim3(kTileThreads), plan.end, stream, args, rois,
         grads);
  return true;
}

template <>
bool launch_fused_backward<float>(const Inputs& inputs, double eps,
                                  const DynamicConvGrads<float>& grads,
                                  const RoiGrad<float>& roi_grad, cudaStream_t stream) {
  const int64_t elements = simt_backward_elements(inputs.conv);
  if (!suits_simt(inputs, elements)) return false;
  const SimtLaunch<float> simt(inputs.conv, elements);
  launch(dynamic_conv_backward_simt_kernel<float, SimtPooledRois>, simt.grid, dim3(kSimtThreads),
         simt.shared_bytes, stream, inputs.conv.args<float>(eps),
         SimtPooledRois{inputs.align.args, roi_grad}, grads, simt.workspace);
  return true;
}

template <>
bool launch_fused_backward<double>(const Inputs&, double, const DynamicConvGrads<double>&,
                                   const RoiGrad<double>&, cudaStream_t) {
  return false;
}

Inputs parse(const std::vector<Tensor>& features, const Tensor& boxes, const Tensor& parameters,
             const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& norm2_weight,
             const Tensor& norm2_bias, const std::vector<int64_t>& strides, int64_t output_size,
             int64_t sampling_ratio, const std::string& level_rule) {
  RoiAlignInputs align =
      parse_roi_align(features, boxes, strides, output_size, sampling_ratio, level_rule);
  check_roi_align_sizes(align.args, sizeof(double));
  const DynamicConvInputs conv =
      parse_dynamic_conv(features[0], align.args.rois(), align.args.bins(), align.args.channels,
                         parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias);
  return {align, conv};
}

Tensor roi_dynamic_conv_cuda(const std::vector<Tensor>& features, const Tensor& boxes,
                             const Tensor& parameters, const Tensor& norm1_weight,
                             const Tensor& norm1_bias, const Tensor& norm2_weight,
                             const Tensor& norm2_bias, const std::vector<int64_t>& strides,
                             int64_t output_size, int64_t sampling_ratio,
                             const std::string& level_rule, double eps) {
  const Inputs inputs = parse(features, boxes, parameters, norm1_weight, norm1_bias, norm2_weight,
                              norm2_bias, strides, output_size, sampling_ratio, level_rule);
  const DeviceGuard guard(boxes);
  const Tensor out = inputs.new_rois();
  bool fused = false;
  with_element_type("features", inputs.conv.dtype, [&](auto element) {
    fused = launch_fused_forward<decltype(element)>(inputs, eps, out);
  });
  if (fused) return out;
  const Tensor unfused = dynamic_conv_cuda(inputs.pooled(), parameters, norm1_weight, norm1_bias,
                                           norm2_weight, norm2_bias, eps);
  return torch::stable::view(unfused, out.sizes());
}

std::tuple<Tensor, Tensor> roi_dynamic_conv_backward_cuda(
    const Tensor& grad, const std::vector<Tensor>& features, const Tensor& boxes,
    const Tensor& parameters, const Tensor& norm1_weight, const Tensor& norm1_bias,
    const Tensor& norm2_weight, const Tensor& norm2_bias, const std::vector<int64_t>& strides,
    int64_t output_size, int64_t sampling_ratio, const std::string& level_rule, double eps,
    bool deterministic, const Tensor& grad_cells) {
  const Inputs inputs = parse(features, boxes, parameters, norm1_weight, norm1_bias, norm2_weight,
                              norm2_bias, strides, output_size, sampling_ratio, level_rule);
  const DeviceGuard guard(boxes);
  const Tensor dense_grad = aligned(parse_roi_align_grad(grad, inputs.align));
  const bool wanted = wants_grad_cells(grad_cells, inputs.align);
  const bool scattered = wanted && !deterministic &&
                         reinterpret_cast<uintptr_t>(grad_cells.const_data_ptr()) % 16 == 0;
  Tensor grad_rois;
  if (wanted && !scattered) grad_rois = inputs.new_rois();
  Tensor grad_parameters =
      torch::stable::new_empty(inputs.conv.parameters, inputs.conv.parameters.sizes());
  Tensor grad_norms = inputs.conv.new_grad_norms();

  bool fused = false;
  with_element_type("features", inputs.conv.dtype, [&](auto element) {
    using T = decltype(element);
    using A = acc_t<T>;
    fused = launch_fused_backward<T>(
        inputs, eps,
        {dense_grad.const_data_ptr<T>(), grad_parameters.mutable_data_ptr<T>(),
         grad_norms.mutable_data_ptr<A>()},
        {scattered ? grad_cells.mutable_data_ptr<A>() : nullptr,
         wanted && !scattered ? grad_rois.mutable_data_ptr<T>() : nullptr},
        current_stream(boxes));
  });
  if (!fused) {
    const Tensor flat =
        torch::stable::view(dense_grad, {inputs.conv.rois, inputs.conv.bins, inputs.conv.channels});
    std::tie(grad_rois, grad_parameters, grad_norms) = dynamic_conv_backward_cuda(
        flat, inputs.pooled(), parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias, eps);
  }
  if (wanted && !(fused && scattered)) {
    add_roi_align_gradient(inputs.align, grad_rois, deterministic, grad_cells);
  }
  return {grad_parameters, grad_norms};
}

}  // namespace
}  // namespace sparse_rcnn

SPARSE_RCNN_CUDA_IMPL(m) {
  m.impl("roi_dynamic_conv", TORCH_BOX(&sparse_rcnn::roi_dynamic_conv_cuda));
  m.impl("roi_dynamic_conv_backward", TORCH_BOX(&sparse_rcnn::roi_dynamic_conv_backward_cuda));
}
