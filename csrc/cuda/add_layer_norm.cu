// Residual, LayerNorm and ReLU on the GPU, forward and backward, in one launch each.
//
// Two forms. By warp: rows of at most 1024 channels that are whole 16-byte vectors stay in the
// registers of one warp, `per_lane` values a lane, and are read from memory once. By block: any C,
// and float64; the block reads the row three times, the last two from the caches. The backward
// recomputes the statistics in place of saving them. Its blocks own a part of the rows each and add
// up the part's weight and bias gradients in a fixed order; Python adds up the parts.
//
// Budget (registers; no spills):           shared memory           threads
//   forward by warp    48 / 80 / 136       none                    128, for per_lane = 8 / 16 / 32
//   backward by warp   80 / 128 / 240      8 * C bytes             256
//   by block           64                  256 B                   32 to 256
// budget: add_layer_norm_forward_by_warp_kernel: 136 registers, 0 bytes shared, 128 threads
// budget: add_layer_norm_backward_by_warp_kernel: 240 registers, 8192 bytes shared, 256 threads
// budget: add_layer_norm_forward_by_block_kernel: 64 registers, 256 bytes shared, 256 threads
// budget: add_layer_norm_backward_by_block_kernel: 64 registers, 256 bytes shared, 256 threads
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "common/add_layer_norm_args.h"
#include "common/cuda.cuh"

namespace sparse_rcnn {
namespace {

constexpr int kForwardThreads = 128;
constexpr int kBackwardThreads = 256;
constexpr int kBlockThreads = 256;  // at most, by block
constexpr int kBackwardWarps = kBackwardThreads / kWarp;
constexpr int kMostChannelsOfWarp = 1024;

// What both directions read. C is the row's length, `residual` may be null.
template <class T>
struct Rows {
  const T* x;
  const T* residual;
  const acc_t<T>* weight;
  const acc_t<T>* bias;
  int64_t count;
  int64_t channels;
  acc_t<T> eps;
  bool relu;
};

// max(value, 0) that keeps NaN, as PyTorch's ReLU does.
template <class A>
__device__ __forceinline__ A rectify(A value) {
  return value < A(0) ? A(0) : value;
}

template <class A>
__device__ __forceinline__ A reciprocal_deviation(A squares, int64_t channels, A eps) {
  return A(1) / sqrt(squares / static_cast<A>(channels) + eps);
}

// ------------------------------------------------------------------------------------------------
// By warp. Lane l holds vectors l, l + 32, ... of the row, kVecWidth<T> values each.
// ------------------------------------------------------------------------------------------------

template <class T, int kPerLane>
struct LaneColumns {
  static constexpr int width = kVecWidth<T>;
  static constexpr int vectors = kPerLane / width;
  static_assert(vectors * width == kPerLane);

