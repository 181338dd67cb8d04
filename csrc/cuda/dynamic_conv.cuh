// The dynamic interaction on the GPU: what dynamic_conv and roi_dynamic_conv share. The kernels are
// in dynamic_conv_forward.cuh and dynamic_conv_backward.cuh (tensor cores) and in
// dynamic_conv_simt.cuh (any size and type).
//
//   hidden = relu(norm1(x W1)),  out = relu(norm2(hidden W2)),  x [P, C], W1 [C, D], W2 [D, C]
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/cuda.cuh"
#include "common/dynamic_conv_args.h"

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

// float is taken in TF32.
template <class T>
inline constexpr bool kTensorCoreType = !std::is_same_v<T, double>;

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

// Operands as the kernels want them, and what is the same for both directions.
struct DynamicConvInputs : DynamicConvOperands {
  double eps;
  bool allow_tf32;

  DynamicConvInputs(const DynamicConvOperands& operands, double eps_, bool allow_tf32_)
      : DynamicConvOperands(operands), eps(eps_), allow_tf32(allow_tf32_) {
    parameters = aligned(parameters);
    for (Tensor& norm : norms) norm = aligned(norm);
  }

  template <class T>
  DynamicConvArgs<T> args() const {
    const auto norm = [&](int index) { return norms[index].const_data_ptr<acc_t<T>>(); };
    return {.parameters = parameters.const_data_ptr<T>(),
            .norm1_weight = norm(0),
            .norm1_bias = norm(1),
            .norm2_weight = norm(2),
            .norm2_bias = norm(3),
            .rois = rois,
            .bins = static_cast<int>(sizes.bins),
            .channels = static_cast<int>(sizes.channels),
            .inner = static_cast<int>(sizes.inner),
            .eps = static_cast<acc_t<T>>(eps)};
  }

  // Whether the tensor-core kernels may take it, and are made for these sizes.
  bool suits_tensor_cores() const {
    const auto [P, C, D] = sizes;
    return (dtype != ScalarType::Float || allow_tf32) && P >= 1 && P <= 64 && C >= 16 && C <= 256 &&
           C % 16 == 0 && D >= 16 && D <= 64 && D % 16 == 0;
  }
};

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
                         const Tensor& norm2_weight, const Tensor& norm2_bias, double eps,
                         bool allow_tf32);
std::tuple<Tensor, Tensor, Tensor> dynamic_conv_backward_cuda(
    const Tensor& grad, const Tensor& roi_features, const Tensor& parameters,
    const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& norm2_weight,
    const Tensor& norm2_bias, double eps, bool allow_tf32);

}  // namespace sparse_rcnn
