// The backward of the dynamic interaction of one RoI in one block, by tensor cores: bfloat16 and
// float16. Recomputes hidden and the statistics, then, with y the input of the second LayerNorm and
// h that of the first,
//
//   dW2 = hidden^T dy    dhidden = dy W2^T    dW1 = x^T dh    dx = dh W1^T
//
// The places of warps are those of the forward: what is as wide as D stays in registers from its
// first product to its gradient; what is as wide as C goes in passes of 32 rows. dy and dh are
// rounded to T once, as operands. Sums over P of the norms' gradients are kept in float.
//
// Each tile has a row of zeros after its P rows, which stands for the rows up to the next multiple
// of 16 where P is the depth of a product.
//
// Budget for P 49, C 256, D 64, two blocks on a multiprocessor of 228 KB, one on one of 100 KB:
//   shared memory  98.6 KB: W1, then W2, then W1 again 36 KB; x 25.8 KB; grad, which dy and then dx
//                  take over, 25.8 KB; hidden, then dh 7 KB; sums 4 KB
//   registers      128, no spills (other sizes: up to 168, one block)
//
// Predicted for an H200, not measured. A RoI moves 96 KB of parameters, 64 KB of their gradients
// and 75 KB of x, grad and dx: 7 us of one of 132 multiprocessors at 4.3 TB/s, against 2.1 us of
// mma and 5.7 us of issue (40,000 warp instructions). 300 RoIs take two waves, 25 us; 4800 take
// 0.26 ms.
// budget: dynamic_conv_backward_kernel: 168 registers, 101376 bytes shared, 256 threads
#pragma once

#include "cuda/dynamic_conv_forward.cuh"

namespace sparse_rcnn {

// Byte offsets in shared memory.
template <class T>
struct BackwardPlan {
  size_t sums, x, grad, hidden, end;  // W1 and W2 are at 0

  // `scratch` bytes can be used in the places of x and of grad.
  __host__ __device__ BackwardPlan(int bins, int channels, int inner, size_t scratch) {
    const size_t wide = tile_pitch(channels), narrow = tile_pitch(inner);
    const size_t tile = larger((bins + 1) * wide * sizeof(T), scratch);
    const size_t norm1_parts = 4 * 2 * inner * sizeof(float);
    sums = weight_bytes<T>(channels, inner);
    x = sums + NormSums::kBackward * sizeof(float);
    grad = x + tile;
    hidden = grad + larger(tile, norm1_parts);
    // Products read up to 8 columns beyond the pitch of the last row, for rows of the result that
    // nobody stores.
    end = hidden + ((bins + 1) * narrow + 8) * sizeof(T);
  }
};

// Gradients of a norm's weight and bias, summed over rows: a thread adds values of its four columns
// of a group; reduce() leaves it with one of the eight sums over the rows of the warp.
struct NormGrads {
  float sums[8] = {};  // weight and bias of column 2 n + c in turn

  __device__ __forceinline__ void add(int n, int c, float weight, float bias) {
    sums[4 * n + 2 * c] += weight;
    sums[4 * n + 2 * c + 1] += bias;
  }

  // In three steps a lane gives half of its sums to another lane of the same columns and takes that
  // lane's part of the other half.
  __device__ __forceinline__ float reduce() {
    halve<4>();
    halve<2>();
    halve<1>();
    return sums[0];
  }

  template <int Count>
  __device__ __forceinline__ void halve() {
    constexpr int kMask = 4 * Count;
    const bool upper = threadIdx.x & kMask;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const float given = upper ? sums[i] : sums[i + Count];
      const float kept = upper ? sums[i + Count] : sums[i];
      sums[i] = kept + shfl_xor(given, kMask);
    }
  }

  // Writes what reduce() left the lane with, for both groups, to its place in weight or bias.
  __device__ __forceinline__ static void store(const float (&reduced)[2], float* weight,
                                               float* bias, const WarpColumns& columns) {
    const int mine = static_cast<int>(threadIdx.x) % kWarp / 4;
    float* const target = mine % 2 ? bias : weight;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j < columns.groups) target[columns.of(j, mine / 4) + mine / 2 % 2] = reduced[j];
    }
  }
};

