// The dynamic interaction of one RoI in one block, by tensor cores: bfloat16, float16, and float32
// in TF32.
//
//   hidden = relu(norm1(x W1)),  out = relu(norm2(hidden W2)),  x [P, C], W1 [C, D], W2 [D, C]
//
// x W1 is 64 x 64 at most: a warp has 16 rows and half the columns. hidden W2 is 64 x 256 at most
// and goes in passes of 32 rows, a warp having two groups of 16 columns: 32 sums a thread at a time
// in place of 64, which is what lets three blocks share a multiprocessor. Statistics are taken from
// the float sums, mean first; only x, hidden and the result are ever rounded to T.
//
// Budget for P 49, C 256, D 64, three blocks on a multiprocessor of 228 KB, one on one of 100 KB:
//   shared memory  63.3 KB: W1 36 KB, which W2 takes over in two steps as the rows of W1 are used
//                  up; x 25.3 KB, which hidden takes over; sums 2 KB
//   registers      80, no spills (other sizes: up to 106, two blocks)
// In TF32, two blocks: W1 comes in four pieces by way of two buffers, 36 KB, x has 50.5 KB, and W2
// and hidden lie in the place of all three; 88.5 KB, 88 registers.
//
// Predicted for an H200, not measured. A RoI moves 64 KB of parameters and 25 KB in and out each:
// 3.5 us of one of 132 multiprocessors at 4.3 TB/s, against 0.7 us of mma (3.2 MFLOP, padded
// to 4.2) and 2.4 us of issue (17,000 warp instructions). 300 RoIs are one wave of 8 us, 4800 take
// 130 us. In TF32 it moves 228 KB, 7 us of a multiprocessor, against 1.4 us of mma and 4 us of
// issue, more than a third of which rounds operands: 300 RoIs take 18 to 26 us, 4800 0.3 ms.
// budget: dynamic_conv_forward_kernel: 106 registers, 101376 bytes shared, 256 threads
#pragma once

#include "cuda/dynamic_conv.cuh"
#include "cuda/tile_gemm.cuh"

namespace sparse_rcnn {

// RoI features [R, P, C] in global memory, as the kernels' source of x. `start` begins to fetch
// columns [begin, end), `finish` completes x but for the asynchronous copies of `start`, `backward`
// disposes of dx; both may use scratch_bytes() of shared memory.
template <class T>
struct StoredRois {
  const T* data;
  T* grad;  // of the same shape, in the backward

  __host__ __device__ size_t scratch_bytes() const { return 0; }
  __device__ void start(const Tile<T>& x, int64_t roi, int bins, int channels, int begin,
                        int end) const {
    copy_tile_async(x, data + roi * bins * channels, channels, 0, bins, begin, end);
  }
  __device__ void finish(const Tile<T>& /*x*/, int64_t /*roi*/, char* /*scratch*/) const {}

  __device__ bool wants_grad() const { return true; }
  template <class Block>
  __device__ void backward(const Block& block) const {
    block.backward_x(GlobalRows<T>{grad + block.roi * block.P * block.C, block.C});
  }
};

// Buffers of sum_rows() for the norms: 64 rows of two warps, or 32 rows of eight, make one sum.
struct NormSums {
  static constexpr int kSum = 256;
  static constexpr int kForward = 2 * kSum;
  static constexpr int kBackward = 4 * kSum;

  float* mean;      // [kSum]
  float* variance;  // [kSum]
  float* gradient;  // [2 * kSum], in the backward

  __device__ explicit NormSums(void* shared)
      : mean(static_cast<float*>(shared)), variance(mean + kSum), gradient(variance + kSum) {}
};

// W2, and behind it norm2's weight and bias, in bytes.
template <class T>
__host__ __device__ constexpr size_t w2_bytes(int channels, int inner) {
  return tile_bytes<T>(inner, channels) + 2 * channels * sizeof(float);
}

template <class T>
__device__ __forceinline__ float* norm2_place(const Tile<T>& w2, int inner) {
  return reinterpret_cast<float*>(w2.data + inner * w2.pitch);
}

// Rows of W1 in a piece, where it comes in pieces.
inline constexpr int kW1Rows = 64;

template <class T>
inline constexpr bool kWholeW1 = !std::is_same_v<T, float>;

// Where W1, or two pieces of it, are, in bytes.
template <class T>
__host__ __device__ constexpr size_t w1_bytes(int channels, int inner) {
  const int rows = kWholeW1<T> || channels < 2 * kW1Rows ? channels : 2 * kW1Rows;
  return tile_bytes<T>(rows, inner);
}

// Starts copying norm2's weight and bias, one after the other.
template <class T>
__device__ __forceinline__ void copy_norm2_async(const DynamicConvArgs<T>& args, int channels,
                                                 float* place) {
  for (int c = 4 * static_cast<int>(threadIdx.x); c < channels; c += 4 * kTileThreads) {
    cp_async_16(place + c, args.norm2_weight + c, true);
    cp_async_16(place + channels + c, args.norm2_bias + c, true);
  }
}

// Byte offsets in shared memory.
template <class T>
struct ForwardPlan {
  size_t x, hidden, sums, scratch;  // W1 and W2 are at 0

