// The box tower, its prediction and the decoding on the GPU, in one launch: inference only.
//
// A block carries a few proposals through all layers: their features stay in shared memory, the weights come from L2.
// A layer is a product (input tile -> output tile), LayerNorm and ReLU (output tile -> input tile); at the end each
// warp predicts and decodes the boxes of its rows. The product is one of
//   by tensor cores  bfloat16 and float16, C a multiple of 16 up to 256: 16 proposals a block. A weight is used by one
//                    warp once, so it goes from L2 to that warp's registers, all weights of a layer at once, and those
//                    of the next layer while this one is being normalised. Staging them in shared memory would add a
//                    copy and barriers and share nothing.
//   plainly          any type, C up to 1536: 8 proposals a block (4 in float64), fused multiply-adds.
//
// Budget                registers   shared memory at C = 256   threads   blocks an SM
//   by tensor cores     192         26 KB                      256       1, by registers
//   plainly             168         17 KB (1536: 97 KB)        256       1 (float64 too)
// No spills. 300 proposals are 19 or 38 blocks, fewer than there are SMs: what counts is the latency of a block, which
// is that of streaming n * C * C weights from L2 to one SM.
//
// The class tower is not here: its prediction has up to 1203 outputs, 300 times the boxes', and is a GEMM like any
// other, which the libraries do well.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/check.h"
#include "common/cuda.cuh"
#include "common/delta_math.h"

namespace sparse_rcnn {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMostLayers = 8;
constexpr int kMostChannels = 1536;
constexpr int kMostTensorCoreChannels = 256;
constexpr int kSlice = 32;     // of the summed dimension, in steps of which a product goes
constexpr int kLaneSlice = 8;  // of a slice: lanes 4g..4g+3 share a row of it

template <class T>
struct Tower {
  const T* x;  // [R, C]
  const T* weights[kMostLayers];  // [C, C], outputs by inputs
  const acc_t<T>* norm_weights[kMostLayers];
  const acc_t<T>* norm_biases[kMostLayers];
  const T* delta_weight;  // [4, C]
  const T* delta_bias;
  const void* boxes;  // [R, 4], double if wide_boxes, else float
  void* refined;      // the same
  int64_t rows;
  int channels;
  int layers;
  acc_t<T> eps;
  bool wide_boxes;
  bool vectors;  // rows of weights can be read 8 elements at a time
  DeltaCode<float> code;
  DeltaCode<double> wide_code;
};

__host__ __device__ constexpr int whole_slices(int channels) {
  return (channels + kSlice - 1) / kSlice * kSlice;
}

// Of the output tile: rows 8 elements past a multiple of all banks, for the accumulators' stores.
__host__ __device__ constexpr int output_pitch(int channels) { return whole_slices(channels) + 8; }

// ------------------------------------------------------------------------------------------------
// Input tiles
// ------------------------------------------------------------------------------------------------

// A value as the sum of two of a half type, the second what the first leaves over: 16 bits of bfloat16, 22 of float16.
// The tensor cores have time for both, and the features then lose nothing that shows on their way through the layers.
template <class T>
struct SplitTile {
  T* high;
  T* low;

  __device__ SplitTile(void* shared, int size)
      : high(static_cast<T*>(shared)), low(static_cast<T*>(shared) + size) {}
  __host__ __device__ static constexpr size_t bytes(int size) { return 2 * size * sizeof(T); }

  __device__ float get(int i) const { return to_acc(high[i]) + to_acc(low[i]); }
  __device__ void set(int i, float value) {
    high[i] = from_acc<T>(value);
    low[i] = from_acc<T>(value - to_acc(high[i]));
  }
};

template <class A>
struct PlainTile {
  A* data;

  __device__ PlainTile(void* shared, int) : data(static_cast<A*>(shared)) {}
  __host__ __device__ static constexpr size_t bytes(int size) { return size * sizeof(A); }

  __device__ A get(int i) const { return data[i]; }
  __device__ void set(int i, A value) { data[i] = value; }
};

// ------------------------------------------------------------------------------------------------
// Products: output[row][n] = sum over k of input[row][k] * weight[n][k]. The input tile is zero from C up to a whole
// slice. A warp computes tiles of 8 outputs, kWarps tiles apart: lane 4g + q reads elements 8q..8q+7 of each slice of
// weight row g.
// ------------------------------------------------------------------------------------------------

template <class T>
class TensorCoreProduct {
 public:
  using Tile = SplitTile<T>;
  static constexpr int kRows = 16;

