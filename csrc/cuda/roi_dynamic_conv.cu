// roi_dynamic_conv on the GPU: multiscale_roi_align and dynamic_conv by one block a RoI. The block
// pools its RoI into the place where dynamic_conv's kernels expect x, while W1 is on its way, so
// that the RoI features are never in global memory; the backward pools them again and adds dx, from
// shared memory, into grad_cells (roi_align.cuh). Budgets: dynamic_conv_forward.cuh,
// dynamic_conv_backward.cuh, dynamic_conv_simt.cuh; the forward needs 1.8 KB more, for the taps.
//
// Fused, for float32 boxes, is what the tensor-core kernels take, and exact float32 with C a
// multiple of 4 whose intermediates fit into shared memory. All else, and a deterministic backward,
// goes by way of RoI features, or their gradient, in global memory.
//
// Predicted for an H200, not measured: the forward is bound by the gather of the footprints from
// the L2 cache, 170 to 210 KB a RoI beside 89 KB of parameters and result. At 5 TB/s that is 7 us
// of one of 132 multiprocessors a RoI: 21 us for 300 RoIs, 0.25 ms for 4800.
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

// Pools box `roi`, a float one, into rows of bins; follow it by a barrier. `scratch` is
// roi_taps_bytes().
template <class Target>
__device__ __forceinline__ void pool_roi(const RoiAlignArgs& args, int64_t roi,
                                         const Target& target, char* scratch) {
  using T = std::remove_reference_t<decltype(*target.data)>;
  using A = acc_t<T>;
  constexpr int N = kVecWidth<T>;
  const auto taps = make_roi_taps<TapOrder::by_bin, A, false>(args, roi, scratch);
  pool_bins<N, T>(args, taps, 0, args.output_size, [&](int bin, int channel, const Vec<A, N>& sum) {
    Vec<T, N> rounded;
#pragma unroll
    for (int e = 0; e < N; ++e) rounded[e] = from_acc<T>(sum[e]);
    store_vec(target.place(bin, channel), rounded);
  });
}

// Adds rows of bins of dx, of box `roi`, a float one, into grad_cells.
template <class Source, class A>
__device__ __forceinline__ void scatter_roi(const RoiAlignArgs& args, int64_t roi, const Source& dx,
                                            A* grad_cells, char* scratch) {
  __syncthreads();
  const auto taps = make_roi_taps<TapOrder::by_cell, A, false>(args, roi, scratch);
  scatter_cells<4>(args, taps, 0, static_cast<int>(args.channels), grad_cells,
                   [&](int bin, int channel) { return load_vec<4>(dx.place(bin, channel)); });
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
    pool_roi(align, roi, x, scratch);
    __syncthreads();
  }

  __device__ bool wants_grad() const { return grad.cells != nullptr || grad.rois != nullptr; }
  template <class Block>
  __device__ void backward(const Block& block) const {
    if (grad.rois != nullptr) {
      block.backward_x(GlobalRows<T>{grad.rois + block.roi * block.P * block.C, block.C});
      return;
    }
    block.backward_x(block.dy);
    scatter_roi(align, block.roi, block.dy, grad.cells, block.scratch);
  }
};

// The source of x for the SIMT kernels in float32: pooled into the workspace, in the backward
// for each of its two uses.
struct SimtPooledRois {
  RoiAlignArgs align;
  RoiGrad<float> grad;

  __device__ const float* fetch(int64_t roi, int64_t, float* place, float* staging) const {
    pool_roi(align, roi, rows_at(place), reinterpret_cast<char*>(staging));
    __syncthreads();
    return place;
  }
  __device__ float* grad_place(int64_t roi, int64_t size, float* place) const {
    return grad.rois != nullptr ? grad.rois + roi * size : grad.cells != nullptr ? place : nullptr;
  }
  __device__ void backward(int64_t roi, int64_t, float* place, float* staging) const {
    if (grad.rois != nullptr) return;
    scatter_roi(align, roi, rows_at(place), grad.cells, reinterpret_cast<char*>(staging));
  }

 private:
  __device__ GlobalRows<float, int64_t> rows_at(float* place) const {
    return {place, align.channels};
  }
};

// All that both directions begin with.
struct Inputs {
  RoiAlignInputs align;
  DynamicConvInputs conv;

  Tensor new_rois() const {
    return torch::stable::new_empty(
        align.maps[0], {align.args.images, align.args.proposals, conv.sizes.bins,
                        conv.sizes.channels});
  }
  // RoI features for what is not fused, [R, P, C].
  Tensor pooled() const {
    return torch::stable::view(pool_rois(align),
                               {conv.rois, conv.sizes.bins, conv.sizes.channels});
  }
};

// Whether the exact float32 kernels take it fused, with a workspace of so many elements.
bool suits_simt(const Inputs& inputs, int64_t elements) {
  return roi_taps_bytes<float>(inputs.align.args) <= kSimtStaging * sizeof(float) &&
         (kSimtStaging + elements) * sizeof(float) <= kSharedLimit;
}