  // W2 and hidden may take the place of x, but for the rows of W2 that come while x is in use.
  __host__ __device__ ForwardPlan(int bins, int channels, int inner) {
    x = w1_bytes<T>(channels, inner);
    hidden = larger(x, w2_bytes<T>(channels, inner));
    sums = larger(x + tile_bytes<T>(bins, channels), hidden + tile_bytes<T>(bins, inner));
    scratch = sums + NormSums::kForward * sizeof(float);
  }
};

// LayerNorm of rows of `width` columns shared by Slots warps, without its affine part. Leaves the
// reciprocal standard deviations in rstd. The thread's row i is row rows[i] of the sums.
template <int Slots, int RowTiles>
__device__ __forceinline__ void normalise(WarpTile<RowTiles>& tile, const WarpColumns& columns,
                                          const NormSums& buffers, const int (&rows)[2 * RowTiles],
                                          int slot, int width, float eps,
                                          float (&rstd)[2 * RowTiles]) {
  const float scale = 1.0f / width;
  float sums[2 * RowTiles] = {};
  tile.for_each(columns, [&](float& x, int i, int, int, int) { sums[i] += x; });
  sum_rows<Slots>(sums, rows, slot, buffers.mean);
  float squares[2 * RowTiles] = {};
  tile.for_each(columns, [&](float& x, int i, int, int, int) {
    x -= sums[i] * scale;
    squares[i] += x * x;
  });
  sum_rows<Slots>(squares, rows, slot, buffers.variance);
#pragma unroll
  for (int i = 0; i < 2 * RowTiles; ++i) rstd[i] = inverse_sqrt(squares[i] * scale + eps);
  tile.for_each(columns, [&](float& x, int i, int, int, int) { x *= rstd[i]; });
}

// The affine part and the ReLU.
template <int RowTiles>
__device__ __forceinline__ void activate(WarpTile<RowTiles>& tile, const WarpColumns& columns,
                                         const float* weight, const float* bias) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (j >= columns.groups) continue;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Vec<float, 2> w = load_vec<2>(weight + columns.of(j, n));
      const Vec<float, 2> b = load_vec<2>(bias + columns.of(j, n));
#pragma unroll
      for (int i = 0; i < 2 * RowTiles; ++i)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = tile.value[i / 2][j][n][i % 2 * 2 + c];
          x = relu(x * w[c] + b[c]);
        }
    }
  }
}

// Where a warp works in a result of D columns: 16 rows, half of the groups of columns.
struct NarrowPlace {
  static constexpr int kSlots = 2;

  int row, slot;
  int rows[2];  // of the thread
  WarpColumns columns;

  __device__ explicit NarrowPlace(int inner) {
    const int warp = tile_warp();
    row = 16 * (warp % 4);
    slot = warp / 4;
    for (int i = 0; i < 2; ++i) rows[i] = row + WarpTile<1>::row(i);
    columns = deal_columns(inner, slot, kSlots);
  }
};

// Where a warp works in a pass of 32 rows of a result of C columns: all rows, a few columns.
struct WidePlace {
  static constexpr int kSlots = kTileWarps;

  int slot;
  int rows[4];
  WarpColumns columns;

  __device__ explicit WidePlace(int channels) {
    slot = tile_warp();
    for (int i = 0; i < 4; ++i) rows[i] = WarpTile<2>::row(i);
    columns = deal_columns(channels, slot, kSlots);
  }
};

// Two blocks on a multiprocessor are what shared memory has room for in TF32.
template <class T>
inline constexpr int kForwardBlocks = std::is_same_v<T, float> ? 2 : 3;