  // An odd number of 64-byte units: the rows g and g + 1 that are read together lie in different banks.
  __host__ __device__ static constexpr int input_pitch(int channels) {
    return whole_slices(channels) | kSlice;
  }

  // Starts reading a layer's weights.
  __device__ __forceinline__ void fetch(const Tower<T>& tower, int layer) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int n = output_of(tile) + lane() / 4, k = slice * kSlice + lane() % 4 * kLaneSlice;
        weights_[slice][tile] = {};
        if (n < tower.channels && k < tower.channels) {
          weights_[slice][tile] =
              load_vec_const<kLaneSlice>(tower.weights[layer] + int64_t{n} * tower.channels + k);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(const Tower<T>& tower, int layer, const Tile& input,
                                           float* output) const {
    const int out_pitch = output_pitch(tower.channels);
    float sums[kTiles][4] = {}, low_sums[kTiles][4] = {};
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      if (slice * kSlice >= tower.channels) break;
      multiply_slice(tower, slice, input.high, sums);
      if (layer > 0) multiply_slice(tower, slice, input.low, low_sums);  // x itself is of type T
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int n = output_of(tile) + 2 * (lane() % 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Vec<float, 2> pair = {sums[tile][2 * half] + low_sums[tile][2 * half],
                                    sums[tile][2 * half + 1] + low_sums[tile][2 * half + 1]};
        float* row = output + (lane() / 4 + 8 * half) * out_pitch;
        if (n < tower.channels) store_vec(row + n, pair);
      }
    }
  }

 private:
  static constexpr int kSlices = kMostTensorCoreChannels / kSlice;
  static constexpr int kTiles = kMostTensorCoreChannels / (8 * kWarps);  // of a warp

  __device__ static int lane() { return threadIdx.x % kWarp; }
  __device__ static int output_of(int tile) {
    return (static_cast<int>(threadIdx.x) / kWarp + tile * kWarps) * 8;
  }

  // The order of the summed dimension is free as long as both operands have the same: a lane's 8 elements are its pairs
  // of two instructions.
  __device__ __forceinline__ void multiply_slice(const Tower<T>& tower, int slice, const T* input,
                                                 float (&sums)[kTiles][4]) const {
    const int pitch = input_pitch(tower.channels);
    const T* row = input + lane() / 4 * pitch + slice * kSlice + lane() % 4 * kLaneSlice;
    uint32_t top[4], bottom[4];
    as_words(load_vec<kLaneSlice>(row), top);
    as_words(load_vec<kLaneSlice>(row + 8 * pitch), bottom);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t weight[4];
      as_words(weights_[slice][tile], weight);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t a[4] = {top[2 * step], bottom[2 * step], top[2 * step + 1],
                               bottom[2 * step + 1]};
        const uint32_t b[2] = {weight[2 * step], weight[2 * step + 1]};
        mma_m16n8k16<T>(sums[tile], a, b);
      }
    }
  }

  __device__ __forceinline__ static void as_words(const Vec<T, kLaneSlice>& values,
                                                  uint32_t (&words)[4]) {
    memcpy(words, &values, sizeof(words));
  }

  Vec<T, kLaneSlice> weights_[kSlices][kTiles];
};

template <class T>
class PlainProduct {
 public:
  using A = acc_t<T>;
  using Tile = PlainTile<A>;
  static constexpr int kRows = sizeof(A) == 8 ? 4 : 8;
  static constexpr int kTiles = sizeof(A) == 8 ? 2 : 4;  // of a warp at once

  __host__ __device__ static constexpr int input_pitch(int channels) {
    return whole_slices(channels);
  }

  __device__ __forceinline__ void fetch(const Tower<T>&, int) {}

  __device__ __forceinline__ void multiply(const Tower<T>& tower, int layer, const Tile& input,
                                           A* output) const {
    for (int span = 0; span < tower.channels; span += kOutputs) {
      multiply_span(tower, tower.weights[layer], input.data, output, span);
    }
  }