  __device__ static int column(int vector) {
    return (vector * kWarp + static_cast<int>(threadIdx.x) % kWarp) * width;
  }
};

// Zeros where the row has no channels.
template <int kPerLane, class T, class S>
__device__ __forceinline__ void load_lane(const S* row, int channels,
                                          acc_t<T> (&values)[kPerLane]) {
  using Columns = LaneColumns<T, kPerLane>;
#pragma unroll
  for (int j = 0; j < Columns::vectors; ++j) {
    const int column = Columns::column(j);
    Vec<S, Columns::width> vector = {};
    if (column < channels) vector = load_vec_const<Columns::width>(row + column);
#pragma unroll
    for (int k = 0; k < Columns::width; ++k) {
      values[j * Columns::width + k] = static_cast<acc_t<T>>(vector[k]);
    }
  }
}

template <int kPerLane, class T>
__device__ __forceinline__ void store_lane(const acc_t<T> (&values)[kPerLane], int channels,
                                           T* row) {
  using Columns = LaneColumns<T, kPerLane>;
#pragma unroll
  for (int j = 0; j < Columns::vectors; ++j) {
    const int column = Columns::column(j);
    Vec<T, Columns::width> vector;
#pragma unroll
    for (int k = 0; k < Columns::width; ++k) {
      vector[k] = from_acc<T>(values[j * Columns::width + k]);
    }
    if (column < channels) store_vec(row + column, vector);
  }
}

// values = the normalised row, before weight and bias; returns the reciprocal of the standard
// deviation.
template <int kPerLane, class T>
__device__ __forceinline__ acc_t<T> normalize_lane(const Rows<T>& rows, int64_t row,
                                                   acc_t<T> (&values)[kPerLane]) {
  using A = acc_t<T>;
  using Columns = LaneColumns<T, kPerLane>;
  const int channels = static_cast<int>(rows.channels);
  load_lane<kPerLane, T>(rows.x + row * channels, channels, values);
  if (rows.residual != nullptr) {
    A residual[kPerLane];
    load_lane<kPerLane, T>(rows.residual + row * channels, channels, residual);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] += residual[i];
  }
  A sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += values[i];
  const A mean = warp_sum(sum) / static_cast<A>(channels);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    values[i] = Columns::column(i / Columns::width) < channels ? values[i] - mean : A(0);
    squares += values[i] * values[i];
  }
  const A rstd = reciprocal_deviation(warp_sum(squares), rows.channels, rows.eps);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) values[i] *= rstd;
  return rstd;
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kForwardThreads)
    add_layer_norm_forward_by_warp_kernel(Rows<T> rows, T* out) {
  using A = acc_t<T>;
  const int64_t row = (int64_t{blockIdx.x} * kForwardThreads + threadIdx.x) / kWarp;
  if (row >= rows.count) return;  // a whole warp
  const int channels = static_cast<int>(rows.channels);
  A values[kPerLane], weight[kPerLane], bias[kPerLane];
  load_lane<kPerLane, T>(rows.weight, channels, weight);
  load_lane<kPerLane, T>(rows.bias, channels, bias);
  normalize_lane(rows, row, values);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    values[i] = values[i] * weight[i] + bias[i];
    if (rows.relu) values[i] = rectify(values[i]);
  }
  store_lane(values, channels, out + row * channels);
}

// Adds up over the block's warps, one after the other, what each lane holds of weight and bias
// gradients: to [2, C].
template <class T, int kPerLane>
__device__ __forceinline__ void add_up_warps(const acc_t<T> (&grad_weight)[kPerLane],
                                             const acc_t<T> (&grad_bias)[kPerLane], int channels,
                                             acc_t<T>* grad_norm) {
  using A = acc_t<T>;
  using Columns = LaneColumns<T, kPerLane>;
  A* sums = dynamic_shared<A>();  // [2, C]
  const int warp = threadIdx.x / kWarp;
  for (int turn = 0; turn < kBackwardWarps; ++turn) {
    if (turn == warp) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int column = Columns::column(i / Columns::width) + i % Columns::width;
        if (column < channels) {
          sums[column] = grad_weight[i] + (turn == 0 ? A(0) : sums[column]);
          sums[channels + column] = grad_bias[i] + (turn == 0 ? A(0) : sums[channels + column]);
        }
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < 2 * channels; i += kBackwardThreads) grad_norm[i] = sums[i];
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kBackwardThreads)
    add_layer_norm_backward_by_warp_kernel(Rows<T> rows, const T* grad, int64_t part_rows,
                                           T* grad_x, acc_t<T>* grad_norm) {
  using A = acc_t<T>;
  const int channels = static_cast<int>(rows.channels);
  const int64_t begin = blockIdx.x * part_rows, end = min(begin + part_rows, rows.count);
  A grad_weight[kPerLane] = {}, grad_bias[kPerLane] = {};
  for (int64_t row = begin + threadIdx.x / kWarp; row < end; row += kBackwardWarps) {
    A normal[kPerLane], g[kPerLane], weight[kPerLane];
    load_lane<kPerLane, T>(grad + row * channels, channels, g);
    const A rstd = normalize_lane(rows, row, normal);
    load_lane<kPerLane, T>(rows.weight, channels, weight);
    if (rows.relu) {
      A bias[kPerLane];
      load_lane<kPerLane, T>(rows.bias, channels, bias);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        g[i] = normal[i] * weight[i] + bias[i] <= A(0) ? A(0) : g[i];
      }
    }
    A sum = 0, dot = 0;  // of the normalised row's gradient, and of it with the normalised row
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      grad_weight[i] += g[i] * normal[i];
      grad_bias[i] += g[i];
      g[i] *= weight[i];
      sum += g[i];
      dot += g[i] * normal[i];
    }
    const A mean = warp_sum(sum) / static_cast<A>(channels);
    const A slope = warp_sum(dot) / static_cast<A>(channels);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) g[i] = (g[i] - mean - normal[i] * slope) * rstd;
    store_lane(g, channels, grad_x + row * channels);
  }
  add_up_warps<T>(grad_weight, grad_bias, channels, grad_norm + int64_t{blockIdx.x} * 2 * channels);
}