// kChannels and kInner are args.channels and args.inner if known beforehand, else 0.
template <class T, class Rois, int kChannels, int kInner>
__global__ void __launch_bounds__(kTileThreads, kChannels ? kForwardBlocks<T> : 2)
    dynamic_conv_forward_kernel(const DynamicConvArgs<T> args, const __grid_constant__ Rois rois,
                                T* out) {
  const int P = args.bins, C = kChannels ? kChannels : args.channels;
  const int D = kInner ? kInner : args.inner;
  const int64_t roi = blockIdx.x;
  const ForwardPlan<T> plan(P, C, D);
  char* const shared = dynamic_shared<char>();
  // Rows from P on repeat the last: their results are not used.
  const Tile<T> x{reinterpret_cast<T*>(shared + plan.x), tile_pitch(C), P - 1};
  const Tile<T> hidden{reinterpret_cast<T*>(shared + plan.hidden), tile_pitch(D), P - 1};
  T* const weights = reinterpret_cast<T*>(shared);
  const Tile<T> w2{weights, tile_pitch(C), kAllRows};
  float* const norm2 = norm2_place(w2, D);
  const NormSums buffers(shared + plan.sums);
  const T* const w1_source = args.parameters + roi * 2 * C * D;
  const T* const w2_source = w1_source + C * D;

  {
    const NarrowPlace place(D);
    WarpTile<1> tile;
    int ready = 0;  // rows of W2 that are on their way
    if constexpr (kWholeW1<T>) {
      const Tile<T> w1{weights, tile_pitch(D), kAllRows};
      const int half = (C / 16 + 1) / 2 * 16;
      copy_tile_async(w1, w1_source, D, 0, half, 0, D);
      rois.start(x, roi, P, C, 0, half);
      cp_async_commit();
      copy_tile_async(w1, w1_source, D, half, C, 0, D);
      rois.start(x, roi, P, C, half, C);
      cp_async_commit();
      rois.finish(x, roi, shared + plan.scratch);
      cp_async_wait<1>();
      __syncthreads();
      if (place.row < P) {
        tile.template multiply<Stored::straight, Stored::straight>(x, place.row, w1, place.columns,
                                                                   0, half);
      }
      cp_async_wait<0>();
      __syncthreads();
      // The first rows of W1 are used up: as many rows of W2 as fit into their place follow.
      ready = min(D, half * w1.pitch / w2.pitch);
      copy_tile_async(w2, w2_source, C, 0, ready, 0, C);
      cp_async_commit();
      if (place.row < P) {
        tile.template multiply<Stored::straight, Stored::straight>(x, place.row, w1, place.columns,
                                                                   half, C);
      }
    } else {
      const auto w1 =
          row_pieces(w1_source, C, kW1Rows, D, weights, weights + kW1Rows * tile_pitch(D));
      rois.start(x, roi, P, C, 0, C);
      w1.start();
      rois.finish(x, roi, shared + plan.scratch);
      w1.use([&](int first, int count, const Tile<T>& piece) {
        if (place.row >= P) return;
        tile.template multiply<Stored::straight, Stored::straight>(
            x.from_column(first), place.row, piece, place.columns, 0, count);
      });
    }
    float rstd[2];
    normalise<NarrowPlace::kSlots>(tile, place.columns, buffers, place.rows, place.slot, D,
                                   args.eps, rstd);
    // Its barriers have shown that x and W1 are used up as well.
    copy_tile_async(w2, w2_source, C, ready, D, 0, C);
    copy_norm2_async(args, C, norm2);
    cp_async_commit();
    activate(tile, place.columns, args.norm1_weight, args.norm1_bias);
    tile.store(hidden, place.row, P, place.columns);
  }
  cp_async_wait<0>();
  __syncthreads();

  const WidePlace place(C);
  const GlobalRows<T> result{out + roi * P * C, C};
  for (int row = 0; row < P; row += 32) {
    WarpTile<2> tile;
    tile.template multiply<Stored::straight, Stored::straight>(hidden, row, w2, place.columns, 0,
                                                               D);
    float rstd[4];
    normalise<WidePlace::kSlots>(tile, place.columns, buffers, place.rows, place.slot, C, args.eps,
                                 rstd);
    activate(tile, place.columns, norm2, norm2 + C);
    tile.store(result, row, P, place.columns);
  }
}

// Launches the kernel if it suits.
template <class T, class Rois>
bool launch_forward(const DynamicConvInputs& inputs, const Rois& rois, const Tensor& out) {
  const DynamicConvArgs<T> args = inputs.args<T>();
  const ForwardPlan<T> plan(args.bins, args.channels, args.inner);
  const size_t shared = plan.scratch + rois.scratch_bytes();
  if (!inputs.suits_tensor_cores() || shared > kSharedLimit) return false;
  const auto kernel = is_usual_size(args) ? dynamic_conv_forward_kernel<T, Rois, 256, 64>
                                          : dynamic_conv_forward_kernel<T, Rois, 0, 0>;
  launch(kernel, one_block_a_roi(args.rois), dim3(kTileThreads), shared, current_stream(out), args,
         rois, out.mutable_data_ptr<T>());
  return true;
}

}  // namespace sparse_rcnn
