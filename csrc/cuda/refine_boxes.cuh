// The products of the box tower, its arguments and the tiles in shared memory: the parts of
// refine_boxes.cu, whose head comment explains them.
#pragma once

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

// A value as the sum of two of a half type, the second what the first leaves over: 16 bits of
// bfloat16, 22 of float16. The tensor cores have time for both, and the features then lose nothing
// that shows on their way through the layers.
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
// Products: output[row][n] = sum over k of input[row][k] * weight[n][k]. The input tile is zero
// from C up to a whole slice. A warp computes tiles of 8 outputs, kWarps tiles apart: lane 4g + q
// reads elements 8q..8q+7 of each slice of weight row g.
// ------------------------------------------------------------------------------------------------

template <class T>
class TensorCoreProduct {
 public:
  using Tile = SplitTile<T>;
  static constexpr int kRows = 16;

  // An odd number of 64-byte units: the rows g and g + 1 that are read together lie in different
  // banks.
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

  // The order of the summed dimension is free as long as both operands have the same: a lane's 8
  // elements are its pairs of two instructions.
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

}  // namespace
}  // namespace sparse_rcnn