// ------------------------------------------------------------------------------------------------
// By block
// ------------------------------------------------------------------------------------------------

// One row, read anew at every use.
template <class T>
struct BlockRow {
  const T* x;
  const T* residual;
  acc_t<T> mean;
  acc_t<T> rstd;

  __device__ acc_t<T> sum(int64_t c) const {
    return residual == nullptr ? to_acc(x[c]) : to_acc(x[c]) + to_acc(residual[c]);
  }
  __device__ acc_t<T> normal(int64_t c) const { return (sum(c) - mean) * rstd; }
};

template <class T>
__device__ __forceinline__ BlockRow<T> measure_by_block(const Rows<T>& rows, int64_t row) {
  using A = acc_t<T>;
  const int64_t offset = row * rows.channels;
  BlockRow<T> result{rows.x + offset, rows.residual == nullptr ? nullptr : rows.residual + offset,
                     A(0), A(0)};
  A sum = 0, squares = 0;
  for (int64_t c = threadIdx.x; c < rows.channels; c += blockDim.x) sum += result.sum(c);
  result.mean = block_sum(sum) / static_cast<A>(rows.channels);
  for (int64_t c = threadIdx.x; c < rows.channels; c += blockDim.x) {
    const A deviation = result.sum(c) - result.mean;
    squares += deviation * deviation;
  }
  result.rstd = reciprocal_deviation(block_sum(squares), rows.channels, rows.eps);
  return result;
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    add_layer_norm_forward_by_block_kernel(Rows<T> rows, T* out) {
  using A = acc_t<T>;
  const int64_t row = blockIdx.x;
  const BlockRow<T> measured = measure_by_block(rows, row);
  for (int64_t c = threadIdx.x; c < rows.channels; c += blockDim.x) {
    const A value = measured.normal(c) * rows.weight[c] + rows.bias[c];
    out[row * rows.channels + c] = from_acc<T>(rows.relu ? rectify(value) : value);
  }
}

// The gradient that comes in at channel c of the row, after the ReLU's share.
template <class T>
__device__ __forceinline__ acc_t<T> incoming(const Rows<T>& rows, const T* grad, int64_t c,
                                             acc_t<T> normal) {
  using A = acc_t<T>;
  const bool dropped = rows.relu && normal * rows.weight[c] + rows.bias[c] <= A(0);
  return dropped ? A(0) : to_acc(grad[c]);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    add_layer_norm_backward_by_block_kernel(Rows<T> rows, const T* grad, int64_t part_rows,
                                            T* grad_x, acc_t<T>* grad_norm) {
  using A = acc_t<T>;
  const int64_t begin = blockIdx.x * part_rows, end = min(begin + part_rows, rows.count);
  A* grad_weight = grad_norm + blockIdx.x * 2 * rows.channels;  // a channel is one thread's
  A* grad_bias = grad_weight + rows.channels;
  for (int64_t c = threadIdx.x; c < rows.channels; c += blockDim.x) {
    grad_weight[c] = A(0);
    grad_bias[c] = A(0);
  }
  for (int64_t row = begin; row < end; ++row) {
    const BlockRow<T> measured = measure_by_block(rows, row);
    const T* grad_row = grad + row * rows.channels;
    A sum = 0, dot = 0;
    for (int64_t c = threadIdx.x; c < rows.channels; c += blockDim.x) {
      const A normal = measured.normal(c), g = incoming(rows, grad_row, c, normal);
      grad_weight[c] += g * normal;
      grad_bias[c] += g;
      sum += g * rows.weight[c];
      dot += g * rows.weight[c] * normal;
    }
    const A mean = block_sum(sum) / static_cast<A>(rows.channels);
    const A slope = block_sum(dot) / static_cast<A>(rows.channels);
    for (int64_t c = threadIdx.x; c < rows.channels; c += blockDim.x) {
      const A normal = measured.normal(c), g = incoming(rows, grad_row, c, normal) * rows.weight[c];
      grad_x[row * rows.channels + c] = from_acc<T>((g - mean - normal * slope) * measured.rstd);
    }
  }
}

// ------------------------------------------------------------------------------------------------
// Host side
// ------------------------------------------------------------------------------------------------

// Rows of one part of the weight and bias gradients, at most 256 parts. It follows from the number
// of rows alone (as in sparse_rcnn/ops/add_layer_norm.py): the sums are the same on every GPU.
int64_t rows_of_part(int64_t rows) {
  return std::max<int64_t>(kBackwardWarps, ceil_div(rows, 256));
}

int64_t part_count(int64_t rows) { return ceil_div(rows, rows_of_part(rows)); }

template <class T>
Rows<T> rows_of(const AddLayerNormInputs& inputs, double eps, bool relu) {
  return {.x = inputs.x.const_data_ptr<T>(),
          .residual = static_cast<const T*>(inputs.residual_data()),
          .weight = inputs.weight.const_data_ptr<acc_t<T>>(),
          .bias = inputs.bias.const_data_ptr<acc_t<T>>(),
          .count = inputs.rows,
          .channels = inputs.channels,
          .eps = static_cast<acc_t<T>>(eps),
          .relu = relu};
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// How many values a lane holds when a warp takes a row: 8, 16 or 32; 0 when a block has to take it.
template <class T>
int values_of_lane(const Rows<T>& rows, const void* other) {
  const bool vectors = rows.channels % kVecWidth<T> == 0 && is_aligned(rows.x) &&
                       is_aligned(rows.residual) && is_aligned(rows.weight) &&
                       is_aligned(rows.bias) && is_aligned(other);
  if (!vectors || rows.channels > kMostChannelsOfWarp) return 0;
  return rows.channels <= 256 ? 8 : rows.channels <= 512 ? 16 : 32;
}

// Threads of a block that takes rows of this many channels: as many warps as find work.
dim3 block_of(int64_t channels) {
  return dim3(static_cast<unsigned>(
      std::min<int64_t>(kBlockThreads, ceil_div(channels, kWarp) * kWarp)));
}

template <class T>
void launch_forward(const Rows<T>& rows, cudaStream_t stream, T* out) {
  if constexpr (!std::is_same_v<T, double>) {
    const dim3 grid(static_cast<unsigned>(ceil_div(rows.count * kWarp, kForwardThreads)));
    const int per_lane = values_of_lane(rows, out);
    if (per_lane != 0) {
      const auto kernel = per_lane == 8    ? add_layer_norm_forward_by_warp_kernel<T, 8>
                          : per_lane == 16 ? add_layer_norm_forward_by_warp_kernel<T, 16>
                                           : add_layer_norm_forward_by_warp_kernel<T, 32>;
      return launch(kernel, grid, dim3(kForwardThreads), 0, stream, rows, out);
    }
  }
  launch(add_layer_norm_forward_by_block_kernel<T>, dim3(static_cast<unsigned>(rows.count)),
         block_of(rows.channels), 0, stream, rows, out);
}

template <class T>
void launch_backward(const Rows<T>& rows, const T* grad, cudaStream_t stream, T* grad_x,
                     acc_t<T>* grad_norm) {
  const dim3 grid(static_cast<unsigned>(part_count(rows.count)));
  const int64_t part_rows = rows_of_part(rows.count);
  if constexpr (!std::is_same_v<T, double>) {
    const int per_lane = is_aligned(grad) ? values_of_lane(rows, grad_x) : 0;
    if (per_lane != 0) {
      const auto kernel = per_lane == 8    ? add_layer_norm_backward_by_warp_kernel<T, 8>
                          : per_lane == 16 ? add_layer_norm_backward_by_warp_kernel<T, 16>
                                           : add_layer_norm_backward_by_warp_kernel<T, 32>;
      const size_t shared = 2 * rows.channels * sizeof(acc_t<T>);
      return launch(kernel, grid, dim3(kBackwardThreads), shared, stream, rows, grad, part_rows,
                    grad_x, grad_norm);
    }
  }
  launch(add_layer_norm_backward_by_block_kernel<T>, grid, block_of(rows.channels), 0, stream, rows,
         grad, part_rows, grad_x, grad_norm);
}

template <class Body>
void with_type_of(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(bfloat16{});
    case ScalarType::Half: return body(float16{});
    default: STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
}

Tensor add_layer_norm_cuda(const Tensor& x, const std::optional<Tensor>& residual,
                           const Tensor& weight, const Tensor& bias, double eps, bool relu) {
  const AddLayerNormInputs inputs = parse_add_layer_norm(x, residual, weight, bias);
  const DeviceGuard guard(inputs.x);
  const Tensor out = torch::stable::new_empty(inputs.x, inputs.x.sizes());
  with_type_of(inputs.x, [&](auto value) {
    using T = decltype(value);
    launch_forward(rows_of<T>(inputs, eps, relu), current_stream(inputs.x),
                   out.mutable_data_ptr<T>());
  });
  return out;
}

std::tuple<Tensor, Tensor> add_layer_norm_backward_cuda(const Tensor& grad, const Tensor& x,
                                                        const std::optional<Tensor>& residual,
                                                        const Tensor& weight, const Tensor& bias,
                                                        double eps, bool relu) {
  const AddLayerNormInputs inputs = parse_add_layer_norm(x, residual, weight, bias);
  const DeviceGuard guard(inputs.x);
  const Tensor dense_grad = parse_like_x("grad", grad, inputs.x);
  const Tensor grad_x = torch::stable::new_empty(inputs.x, inputs.x.sizes());
  const Tensor grad_norm =
      torch::stable::new_empty(inputs.weight, {part_count(inputs.rows), 2, inputs.channels});
  with_type_of(inputs.x, [&](auto value) {
    using T = decltype(value);
    launch_backward(rows_of<T>(inputs, eps, relu), dense_grad.const_data_ptr<T>(),
                    current_stream(inputs.x), grad_x.mutable_data_ptr<T>(),
                    grad_norm.mutable_data_ptr<acc_t<T>>());
  });
  return {grad_x, grad_norm};
}

}  // namespace
}  // namespace sparse_rcnn

SPARSE_RCNN_CUDA_IMPL(m) {
  m.impl("add_layer_norm", TORCH_BOX(&sparse_rcnn::add_layer_norm_cuda));
  m.impl("add_layer_norm_backward", TORCH_BOX(&sparse_rcnn::add_layer_norm_backward_cuda));
}