template <class T>
bool launch_fused_forward(const Inputs& inputs, const Tensor& out) {
  if constexpr (kTensorCoreType<T>) {
    if (!has_vector_channels<T>(inputs.align.args)) return false;
    if (launch_forward<T>(inputs.conv, PooledRois<T>{inputs.align.args, {}}, out)) return true;
  }
  if constexpr (std::is_same_v<T, float>) {
    const int64_t elements = simt_forward_elements(inputs.conv.sizes);
    if (!suits_simt(inputs, elements)) return false;
    const SimtLaunch<float> simt(inputs.conv, elements);
    launch(dynamic_conv_forward_simt_kernel<float, SimtPooledRois>, simt.grid, dim3(kSimtThreads),
           simt.shared_bytes, current_stream(out), inputs.conv.args<float>(),
           SimtPooledRois{inputs.align.args, {}}, out.mutable_data_ptr<float>(), simt.workspace);
    return true;
  }
  return false;
}

template <class T>
bool launch_fused_backward(const Inputs& inputs, const DynamicConvGrads<T>& grads,
                           const RoiGrad<T>& roi_grad, cudaStream_t stream) {
  if constexpr (kTensorCoreType<T>) {
    if (!has_vector_channels<T>(inputs.align.args)) return false;
    const PooledRois<T> rois{inputs.align.args, roi_grad};
    if (launch_backward<T>(inputs.conv, rois, grads, stream)) return true;
  }
  if constexpr (std::is_same_v<T, float>) {
    const int64_t elements = simt_backward_elements(inputs.conv.sizes);
    if (!suits_simt(inputs, elements)) return false;
    const SimtLaunch<float> simt(inputs.conv, elements);
    launch(dynamic_conv_backward_simt_kernel<float, SimtPooledRois>, simt.grid, dim3(kSimtThreads),
           simt.shared_bytes, stream, inputs.conv.args<float>(),
           SimtPooledRois{inputs.align.args, roi_grad}, grads, simt.workspace);
    return true;
  }
  return false;
}

Inputs parse(const std::vector<Tensor>& features, const Tensor& boxes, const Tensor& parameters,
             const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& norm2_weight,
             const Tensor& norm2_bias, const std::vector<int64_t>& strides, int64_t output_size,
             int64_t sampling_ratio, const std::string& level_rule, double eps, bool allow_tf32) {
  RoiAlignInputs align =
      parse_roi_align(features, boxes, strides, output_size, sampling_ratio, level_rule);
  check_roi_align_sizes(align.args, sizeof(double));
  const DynamicConvInputs conv(
      parse_dynamic_conv(features[0], align.args.rois(), align.args.bins(), align.args.channels,
                         parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias),
      eps, allow_tf32);
  return {align, conv};
}

Tensor roi_dynamic_conv_cuda(const std::vector<Tensor>& features, const Tensor& boxes,
                             const Tensor& parameters, const Tensor& norm1_weight,
                             const Tensor& norm1_bias, const Tensor& norm2_weight,
                             const Tensor& norm2_bias, const std::vector<int64_t>& strides,
                             int64_t output_size, int64_t sampling_ratio,
                             const std::string& level_rule, double eps, bool allow_tf32) {
  const Inputs inputs =
      parse(features, boxes, parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias,
            strides, output_size, sampling_ratio, level_rule, eps, allow_tf32);
  const DeviceGuard guard(boxes);
  const Tensor out = inputs.new_rois();
  bool fused = false;
  with_element_type("features", inputs.conv.dtype, [&](auto element) {
    fused = launch_fused_forward<decltype(element)>(inputs, out);
  });
  if (fused) return out;
  const Tensor unfused = dynamic_conv_cuda(inputs.pooled(), parameters, norm1_weight, norm1_bias,
                                           norm2_weight, norm2_bias, eps, allow_tf32);
  return torch::stable::view(unfused, out.sizes());
}

std::tuple<Tensor, Tensor> roi_dynamic_conv_backward_cuda(
    const Tensor& grad, const std::vector<Tensor>& features, const Tensor& boxes,
    const Tensor& parameters, const Tensor& norm1_weight, const Tensor& norm1_bias,
    const Tensor& norm2_weight, const Tensor& norm2_bias, const std::vector<int64_t>& strides,
    int64_t output_size, int64_t sampling_ratio, const std::string& level_rule, double eps,
    bool allow_tf32, bool deterministic, const Tensor& grad_cells) {
  const Inputs inputs =
      parse(features, boxes, parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias,
            strides, output_size, sampling_ratio, level_rule, eps, allow_tf32);
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
        inputs,
        {dense_grad.const_data_ptr<T>(), grad_parameters.mutable_data_ptr<T>(),
         grad_norms.mutable_data_ptr<A>()},
        {scattered ? grad_cells.mutable_data_ptr<A>() : nullptr,
         wanted && !scattered ? grad_rois.mutable_data_ptr<T>() : nullptr},
        current_stream(boxes));
  });
  if (!fused) {
    const Tensor rois = inputs.pooled();
    const Tensor flat = torch::stable::view(dense_grad, rois.sizes());
    std::tie(grad_rois, grad_parameters, grad_norms) =
        dynamic_conv_backward_cuda(flat, rois, parameters, norm1_weight, norm1_bias, norm2_weight,
                                   norm2_bias, eps, allow_tf32);
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
