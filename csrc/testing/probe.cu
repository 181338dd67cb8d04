// Operators that show what one function of common/cuda.cuh does, for tests/emulator. Built by nvcc
// into a library of their own they would show the same of a GPU.
#include "common/check.h"
#include "common/cuda.cuh"

#include <torch/csrc/stable/ops.h>

#include <string>

namespace sparse_rcnn {
namespace {

using torch::stable::new_empty;

// Fragments as they lie in registers: a [32, 4], b [32, 2] of int32, d [32, 4] of float32.
template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const float* d, float* out) {
  const int lane = threadIdx.x;
  uint32_t own_a[4], own_b[2];
  float own_d[4];
  for (int r = 0; r < 4; ++r) own_a[r] = a[lane * 4 + r];
  for (int r = 0; r < 2; ++r) own_b[r] = b[lane * 2 + r];
  for (int r = 0; r < 4; ++r) own_d[r] = d[lane * 4 + r];
  if constexpr (std::is_same_v<T, float>) {
    mma_m16n8k8_tf32(own_d, own_a, own_b);
  } else {
    mma_m16n8k16<T>(own_d, own_a, own_b);
  }
  for (int r = 0; r < 4; ++r) out[lane * 4 + r] = own_d[r];
}

Tensor mma(Tensor a, Tensor b, Tensor d, std::string type) {
  check_shape("a", a, {32, 4});
  check_shape("b", b, {32, 2});
  check_shape("d", d, {32, 4});
  Tensor out = new_empty(d, {32, 4});
  const auto kernel = type == "bfloat16"  ? mma_kernel<bfloat16>
                      : type == "float16" ? mma_kernel<float16>
                                          : mma_kernel<float>;
  launch(kernel, 1, kWarp, 0, current_stream(a), static_cast<const uint32_t*>(a.const_data_ptr()),
         static_cast<const uint32_t*>(b.const_data_ptr()), d.const_data_ptr<float>(),
         out.mutable_data_ptr<float>());
  return out;
}

// Loads from `memory` [n] int16, copied to shared memory; lane l gives the address of row[l].
template <int Matrices, bool Transposed>
__global__ void ldmatrix_kernel(const int16_t* memory, int64_t size, const int32_t* row,
                                uint32_t* out) {
  int16_t* shared = dynamic_shared<int16_t>();
  for (int64_t i = threadIdx.x; i < size; i += kWarp) shared[i] = memory[i];
  __syncthreads();
  uint32_t r[Matrices];
  const int16_t* address = shared + row[threadIdx.x];
  if constexpr (Matrices == 4) {
    Transposed ? ldmatrix_x4_trans(r, address) : ldmatrix_x4(r, address);
  } else {
    Transposed ? ldmatrix_x2_trans(r, address) : ldmatrix_x2(r, address);
  }
  for (int j = 0; j < Matrices; ++j) out[threadIdx.x * Matrices + j] = r[j];
}

Tensor ldmatrix(Tensor memory, Tensor row, int64_t matrices, bool transposed) {
  check_shape("row", row, {32});
  Tensor out = new_empty(row, {32, matrices});
  const auto by_four = transposed ? ldmatrix_kernel<4, true> : ldmatrix_kernel<4, false>;
  const auto by_two = transposed ? ldmatrix_kernel<2, true> : ldmatrix_kernel<2, false>;
  const auto kernel = matrices == 4 ? by_four : by_two;
  launch(kernel, 1, kWarp, memory.numel() * sizeof(int16_t), current_stream(memory),
         memory.const_data_ptr<int16_t>(), memory.numel(), row.const_data_ptr<int32_t>(),
         static_cast<uint32_t*>(out.mutable_data_ptr()));
  return out;
}

// out[i] = the bits of x[i] after a conversion: to_tf32, or pack2 of x[i] and x[i + 1].
__global__ void convert_kernel(const float* x, int64_t size, int to, uint32_t* out) {
  for (int64_t i = threadIdx.x; i < size; i += kWarp) {
    const float next = x[(i + 1) % size];
    out[i] = to == 0   ? to_tf32(x[i])
             : to == 1 ? pack2<bfloat16>(x[i], next)
                       : pack2<float16>(x[i], next);
  }
}

Tensor convert(Tensor x, std::string type) {
  Tensor out = torch::stable::new_empty(x, {x.numel()}, ScalarType::Int);
  launch(convert_kernel, 1, kWarp, 0, current_stream(x), x.const_data_ptr<float>(), x.numel(),
         type == "tf32" ? 0 : type == "bfloat16" ? 1 : 2,
         static_cast<uint32_t*>(out.mutable_data_ptr()));
  return out;
}

// x [blocks, threads] -> [6, blocks, threads]: the sums of 8 lanes, of the warp and of the block,
// the warp's maximum, the value of lane 5, and 2 * all + any of x > 0 in the warp.
template <class T>
__global__ void reduce_kernel(const T* x, T* out, int64_t plane) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const T value = x[i];
  out[i] = warp_sum<8>(value);
  out[plane + i] = warp_sum(value);
  out[2 * plane + i] = block_sum(value);
  out[3 * plane + i] = warp_max(value);
  out[4 * plane + i] = shfl(value, 5);
  out[5 * plane + i] = T(2 * warp_all(value > T(0)) + warp_any(value > T(0)));
}

