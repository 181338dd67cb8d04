// Kernels with one mistake each, and without it: the emulator must tell them apart
// (tests/emulator/test_planted.py).
#include "common/check.h"
#include "common/cuda.cuh"

#include <torch/csrc/stable/ops.h>

#include <map>
#include <string>

namespace sparse_rcnn {
namespace {

constexpr int kThreads = 128;

// All kernels: x [blocks, 128] -> out[i] = 2 * x[i + 1], the last of a block taking the first.
using Kernel = void (*)(const float* x, float* out);

__device__ int own() { return blockIdx.x * kThreads + threadIdx.x; }
__device__ int neighbour() { return (threadIdx.x + 1) % kThreads; }

template <bool Right>
__global__ void barrier_between_write_and_read(const float* x, float* out) {
  SPARSE_RCNN_SHARED(float, row, kThreads);
  row[threadIdx.x] = x[own()];
  if (Right) __syncthreads();
  out[own()] = 2 * row[neighbour()];
}

// Two rounds through one array: a thread may refill it only after all have read it.
template <bool Right>
__global__ void barrier_before_reuse(const float* x, float* out) {
  SPARSE_RCNN_SHARED(float, row, kThreads);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    const float scale = round == 0 ? 1.0f : 4.0f;
    row[threadIdx.x] = x[own()] * scale;
    __syncthreads();
    sum += row[neighbour()] / scale;
    if (Right) __syncthreads();
  }
  out[own()] = sum;
}

// Lanes see what other lanes of the warp wrote only after __syncwarp().
template <bool Right>
__global__ void barrier_in_warp(const float* x, float* out) {
  SPARSE_RCNN_SHARED(float, row, kThreads);
  row[threadIdx.x] = x[own()];
  __syncthreads();
  const float value = row[((threadIdx.x ^ 1) + 1) % kThreads];
  __syncthreads();
  row[threadIdx.x ^ 1] = value;
  if (Right) __syncwarp();
  out[own()] = 2 * row[threadIdx.x];
}

// A lane of another warp must not be read before a barrier of the block: __syncwarp() is too weak.
template <bool Right>
__global__ void barrier_of_block_not_warp(const float* x, float* out) {
  SPARSE_RCNN_SHARED(float, row, kThreads);
  row[threadIdx.x] = x[own()];
  Right ? __syncthreads() : __syncwarp();
  out[own()] = 2 * row[neighbour()];
}

template <bool Right>
__global__ void all_elements_written(const float* x, float* out) {
  float* row = dynamic_shared<float>();
  if (Right || threadIdx.x > 0) row[threadIdx.x] = x[own()];
  __syncthreads();
  out[own()] = 2 * row[neighbour()];
}

template <bool Right>
__global__ void dynamic_write_in_bounds(const float* x, float* out) {
  float* row = dynamic_shared<float>();
  row[threadIdx.x + (Right ? 0 : 1)] = x[own()];
  if (threadIdx.x == 0) row[0] = x[own()];
  __syncthreads();
  out[own()] = Right ? 2 * row[neighbour()] : 2 * x[blockIdx.x * kThreads + neighbour()];
}

template <bool Right>
__global__ void static_write_in_bounds(const float* x, float* out) {
  SPARSE_RCNN_SHARED(float, row, kThreads);
  row[threadIdx.x + (Right ? 0 : 1)] = x[own()];
  if (threadIdx.x == 0) row[0] = x[own()];
  __syncthreads();
  out[own()] = Right ? 2 * row[neighbour()] : 2 * x[blockIdx.x * kThreads + neighbour()];
}

template <bool Right>
__global__ void copy_waited_for(const float* x, float* out) {
  float* row = dynamic_shared<float>();
  if (threadIdx.x < kThreads / 4) {
    cp_async_16(row + threadIdx.x * 4, x + blockIdx.x * kThreads + threadIdx.x * 4, true);
    cp_async_commit();
    if (Right) cp_async_wait<0>();
  }
  __syncthreads();
  out[own()] = 2 * row[neighbour()];
}

// cp_async_wait() waits for groups: a copy in none is not waited for.
template <bool Right>
__global__ void copy_committed(const float* x, float* out) {
  float* row = dynamic_shared<float>();
  if (threadIdx.x < kThreads / 4) {
    cp_async_16(row + threadIdx.x * 4, x + blockIdx.x * kThreads + threadIdx.x * 4, true);
    if (Right) cp_async_commit();
    cp_async_wait<0>();
  }
  __syncthreads();
  out[own()] = 2 * row[neighbour()];
}

// Waiting makes the data visible to the waiting thread, the barrier after it to the others.
template <bool Right>
__global__ void copy_waited_for_before_barrier(const float* x, float* out) {
  float* row = dynamic_shared<float>();
  if (threadIdx.x < kThreads / 4) {
    cp_async_16(row + threadIdx.x * 4, x + blockIdx.x * kThreads + threadIdx.x * 4, true);
    cp_async_commit();
  }
  if (Right) cp_async_wait<0>();
  __syncthreads();
  if (!Right) cp_async_wait<0>();
  out[own()] = 2 * row[neighbour()];
}

template <bool Right>
__global__ void barrier_reached_by_all(const float* x, float* out) {
  SPARSE_RCNN_SHARED(float, row, kThreads);
  row[threadIdx.x] = x[own()];
  if (Right || threadIdx.x < 100) __syncthreads();
  out[own()] = 2 * x[blockIdx.x * kThreads + neighbour()];
}

template <bool Right>
__global__ void barrier_the_same_for_all(const float* x, float* out) {
  SPARSE_RCNN_SHARED(float, row, kThreads);
  row[threadIdx.x] = x[own()];
  if (Right || threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[own()] = 2 * row[neighbour()];
}

template <bool Right>
__global__ void shuffle_reached_by_all(const float* x, float* out) {
  const float first = x[own()];
  float other = 0;
  if (Right || threadIdx.x % 32 != 7) other = shfl(first, (threadIdx.x + 1) % 32);
  const bool last = threadIdx.x % 32 == 31;
  out[own()] = 2 * (last ? x[blockIdx.x * kThreads + neighbour()] : other);
}

template <bool Right>
__global__ void shared_address_aligned(const float* x, float* out) {
  float* row = dynamic_shared<float>();
  row[threadIdx.x] = x[own()];
  __syncthreads();
  uint32_t r[2];
  ldmatrix_x2(r, row + (Right ? 4 : 2) * (threadIdx.x % 16));
  out[own()] = 2 * row[neighbour()];
}

// Right in every order of whole threads, as the emulator runs them, but not on a GPU.
template <bool Right>
__global__ void additions_are_atomic(const float* x, float* out) {
  float* const cells[] = {out + own(), out + own() - 1 + (threadIdx.x == 0 ? kThreads : 0)};
  const float terms[] = {x[blockIdx.x * kThreads + neighbour()], x[own()]};
  *cells[0] = 0;
  __syncthreads();
  for (int i = 0; i < 2; ++i) {
    if (Right) {
      red_add(cells[i], terms[i]);
    } else {
      *cells[i] += terms[i];
    }
  }
}

// Two blocks write one cell; they happen to write the same.
template <bool Right>
__global__ void a_cell_has_one_block(const float* x, float* out) {
  out[own()] = 2 * x[blockIdx.x * kThreads + neighbour()];
  const int next = (blockIdx.x + 1) % gridDim.x * kThreads;
  if (!Right && threadIdx.x == 0) out[next] = 2 * x[next + 1];
}

#define SPARSE_RCNN_PLANTED(name) {#name, {name<false>, name<true>}}
const std::map<std::string, std::pair<Kernel, Kernel>>& kernels() {
  static const std::map<std::string, std::pair<Kernel, Kernel>> all = {
      SPARSE_RCNN_PLANTED(barrier_between_write_and_read),
      SPARSE_RCNN_PLANTED(barrier_before_reuse),
      SPARSE_RCNN_PLANTED(barrier_in_warp),
      SPARSE_RCNN_PLANTED(barrier_of_block_not_warp),
      SPARSE_RCNN_PLANTED(all_elements_written),
      SPARSE_RCNN_PLANTED(dynamic_write_in_bounds),
      SPARSE_RCNN_PLANTED(static_write_in_bounds),
      SPARSE_RCNN_PLANTED(copy_waited_for),
      SPARSE_RCNN_PLANTED(copy_committed),
      SPARSE_RCNN_PLANTED(copy_waited_for_before_barrier),
      SPARSE_RCNN_PLANTED(barrier_reached_by_all),
      SPARSE_RCNN_PLANTED(barrier_the_same_for_all),
      SPARSE_RCNN_PLANTED(shuffle_reached_by_all),
      SPARSE_RCNN_PLANTED(shared_address_aligned),
      SPARSE_RCNN_PLANTED(additions_are_atomic),
      SPARSE_RCNN_PLANTED(a_cell_has_one_block),
  };
  return all;
}

Tensor planted(std::string name, bool right, Tensor x) {
  check_shape("x", x, {-1, kThreads});
  const auto found = kernels().find(name);
  STD_TORCH_CHECK(found != kernels().end(), "name: no kernel ", name);
  Tensor out = torch::stable::new_empty(x, {x.size(0), kThreads});
  launch(right ? found->second.second : found->second.first,
         dim3(static_cast<unsigned>(x.size(0))), kThreads, kThreads * sizeof(float),
         current_stream(x), x.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  return out;
}

// Barriers and nothing else, for timing.
__global__ void barriers_kernel(int count, float* out) {
  for (int i = 0; i < count; ++i) __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<float>(count);
}

void barriers(int64_t threads, int64_t count, Tensor out) {
  launch(barriers_kernel, dim3(static_cast<unsigned>(out.numel())),
         dim3(static_cast<unsigned>(threads)), 0, current_stream(out), static_cast<int>(count),
         out.mutable_data_ptr<float>());
}

}  // namespace
}  // namespace sparse_rcnn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_rcnn_emulated, m) {
  m.def("planted(str name, bool right, Tensor x) -> Tensor");
  m.def("planted_barriers(int threads, int count, Tensor(a!) out) -> ()");
}

SPARSE_RCNN_CUDA_IMPL(m) {
  m.impl("planted", TORCH_BOX(&sparse_rcnn::planted));
  m.impl("planted_barriers", TORCH_BOX(&sparse_rcnn::barriers));
}
