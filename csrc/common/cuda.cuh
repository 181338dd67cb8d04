// What every CUDA kernel here starts from: registration, launching, element types, vector access,
// shared memory and reductions. Tensor-core and copy instructions come from cuda_primitives.cuh.
//
// A .cu file is compiled twice: by nvcc, and by g++ with SPARSE_RCNN_EMULATED, when the kernels run
// on the CPU (csrc/testing). It therefore keeps to three rules: shared memory is declared through
// SPARSE_RCNN_SHARED and dynamic_shared(), kernels are launched by launch(), and PTX is written
// nowhere but in cuda_primitives.cuh. Blocks have a multiple of 32 threads, and every thread of a
// block (of a warp) takes part in its barriers and reductions: none has returned before.
#pragma once

#ifdef SPARSE_RCNN_EMULATED
#include "../testing/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

// SPARSE_RCNN_CUDA_IMPL(m) { m.impl("op", TORCH_BOX(&op_cuda)); } at the bottom of a .cu file.
#ifdef SPARSE_RCNN_EMULATED
#define SPARSE_RCNN_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn_emulated, CPU, m)
#else
#define SPARSE_RCNN_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CUDA, m)
#endif

// SPARSE_RCNN_SHARED(float, row, 64); declares `row`, an array of 64 floats shared by the block. A
// type with a comma needs a name of its own first. The emulator's definition poisons and fences it.
#ifndef SPARSE_RCNN_EMULATED
#define SPARSE_RCNN_SHARED(type, name, size) __shared__ type name[size]
#endif

namespace sparse_rcnn {

using bfloat16 = torch::headeronly::BFloat16;
using float16 = torch::headeronly::Half;

// ------------------------------------------------------------------------------------------------
// Host side
// ------------------------------------------------------------------------------------------------

#ifdef SPARSE_RCNN_EMULATED
inline cudaStream_t current_stream(const torch::stable::Tensor&) { return nullptr; }

struct DeviceGuard {
  explicit DeviceGuard(const torch::stable::Tensor&) {}
};
#else
inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes the tensor's device the current one for as long as it lives: first line of an operator.
class DeviceGuard {
 public:
  explicit DeviceGuard(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void check_cuda(cudaError_t error, const char* what, dim3 grid, dim3 block, size_t shared) {
  STD_TORCH_CHECK(error == cudaSuccess, what, " failed: ", cudaGetErrorString(error), " (grid ",
                  grid.x, "x", grid.y, "x", grid.z, ", block ", block.x, "x", block.y, "x", block.z,
                  ", ", shared, " bytes of dynamic shared memory)");
}
#endif

// Runs kernel(args...) over the grid; an empty grid is no work, not an error. An error of an
// earlier, asynchronous kernel may also surface here, as everywhere in CUDA.
template <class... Params>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, std::type_identity_t<Params>... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef SPARSE_RCNN_EMULATED
  (void)stream;
  emulator::run_grid(grid, block, shared_bytes, [&] { kernel(args...); });
#else
  constexpr size_t kWithoutOptIn = 48 * 1024;
  if (shared_bytes > kWithoutOptIn) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "asking for shared memory", grid, block, shared_bytes);
  }
  kernel<<<grid, block, shared_bytes, stream>>>(args...);
  check_cuda(cudaGetLastError(), "kernel launch", grid, block, shared_bytes);
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ------------------------------------------------------------------------------------------------
// Element types: sums are kept in acc_t<T>
// ------------------------------------------------------------------------------------------------

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
__device__ __forceinline__ acc_t<T> to_acc(T value) {
  return static_cast<acc_t<T>>(value);
}

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_acc(acc_t<T> value) {
  return static_cast<T>(value);
}

// ------------------------------------------------------------------------------------------------
// Vector access
// ------------------------------------------------------------------------------------------------

// N elements that are read or written together: one access when they fill 2, 4, 8 or 16 bytes,
// else as many 16-byte ones as they need. The address must be a multiple of the alignment.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  static_assert(N > 0 && (N & (N - 1)) == 0, "a power of two");
  T data[N];

  __host__ __device__ T& operator[](int i) { return data[i]; }
  __host__ __device__ const T& operator[](int i) const { return data[i]; }
};

// Elements in one 16-byte access.
template <class T>
inline constexpr int kVecWidth = 16 / sizeof(T);