// visit(normalised value, its gradient, the gradient that the ReLU passes, row i, n, c) for group j
// of the columns; grad_at(i, j, n) gives two neighbouring gradients of the output.
template <int RowTiles, class GradAt, class Visit>
__device__ __forceinline__ void for_each_gradient(WarpTile<RowTiles>& tile,
                                                  const WarpColumns& columns, int j,
                                                  const float* weight, const float* bias,
                                                  GradAt grad_at, Visit visit) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const Vec<float, 2> w = load_vec<2>(weight + columns.of(j, n));
    const Vec<float, 2> b = load_vec<2>(bias + columns.of(j, n));
#pragma unroll
    for (int i = 0; i < 2 * RowTiles; ++i) {
      const Vec<float, 2> grad = grad_at(i, j, n);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = tile.value[i / 2][j][n][i % 2 * 2 + c];
        const float passed = x * w[c] + b[c] <= 0 ? 0 : grad[c];
        visit(x, passed * w[c], passed, i, n, c);
      }
    }
  }
}

// Through ReLU, affine part and normalisation: `tile` holds LayerNorm's normalised values and gets
// the gradient of its input. Asks grad_at twice for each value, which costs less than registers to
// keep them. Adds what NormGrads::reduce() gives for these rows to norm_grad.
template <int Slots, int RowTiles, class GradAt>
__device__ __forceinline__ void norm_backward(WarpTile<RowTiles>& tile, const WarpColumns& columns,
                                              const float* weight, const float* bias, float* buffer,
                                              const int (&rows)[2 * RowTiles], int slot, int width,
                                              const float (&rstd)[2 * RowTiles],
                                              float (&norm_grad)[2], GradAt grad_at) {
  constexpr int kRows = 2 * RowTiles;
  float sums[2 * kRows] = {};  // over a row: of the gradient, then of its product with the value
  int places[2 * kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    places[i] = rows[i];
    places[kRows + i] = rows[i] + NormSums::kSum / Slots;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (j >= columns.groups) continue;
    NormGrads norm_grads;
    for_each_gradient(tile, columns, j, weight, bias, grad_at,
                      [&](float& x, float g, float passed, int i, int n, int c) {
                        norm_grads.add(n, c, passed * x, passed);
                        sums[i] += g;
                        sums[kRows + i] += g * x;
                      });
    norm_grad[j] += norm_grads.reduce();
  }
  sum_rows<Slots>(sums, places, slot, buffer);
  const float scale = 1.0f / width;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (j >= columns.groups) continue;
    for_each_gradient(tile, columns, j, weight, bias, grad_at,
                      [&](float& x, float g, float, int i, int, int) {
                        x = rstd[i] * (g - scale * (sums[i] + x * sums[kRows + i]));
                      });
  }
}

template <class T>
__device__ __forceinline__ Vec<float, 2> load_pair(const T* address) {
  const Vec<T, 2> pair = load_vec<2>(address);
  return {{to_acc(pair[0]), to_acc(pair[1])}};
}

// Everything a block knows of its RoI.
template <class T>
struct BackwardBlock {
  const DynamicConvArgs<T>& args;
  int P, C, D;
  int64_t roi;
  Tile<T> x, grad, hidden, w1, w2;  // dy and dx are in grad's place, dh in hidden's
  float* norm1_parts;               // [4, 2 D], in grad's place between dy and dx
  NormSums buffers;

