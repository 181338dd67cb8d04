// The dynamic interaction on the GPU: what dynamic_conv and roi_dynamic_conv share. The kernels are
// in dynamic_conv_forward.cuh and dynamic_conv_backward.cuh (tensor cores) and in
// dynamic_conv_simt.cuh (any size and type).
//
//   hidden = relu(norm1(x W1)),  out = relu(norm2(hidden W2)),  x [P, C], W1 [C, D], W2 [D, C]
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>

#include "common/check.h"
#include "common/cuda.cuh"

namespace sparse_rcnn {

// ------------------------------------------------------------------------------------------------
// Device side
// ------------------------------------------------------------------------------------------------

template <class T>
struct DynamicConvArgs {
  const T* parameters;           // [R, 2 C D]
  const acc_t<T>* norm1_weight;  // [D]
  const acc_t<T>* norm1_bias;    // [D]
  const acc_t<T>* norm2_weight;  // [C]
  const acc_t<T>* norm2_bias;    // [C]
  int64_t rois;                  // R
  int bins;                      // P
  int channels;                  // C
  int inner;                     // D
  acc_t<T> eps;
};

template <class T>
struct DynamicConvGrads {
  const T* grad;         // [R, P, C]
  T* grad_parameters;    // [R, 2 C D]
  acc_t<T>* grad_norms;  // [R, 2 D + 2 C]: norm1 weight, bias, norm2 weight, bias
};

__device__ __forceinline__ float inverse_sqrt(float value) { return rsqrtf(value); }
__device__ __forceinline__ double inverse_sqrt(double value) { return rsqrt(value); }

// Of NaN, NaN, as torch.relu.
template <class A>
__device__ __forceinline__ A relu(A value) {
  return value < A(0) ? A(0) : value;
}

// ------------------------------------------------------------------------------------------------
// Host side
// ------------------------------------------------------------------------------------------------

// What every architecture gives a block, less what the system takes of it.
inline constexpr size_t kSharedLimit = 99 * 1024;

template <class N>
__host__ __device__ constexpr N larger(N a, N b) {
  return a > b ? a : b;
}

template <class T>
inline constexpr bool kTensorCoreType = std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>;

// Whether the tensor-core kernels are made for these sizes.
inline bool suits_tensor_cores(int64_t bins, int64_t channels, int64_t inner) {
  return bins >= 1 && bins <= 64 && channels >= 16 && channels <= 256 && channels % 16 == 0 &&
         inner >= 16 && inner <= 64 && inner % 16 == 0;
}

// The sizes of the released models, for which the tensor-core kernels are compiled a second time.
template <class T>
bool is_usual_size(const DynamicConvArgs<T>& args) {
  return args.channels == 256 && args.inner == 64;
}

inline dim3 one_block_a_roi(int64_t rois) { return dim3(static_cast<unsigned>(rois)); }

// Contiguous, and on a 16-byte boundary, which a view need not be.
inline Tensor aligned(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  const auto address = reinterpret_cast<uintptr_t>(dense.const_data_ptr());
  return address % 16 == 0 ? dense : torch::stable::clone(dense);
}

// Checked operands of an interaction, without the RoI features.
struct DynamicConvInputs {
  Tensor parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias;
  int64_t rois, bins, channels, inner;
  ScalarType dtype;

  template <class T>
  DynamicConvArgs<T> args(double eps) const {
    using A = acc_t<T>;
    return {parameters.const_data_ptr<T>(), norm1_weight.const_data_ptr<A>(),
            norm1_bias.const_data_ptr<A>(), norm2_weight.const_data_ptr<A>(),
            norm2_bias.const_data_ptr<A>(), rois,
            static_cast<int>(bins),         static_cast<int>(channels),
            static_cast<int>(inner),        static_cast<A>(eps)};
  }
  Tensor new_grad_norms() const {
    return torch::stable::new_empty(parameters, {rois, 2 * (inner + channels)},
                                    accumulation_type(dtype));
  }
};

// `like` is on the device, and of the dtype, that all have in common.
inline DynamicConvInputs parse_dynamic_conv(const Tensor& like, int64_t rois, int64_t bins,
                                            int64_t channels, const Tensor& parameters,
                                            const Tensor& norm1_weight, const Tensor& norm1_bias,
                                            const Tensor& norm2_weight, const Tensor& norm2_bias) {
  check_shape("norm1_weight", norm1_weight, {-1});
  const int64_t inner = norm1_weight.size(0);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(rois <= kMost && bins <= kMost && channels <= kMost / 2 && inner <= kMost / 2,
                  "roi_features: expected sizes below 2^31, got R = ", rois, ", P = ", bins,
                  ", C = ", channels, ", D = ", inner);
  check_shape("parameters", parameters, {rois, 2 * channels * inner});
  check_shape("norm1_bias", norm1_bias, {inner});
  check_shape("norm2_weight", norm2_weight, {channels});
  check_shape("norm2_bias", norm2_bias, {channels});
  check_dtype("parameters", parameters, like.scalar_type());
  check_same_device("parameters", parameters, like);
  const auto norm = [&](const char* name, const Tensor& tensor) {
    check_dtype(name, tensor, accumulation_type(like.scalar_type()));
    check_same_device(name, tensor, like);
    return aligned(tensor);
  };
  return {aligned(parameters),
          norm("norm1_weight", norm1_weight),
          norm("norm1_bias", norm1_bias),
          norm("norm2_weight", norm2_weight),
          norm("norm2_bias", norm2_bias),
          rois,
          bins,
          channels,
          inner,
          like.scalar_type()};
}

// Calls body(T{}) for the element type T of `dtype`.
template <class Body>
void with_element_type(const char* name, ScalarType dtype, Body body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(bfloat16{});
    case ScalarType::Half:
      return body(float16{});
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(dtype));
  }
}

// The operators, for roi_dynamic_conv where it is not fused.
Tensor dynamic_conv_cuda(const Tensor& roi_features, const Tensor& parameters,
                         const Tensor& norm1_weight, const Tensor& norm1_bias,
                         const Tensor& norm2_weight, const Tensor& norm2_bias, double eps);
std::tuple<Tensor, Tensor, Tensor> dynamic_conv_backward_cuda(
    const Tensor& grad, const Tensor& roi_features, const Tensor& parameters,
    const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& norm2_weight,
    const Tensor& norm2_bias, double eps);

}  // namespace sparse_rcnn