Tensor reduce(Tensor x) {
  Tensor out = new_empty(x, {6, x.size(0), x.size(1)});
  const dim3 grid(static_cast<unsigned>(x.size(0))), block(static_cast<unsigned>(x.size(1)));
  if (x.scalar_type() == ScalarType::Double) {
    launch(reduce_kernel<double>, grid, block, 0, current_stream(x), x.const_data_ptr<double>(),
           out.mutable_data_ptr<double>(), x.numel());
  } else {
    launch(reduce_kernel<float>, grid, block, 0, current_stream(x), x.const_data_ptr<float>(),
           out.mutable_data_ptr<float>(), x.numel());
  }
  return out;
}

// The 256 bytes of x, from byte `offset`, through vectors of `bytes`: out = x.
template <int Bytes>
__global__ void vector_kernel(const uint8_t* x, uint8_t* out) {
  for (int i = threadIdx.x * Bytes; i < 256; i += kWarp * Bytes) {
    const Vec<uint8_t, Bytes> once = load_vec_const<Bytes>(x + i);
    store_vec(out + i, once);
    store_vec(out + i, load_vec<Bytes>(out + i));
  }
}

Tensor copy_by_vectors(Tensor x, int64_t bytes, int64_t offset) {
  Tensor out = new_empty(x, {256});
  const auto kernel = bytes == 2   ? vector_kernel<2>
                      : bytes == 4 ? vector_kernel<4>
                      : bytes == 8 ? vector_kernel<8>
                      : bytes == 16 ? vector_kernel<16>
                                    : vector_kernel<64>;
  STD_TORCH_CHECK(x.numel() >= 256 + offset, "x: expected 256 bytes from offset ", offset);
  launch(kernel, 1, kWarp, 0, current_stream(x), x.const_data_ptr<uint8_t>() + offset,
         out.mutable_data_ptr<uint8_t>());
  return out;
}

// total [4] += x [n, 4] summed over n, by red_add4 or four red_add.
__global__ void red_kernel(const float* x, int64_t rows, bool by_four, float* total) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const float* v = x + row * 4;
  if (by_four) {
    red_add4(total, v[0], v[1], v[2], v[3]);
  } else {
    for (int i = 0; i < 4; ++i) red_add(total + i, v[i]);
  }
}

void red(Tensor x, bool by_four, Tensor total) {
  check_shape("x", x, {-1, 4});
  check_shape("total", total, {4});
  launch(red_kernel, dim3(static_cast<unsigned>(ceil_div(x.size(0), 64))), 64, 0, current_stream(x),
         x.const_data_ptr<float>(), x.size(0), by_four, total.mutable_data_ptr<float>());
}

// A pipeline of two stages over x [blocks, tiles, 256] of float32, tile after tile through shared
// memory: the sum over tiles, of those before `valid`; the others are filled with zeros.
__global__ void pipeline_kernel(const float* x, int tiles, int valid, float* out) {
  float* stage = dynamic_shared<float>();  // [2][256]
  const int t = threadIdx.x;
  const float* source = x + static_cast<int64_t>(blockIdx.x) * tiles * 256;
  const auto start = [&](int tile) {
    const int place = t * 4;
    if (tile < tiles) {
      cp_async_16(stage + tile % 2 * 256 + place, source + tile * 256 + place, tile < valid);
    }
    cp_async_commit();
  };
  float sum[4] = {};
  start(0);
  for (int tile = 0; tile < tiles; ++tile) {
    start(tile + 1);
    cp_async_wait<1>();
    __syncthreads();
    for (int i = 0; i < 4; ++i) sum[i] += stage[tile % 2 * 256 + i * 64 + t];
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) out[blockIdx.x * 256 + i * 64 + t] = sum[i];
}

Tensor pipeline(Tensor x, int64_t valid) {
  check_shape("x", x, {-1, -1, 256});
  Tensor out = new_empty(x, {x.size(0), 256});
  launch(pipeline_kernel, dim3(static_cast<unsigned>(x.size(0))), 64, 2 * 256 * sizeof(float),
         current_stream(x), x.const_data_ptr<float>(), static_cast<int>(x.size(1)),
         static_cast<int>(valid), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace
}  // namespace sparse_rcnn

#ifdef SPARSE_RCNN_EMULATED
STABLE_TORCH_LIBRARY_FRAGMENT(sparse_rcnn_emulated, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(sparse_rcnn, m) {
#endif
  m.def("probe_mma(Tensor a, Tensor b, Tensor d, str type) -> Tensor");
  m.def("probe_ldmatrix(Tensor memory, Tensor row, int matrices, bool transposed) -> Tensor");
  m.def("probe_convert(Tensor x, str type) -> Tensor");
  m.def("probe_reduce(Tensor x) -> Tensor");
  m.def("probe_vectors(Tensor x, int bytes, int offset) -> Tensor");
  m.def("probe_red(Tensor x, bool by_four, Tensor(a!) total) -> ()");
  m.def("probe_pipeline(Tensor x, int valid) -> Tensor");
}

SPARSE_RCNN_CUDA_IMPL(m) {
  m.impl("probe_mma", TORCH_BOX(&sparse_rcnn::mma));
  m.impl("probe_ldmatrix", TORCH_BOX(&sparse_rcnn::ldmatrix));
  m.impl("probe_convert", TORCH_BOX(&sparse_rcnn::convert));
  m.impl("probe_reduce", TORCH_BOX(&sparse_rcnn::reduce));
  m.impl("probe_vectors", TORCH_BOX(&sparse_rcnn::copy_by_vectors));
  m.impl("probe_red", TORCH_BOX(&sparse_rcnn::red));
  m.impl("probe_pipeline", TORCH_BOX(&sparse_rcnn::pipeline));
}