  __device__ BackwardBlock(const DynamicConvArgs<T>& args_, int channels, int inner, size_t scratch,
                           char* shared)
      : args(args_), P(args_.bins), C(channels), D(inner), roi(blockIdx.x), buffers(nullptr) {
    const BackwardPlan<T> plan(P, C, D, scratch);
    const int wide = tile_pitch(C), narrow = tile_pitch(D);
    x = {reinterpret_cast<T*>(shared + plan.x), wide, P};
    grad = {reinterpret_cast<T*>(shared + plan.grad), wide, P};
    hidden = {reinterpret_cast<T*>(shared + plan.hidden), narrow, P};
    w1 = {reinterpret_cast<T*>(shared), narrow, kAllRows};
    w2 = {reinterpret_cast<T*>(shared), wide, kAllRows};
    norm1_parts = reinterpret_cast<float*>(grad.data);
    buffers = NormSums(shared + plan.sums);
  }

  __device__ void copy_w1() const {
    copy_tile_async(w1, args.parameters + roi * 2 * C * D, D, 0, C, 0, D);
    cp_async_commit();
  }
  __device__ void copy_w2() const {
    copy_tile_async(w2, args.parameters + (roi * 2 + 1) * C * D, C, 0, D, 0, C);
    copy_norm2_async(args, C, norm2_place(w2, D));
    cp_async_commit();
  }

  __device__ void clear_last_rows() const {
    for (int i = threadIdx.x; i < larger(C, D); i += kTileThreads) {
      if (i < C) *x.at(P, i) = *grad.at(P, i) = T(0);
      if (i < D) *hidden.at(P, i) = T(0);
    }
  }

  // Depth of the products over the rows.
  __device__ int row_depth() const { return (P + 15) / 16 * 16; }
};

// grad -> dy in its place, and the second norm's gradients.
template <class T>
__device__ __forceinline__ void backward_to_dy(BackwardBlock<T>& block, float* norm2_weight_grad) {
  const DynamicConvArgs<T>& args = block.args;
  const int P = block.P, C = block.C, D = block.D;
  const WidePlace place(C);
  const float* const norm2 = norm2_place(block.w2, D);
  float norm_grad[2] = {};
  for (int row = 0; row < P; row += 32) {
    WarpTile<2> y;
    y.template multiply<Stored::straight, Stored::straight>(block.hidden, row, block.w2,
                                                            place.columns, 0, D);
    float rstd[4];
    normalise<WidePlace::kSlots>(y, place.columns, block.buffers, place.rows, place.slot, C,
                                 args.eps, rstd);
    norm_backward<WidePlace::kSlots>(
        y, place.columns, norm2, norm2 + C, block.buffers.gradient, place.rows, place.slot, C, rstd,
        norm_grad, [&](int i, int j, int n) {
          return load_pair(block.grad.at(row + place.rows[i], place.columns.of(j, n)));
        });
    __syncwarp();  // lanes store what their neighbours have just read
    y.store(block.grad.data, block.grad.pitch, row, P, place.columns);
  }
  NormGrads::store(norm_grad, norm2_weight_grad, norm2_weight_grad + C, place.columns);
}

// dW2 = hidden^T dy
template <class T>
__device__ __forceinline__ void backward_w2(const BackwardBlock<T>& block, T* target) {
  const int C = block.C, D = block.D;
  const WidePlace place(C);
  for (int row = 0; row < D; row += 32) {
    WarpTile<2> tile;
    tile.template multiply<Stored::transposed, Stored::straight>(
        block.hidden, row, block.grad, place.columns, 0, block.row_depth());
    tile.store(target, C, row, D, place.columns);
  }
}

// dW1 = x^T dh: a pair of warps has 32 rows, half of the columns each.
template <class T>
__device__ __forceinline__ void backward_w1(const BackwardBlock<T>& block, T* target) {
  const int C = block.C, D = block.D;
  const int warp = tile_warp();
  const WarpColumns columns = deal_columns(D, warp % 2, 2);
  for (int row = warp / 2 * 32; row < C; row += kTileWarps / 2 * 32) {
    WarpTile<2> tile;
    tile.template multiply<Stored::transposed, Stored::straight>(block.x, row, block.hidden,
                                                                 columns, 0, block.row_depth());
    tile.store(target, D, row, C, columns);
  }
}