namespace detail {

template <size_t Bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// The machine word that a Vec travels in, and how many of them.
template <class V>
using Word = typename WordOf<(sizeof(V) < 16 ? sizeof(V) : 16)>::type;
template <class V>
inline constexpr int kWords = sizeof(V) / sizeof(Word<V>);

template <class V>
__device__ __forceinline__ void check_alignment(const void* address) {
#ifdef SPARSE_RCNN_EMULATED
  emulator::check_alignment(address, alignof(V));
#else
  (void)address;
#endif
}

}  // namespace detail

template <int N, class T>
__device__ __forceinline__ Vec<T, N> load_vec(const T* address) {
  using V = Vec<T, N>;
  detail::check_alignment<V>(address);
  V value;
#pragma unroll
  for (int k = 0; k < detail::kWords<V>; ++k) {
    detail::Word<V> word = reinterpret_cast<const detail::Word<V>*>(address)[k];
    memcpy(reinterpret_cast<char*>(&value) + k * sizeof(word), &word, sizeof(word));
  }
  return value;
}

// load_vec() of global memory that nothing writes while the kernel runs: the read-only path.
template <int N, class T>
__device__ __forceinline__ Vec<T, N> load_vec_const(const T* address) {
  using V = Vec<T, N>;
  detail::check_alignment<V>(address);
  V value;
#pragma unroll
  for (int k = 0; k < detail::kWords<V>; ++k) {
    detail::Word<V> word = __ldg(reinterpret_cast<const detail::Word<V>*>(address) + k);
    memcpy(reinterpret_cast<char*>(&value) + k * sizeof(word), &word, sizeof(word));
  }
  return value;
}

template <class T, int N>
__device__ __forceinline__ void store_vec(T* address, const Vec<T, N>& value) {
  using V = Vec<T, N>;
  detail::check_alignment<V>(address);
#pragma unroll
  for (int k = 0; k < detail::kWords<V>; ++k) {
    detail::Word<V> word;
    memcpy(&word, reinterpret_cast<const char*>(&value) + k * sizeof(word), sizeof(word));
    reinterpret_cast<detail::Word<V>*>(address)[k] = word;
  }
}

// ------------------------------------------------------------------------------------------------
// Shared memory, warps and blocks
// ------------------------------------------------------------------------------------------------

// The block's dynamic shared memory, `shared_bytes` of launch(), aligned to 128 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef SPARSE_RCNN_EMULATED
  return static_cast<T*>(emulator::dynamic_shared());
#else
  extern __shared__ __align__(128) unsigned char sparse_rcnn_dynamic_shared[];
  return reinterpret_cast<T*>(sparse_rcnn_dynamic_shared);
#endif
}

inline constexpr int kWarp = 32;
inline constexpr unsigned kWholeWarp = 0xffffffffu;

// The value of lane `lane`.
template <class T>
__device__ __forceinline__ T shfl(T value, int lane) {
  return __shfl_sync(kWholeWarp, value, lane);
}

// The value of lane (own lane ^ mask).
template <class T>
__device__ __forceinline__ T shfl_xor(T value, int mask) {
  return __shfl_xor_sync(kWholeWarp, value, mask);
}

__device__ __forceinline__ bool warp_all(bool predicate) {
  return __all_sync(kWholeWarp, predicate);
}

__device__ __forceinline__ bool warp_any(bool predicate) {
  return __any_sync(kWholeWarp, predicate);
}

// Sum over groups of Width adjacent lanes (a power of two), the same bits in each lane of a group.
template <int Width = kWarp, class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int mask = Width / 2; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  return value;
}

// Maximum over groups of Width adjacent lanes; which operand a NaN leaves is not specified.
template <int Width = kWarp, class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int mask = Width / 2; mask > 0; mask /= 2) {
    const T other = shfl_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// Sum over the block (one-dimensional), the same bits in every thread. Two barriers, one on entry:
// calls may follow each other.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  SPARSE_RCNN_SHARED(T, partial, kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  value = warp_sum(value);
  __syncthreads();
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  return warp_sum(lane < static_cast<int>(blockDim.x) / kWarp ? partial[lane] : T(0));
}

}  // namespace sparse_rcnn

#ifdef SPARSE_RCNN_EMULATED
#include "../testing/emulated_primitives.h"
#else
#include "cuda_primitives.cuh"
#endif