 private:
  using Weights = Vec<T, kLaneSlice>;
  static constexpr int kOutputs = 8 * kWarps * kTiles;  // of the block at once

  __device__ __forceinline__ static void multiply_span(const Tower<T>& tower, const T* weights,
                                                       const A* input, A* output, int span) {
    const int in_pitch = input_pitch(tower.channels), out_pitch = output_pitch(tower.channels);
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
    const int first = span + warp * 8 + g;  // its outputs are 8 * kWarps apart
    A sums[kTiles][kRows] = {};
    Weights ahead[kTiles];
    load_weights(tower, weights, first, q * kLaneSlice, ahead);
    for (int slice = 0; slice < tower.channels; slice += kSlice) {
      const int k = slice + q * kLaneSlice;
      A weight[kTiles][kLaneSlice];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kLaneSlice; ++i) weight[tile][i] = to_acc(ahead[tile][i]);
      }
      load_weights(tower, weights, first, k + kSlice, ahead);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const Vec<A, kLaneSlice> values = load_vec<kLaneSlice>(input + row * in_pitch + k);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < kLaneSlice; ++i) sums[tile][row] += weight[tile][i] * values[i];
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int n = first + tile * 8 * kWarps;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const A sum = warp_sum<4>(sums[tile][row]);
        if (row % 4 == q && n < tower.channels) output[row * out_pitch + n] = sum;
      }
    }
  }

  // Of each tile weight[n][k..k+7], zeros beyond the weight's ends.
  __device__ __forceinline__ static void load_weights(const Tower<T>& tower, const T* weights,
                                                      int first, int k,
                                                      Weights (&values)[kTiles]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int n = first + tile * 8 * kWarps;
      const T* row = weights + int64_t{n} * tower.channels;
      values[tile] = {};
      if (n >= tower.channels) continue;
      if (tower.vectors) {
        if (k < tower.channels) values[tile] = load_vec_const<kLaneSlice>(row + k);
      } else {
#pragma unroll
        for (int i = 0; i < kLaneSlice; ++i) {
          if (k + i < tower.channels) values[tile][i] = row[k + i];
        }
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------
// The other steps. A warp takes rows warp, warp + 8, ... of the block's.
// ------------------------------------------------------------------------------------------------

// Rows of x from `first` on; zeros beyond the last row and the last channel.
template <class T, class Tile>
__device__ __forceinline__ void load_input(const Tower<T>& tower, int64_t first, int rows, int pitch,
                                           Tile input) {
  for (int i = threadIdx.x; i < rows * pitch; i += kThreads) {
    const int row = i / pitch, channel = i % pitch;
    const bool inside = first + row < tower.rows && channel < tower.channels;
    input.set(i, inside ? to_acc(tower.x[(first + row) * tower.channels + channel]) : acc_t<T>(0));
  }
}

// LayerNorm and ReLU of one row, to the input tile from element `to` on.
template <class A, class Tile>
__device__ __forceinline__ void normalize_row(const A* output, const A* weight, const A* bias,
                                              int channels, A eps, Tile input, int to) {
  const int lane = threadIdx.x % kWarp;
  A sum = 0, squares = 0;
  for (int c = lane; c < channels; c += kWarp) sum += output[c];
  const A mean = warp_sum(sum) / static_cast<A>(channels);
  for (int c = lane; c < channels; c += kWarp) {
    squares += (output[c] - mean) * (output[c] - mean);
  }
  const A rstd = A(1) / sqrt(warp_sum(squares) / static_cast<A>(channels) + eps);
  for (int c = lane; c < channels; c += kWarp) {
    const A value = (output[c] - mean) * rstd * weight[c] + bias[c];
    input.set(to + c, value < A(0) ? A(0) : value);  // keeps NaN
  }
}

template <class A, class B>
__device__ __forceinline__ void decode(const A (&deltas)[4], int64_t row, const void* boxes,
                                       const DeltaCode<DecodeType<A, B>>& code, void* refined) {
  using Wide = DecodeType<A, B>;
  Wide delta[4], box[4], decoded[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    delta[i] = deltas[i];
    box[i] = static_cast<const B*>(boxes)[4 * row + i];
  }
  decode_box(delta, box, code, decoded);
#pragma unroll
  for (int i = 0; i < 4; ++i) static_cast<B*>(refined)[4 * row + i] = static_cast<B>(decoded[i]);
}

// The deltas of one row, whose features start at element `from` of the tile, and the box they make.
template <class T, class Tile>
__device__ __forceinline__ void predict_row(const Tower<T>& tower, int64_t row, Tile input,
                                            int from) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % kWarp;
  A deltas[4] = {};
  for (int c = lane; c < tower.channels; c += kWarp) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      deltas[i] += input.get(from + c) * to_acc(tower.delta_weight[i * tower.channels + c]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) deltas[i] = warp_sum(deltas[i]) + to_acc(tower.delta_bias[i]);
  if (lane != 0) return;
  if (tower.wide_boxes) {
    decode<A, double>(deltas, row, tower.boxes, tower.wide_code, tower.refined);
  } else if constexpr (std::is_same_v<A, double>) {
    decode<A, float>(deltas, row, tower.boxes, tower.wide_code, tower.refined);
  } else {
    decode<A, float>(deltas, row, tower.boxes, tower.code, tower.refined);
  }
}

template <class T, class Product>
__global__ void __launch_bounds__(kThreads) refine_boxes_kernel(Tower<T> tower) {
  using A = acc_t<T>;
  const int channels = tower.channels, warp = threadIdx.x / kWarp;
  const int in_pitch = Product::input_pitch(channels), out_pitch = output_pitch(channels);
  A* output = dynamic_shared<A>();
  typename Product::Tile input(output + Product::kRows * out_pitch, Product::kRows * in_pitch);
  const int64_t first = int64_t{blockIdx.x} * Product::kRows;

  Product product;
  if (tower.layers > 0) product.fetch(tower, 0);
  load_input(tower, first, Product::kRows, in_pitch, input);
  __syncthreads();
  for (int layer = 0; layer < tower.layers; ++layer) {
    product.multiply(tower, layer, input, output);
    if (layer + 1 < tower.layers) product.fetch(tower, layer + 1);
    __syncthreads();
    for (int row = warp; row < Product::kRows; row += kWarps) {
      normalize_row(output + row * out_pitch, tower.norm_weights[layer], tower.norm_biases[layer],
                    channels, tower.eps, input, row * in_pitch);
    }
    __syncthreads();
  }
  for (int row = warp; row < Product::kRows && first + row < tower.rows; row += kWarps) {
    predict_row(tower, first + row, input, row * in_pitch);
  }
}

// ------------------------------------------------------------------------------------------------
// Host side
// ------------------------------------------------------------------------------------------------

template <class T, class Product>
void launch_refine_boxes(const Tower<T>& tower, cudaStream_t stream) {
  constexpr int rows = Product::kRows;
  const size_t shared = rows * output_pitch(tower.channels) * sizeof(acc_t<T>) +
                        Product::Tile::bytes(rows * Product::input_pitch(tower.channels));
  launch(refine_boxes_kernel<T, Product>,
         dim3(static_cast<unsigned>(ceil_div(tower.rows, Product::kRows))), dim3(kThreads), shared,
         stream, tower);
}

// Tensors of the tower, dense; they own the memory that Tower points to.
struct Layers {
  std::vector<Tensor> weights, norm_weights, norm_biases;
};

Layers parse_layers(const Tensor& x, const std::vector<Tensor>& weights,
                    const std::vector<Tensor>& norm_weights,
                    const std::vector<Tensor>& norm_biases) {
  const int64_t C = x.size(1);
  STD_TORCH_CHECK(weights.size() <= kMostLayers && norm_weights.size() == weights.size() &&
                      norm_biases.size() == weights.size(),
                  "tower_weights: expected at most ", kMostLayers,
                  ", as many as norm_weights and norm_biases, got ", weights.size(), ", ",
                  norm_weights.size(), " and ", norm_biases.size());
  Layers layers;
  const ScalarType wide = accumulation_type(x.scalar_type());
  const auto add = [&](const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                       ScalarType dtype, std::vector<Tensor>& to) {
    check_shape(name, tensor, shape);
    check_dtype(name, tensor, dtype);
    check_same_device(name, tensor, x);
    to.push_back(torch::stable::contiguous(tensor));
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    add("tower_weights", weights[i], {C, C}, x.scalar_type(), layers.weights);
    add("norm_weights", norm_weights[i], {C}, wide, layers.norm_weights);
    add("norm_biases", norm_biases[i], {C}, wide, layers.norm_biases);
  }
  return layers;
}

template <class T>
void run(Tower<T> tower, const Layers& layers, cudaStream_t stream) {
  tower.layers = static_cast<int>(layers.weights.size());
  tower.vectors = tower.channels % kLaneSlice == 0;
  for (int i = 0; i < tower.layers; ++i) {
    tower.weights[i] = layers.weights[i].const_data_ptr<T>();
    tower.norm_weights[i] = layers.norm_weights[i].const_data_ptr<acc_t<T>>();
    tower.norm_biases[i] = layers.norm_biases[i].const_data_ptr<acc_t<T>>();
    tower.vectors = tower.vectors && reinterpret_cast<uintptr_t>(tower.weights[i]) % 16 == 0;
  }
  if constexpr (sizeof(T) == 2) {
    if (tower.vectors && tower.channels % 16 == 0 && tower.channels <= kMostTensorCoreChannels) {
      return launch_refine_boxes<T, TensorCoreProduct<T>>(tower, stream);
    }
  }
  launch_refine_boxes<T, PlainProduct<T>>(tower, stream);
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

Tensor refine_boxes_cuda(const Tensor& x, const Tensor& boxes, std::vector<Tensor> tower_weights,
                         std::vector<Tensor> norm_weights, std::vector<Tensor> norm_biases,
                         const Tensor& delta_weight, const Tensor& delta_bias,
                         std::vector<double> weights, std::optional<double> lower,
                         std::optional<double> upper, double eps) {
  check_shape("x", x, {-1, -1});
  STD_TORCH_CHECK(x.size(1) >= 1 && x.size(1) <= kMostChannels, "x: expected 1 to ", kMostChannels,
                  " channels, got ", x.size(1));
  check_shape("boxes", boxes, {x.size(0), 4});
  check_same_device("boxes", boxes, x);
  const bool wide_boxes = boxes.scalar_type() == ScalarType::Double;
  if (!wide_boxes) check_dtype("boxes", boxes, ScalarType::Float);
  check_shape("delta_weight", delta_weight, {4, x.size(1)});
  check_shape("delta_bias", delta_bias, {4});
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>("delta_weight", delta_weight),
                                     {"delta_bias", delta_bias}}) {
    check_dtype(name, tensor, x.scalar_type());
    check_same_device(name, tensor, x);
  }
  const Layers layers = parse_layers(x, tower_weights, norm_weights, norm_biases);
  const DeviceGuard guard(x);
  const Tensor dense_x = torch::stable::contiguous(x), dense_boxes = torch::stable::contiguous(boxes);
  const Tensor dense_weight = torch::stable::contiguous(delta_weight);
  const Tensor dense_bias = torch::stable::contiguous(delta_bias);
  const Tensor refined = torch::stable::new_empty(dense_boxes, dense_boxes.sizes());
  with_type_of(x, [&](auto value) {
    using T = decltype(value);
    Tower<T> tower = {};
    tower.x = dense_x.const_data_ptr<T>();
    tower.delta_weight = dense_weight.const_data_ptr<T>();
    tower.delta_bias = dense_bias.const_data_ptr<T>();
    tower.boxes = dense_boxes.const_data_ptr();
    tower.refined = refined.mutable_data_ptr();
    tower.rows = x.size(0);
    tower.channels = static_cast<int>(x.size(1));
    tower.eps = static_cast<acc_t<T>>(eps);
    tower.wide_boxes = wide_boxes;
    tower.code = make_delta_code<float>(weights, lower, upper);
    tower.wide_code = make_delta_code<double>(weights, lower, upper);
    run(tower, layers, current_stream(x));
  });
  return refined;
}

}  // namespace
}  // namespace sparse_rcnn

SPARSE_RCNN_CUDA_IMPL(m) {
  m.impl("refine_boxes", TORCH_BOX(&sparse_rcnn::refine_boxes_cuda));
}