// dx = dh W1^T
template <class T>
__device__ __forceinline__ void backward_x(const BackwardBlock<T>& block, T* target, int pitch) {
  const int P = block.P, C = block.C, D = block.D;
  const WidePlace place(C);
  for (int row = 0; row < P; row += 32) {
    WarpTile<2> tile;
    tile.template multiply<Stored::straight, Stored::transposed>(block.hidden, row, block.w1,
                                                                 place.columns, 0, D);
    tile.store(target, pitch, row, P, place.columns);
  }
}

// kChannels and kInner are args.channels and args.inner if known beforehand, else 0.
template <class T, class Rois, int kChannels, int kInner>
__global__ void __launch_bounds__(kTileThreads, kChannels ? 2 : 1)
    dynamic_conv_backward_kernel(const DynamicConvArgs<T> args, const __grid_constant__ Rois rois,
                                 const DynamicConvGrads<T> grads) {
  const int P = args.bins, C = kChannels ? kChannels : args.channels;
  const int D = kInner ? kInner : args.inner;
  BackwardBlock<T> block(args, C, D, rois.scratch_bytes(), dynamic_shared<char>());
  const int64_t roi = block.roi;
  T* const grad_w1 = grads.grad_parameters + roi * 2 * C * D;
  float* const norm1_grad = grads.grad_norms + roi * 2 * (D + C);

  rois.start(block.x, roi, P, C, 0, C);
  block.copy_w1();
  rois.finish(block.x, roi, reinterpret_cast<char*>(block.grad.data));
  copy_tile_async(block.grad, grads.grad + roi * P * C, C, 0, P, 0, C);
  cp_async_commit();
  block.clear_last_rows();
  cp_async_wait<1>();
  __syncthreads();

  const NarrowPlace place(D);
  WarpTile<1> h;
  h.template multiply<Stored::straight, Stored::straight>(block.x, place.row, block.w1,
                                                          place.columns, 0, C);
  float rstd[2];
  normalise<NarrowPlace::kSlots>(h, place.columns, block.buffers, place.rows, place.slot, D,
                                 args.eps, rstd);
  block.copy_w2();  // the barriers of normalise() have shown that W1 is used up
  {
    WarpTile<1> hidden = h;
    activate(hidden, place.columns, args.norm1_weight, args.norm1_bias);
    hidden.store(block.hidden.data, block.hidden.pitch, place.row, P, place.columns);
  }
  cp_async_wait<0>();
  __syncthreads();

  backward_to_dy(block, norm1_grad + 2 * D);
  __syncthreads();
  backward_w2(block, grad_w1 + int64_t{C} * D);
  WarpTile<1> dhidden;
  dhidden.template multiply<Stored::straight, Stored::transposed>(block.grad, place.row, block.w2,
                                                                  place.columns, 0, C);
  float norm_grad[2] = {};
  norm_backward<NarrowPlace::kSlots>(h, place.columns, args.norm1_weight, args.norm1_bias,
                                     block.buffers.gradient, place.rows, place.slot, D, rstd,
                                     norm_grad, [&](int i, int j, int n) {
                                       const float(&value)[4] = dhidden.value[0][j][n];
                                       return Vec<float, 2>{{value[2 * i], value[2 * i + 1]}};
                                     });
  // Its barrier has shown that W2, hidden and dy are used up.
  if (rois.wants_grad()) block.copy_w1();
  h.store(block.hidden.data, block.hidden.pitch, place.row, P, place.columns);
  float* const part = block.norm1_parts + place.row / 16 * 2 * D;
  NormGrads::store(norm_grad, part, part + D, place.columns);
  __syncthreads();

  for (int i = threadIdx.x; i < 2 * D; i += kTileThreads) {
    float sum = 0;
    for (int part = 0; part < 4; ++part) sum += block.norm1_parts[part * 2 * D + i];
    norm1_grad[i] = sum;
  }
  backward_w1(block, grad_w1);
  if (!rois.wants_grad()) return;
  cp_async_wait<0>();
  __syncthreads();
  rois.backward(block);
}

}  // namespace sparse_rcnn
