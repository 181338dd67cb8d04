// The box tower, its prediction and the decoding on the GPU, in one launch: inference only.
//
// A block carries a few proposals through all layers: their features stay in shared memory, the
// weights come from L2. A layer is a product (input tile -> output tile), LayerNorm and ReLU
// (output tile -> input tile); at the end each warp predicts and decodes the boxes of its rows. The
// product is one of
//   by tensor cores  bfloat16 and float16, C a multiple of 16 up to 256: 16 proposals a block. A
//                    weight is used by one warp once, so it goes from L2 to that warp's registers,
//                    all weights of a layer at once, and those of the next layer while this one is
//                    being normalised. Staging them in shared memory would add a copy and barriers
//                    and share nothing.
//   plainly          any type, C up to 1536: 8 proposals a block (4 in float64), fused
//                    multiply-adds, the next slice of the weights read ahead.
//
// Budget              registers   shared memory at C = 256   threads   blocks an SM, by registers
//   by tensor cores   216         35 KB                      256       1
//   plainly           192         17 KB (1536: 99 KB)        256       1
//     in float64      136         17 KB (1536: 99 KB)        256       1
// No spills. 300 proposals are 19 or 38 blocks, fewer than there are SMs: what counts is the
// latency of a block, which is that of streaming n * C * C weights from L2 to one SM.
//
// The class tower is not here: its prediction has up to 1203 outputs, 300 times the boxes', and is
// a GEMM like any other, which the libraries do well.
// budget: refine_boxes_kernel: 216 registers, 101376 bytes shared, 256 threads
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/check.h"
#include "common/cuda.cuh"
#include "common/delta_math.h"
#include "cuda/refine_boxes.cuh"

namespace sparse_rcnn {
namespace {

// ------------------------------------------------------------------------------------------------
// The other steps. A warp takes rows warp, warp + 8, ... of the block's.
// ------------------------------------------------------------------------------------------------

// Rows of x from `first` on; zeros beyond the last row and the last channel.
template <class T, class Tile>
__device__ __forceinline__ void load_input(const Tower<T>& tower, int64_t first, int rows,
                                           int pitch, Tile input) {
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
  check_dtype("delta_weight", delta_weight, x.scalar_type());
  check_dtype("delta_bias", delta_bias, x.scalar_type());
  check_same_device("delta_weight", delta_weight, x);
  check_same_device("delta_bias", delta_bias, x);
  const Layers layers = parse_layers(x, tower_weights, norm_weights, norm_biases);
  const DeviceGuard guard(x);
  const Tensor dense_x = torch::stable::contiguous(x);
  const Tensor dense_boxes = torch::stable::contiguous(boxes);
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
