// The backward of the dynamic interaction of one RoI in one block, by tensor cores: bfloat16,
// float16, and float32 in TF32. Recomputes hidden and the statistics, then, with y the input of the
// second LayerNorm and h that of the first,
//
//   dW2 = hidden^T dy    dhidden = dy W2^T    dW1 = x^T dh    dx = dh W1^T
//
// The places of warps are those of the forward: what is as wide as D stays in registers from its
// first product to its gradient; what is as wide as C goes in passes of 32 rows. dy and dh are
// rounded to T once, as operands. Sums over P of the norms' gradients are kept in float. Where
// operands are, and when, is the matter of dynamic_conv_backward_block.cuh.
//
// Budget for P 49, C 256, D 64, two blocks on a multiprocessor of 228 KB, one on one of 100 KB:
//   shared memory  98.6 KB: W1, then W2, then W1 again 36 KB; x 25.8 KB; grad, which dy and then dx
//                  take over, 25.8 KB; hidden, then dh 7 KB; sums 4 KB
//   registers      128, no spills (other sizes: up to 168, one block)
// In TF32, also two blocks: x, grad and dy, x again and dx in turn 51.6 KB; hidden, then dh
// 14.1 KB; weights by way of two buffers 20 KB; a part of h 4 KB; sums and norm2 6 KB: 95.7 KB.
//
// Predicted for an H200, not measured. A RoI moves 96 KB of parameters, 64 KB of their gradients
// and 75 KB of x, grad and dx: 7 us of one of 132 multiprocessors at 4.3 TB/s, against 2.1 us of
// mma and 5.7 us of issue (40,000 warp instructions). 300 RoIs take two waves, 25 us; 4800 take
// 0.26 ms. In TF32 406 KB, 12.5 us, and another 190 KB of weights from L2, against 4 us of mma and
// 11 us of issue: 45 to 60 us, and 0.45 to 0.65 ms.
// budget: dynamic_conv_backward_kernel: 168 registers, 101376 bytes shared, 256 threads
#pragma once

#include "cuda/dynamic_conv_backward_block.cuh"

namespace sparse_rcnn {

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

// grad -> dy, and the second norm's gradients.
template <class T>
__device__ __forceinline__ void backward_to_dy(const BackwardBlock<T>& block,
                                               float* norm2_weight_grad) {
  const int P = block.P, C = block.C;
  const WidePlace place(C);
  float norm_grad[2] = {};
  for (int row = 0; row < P; row += 32) {
    WarpTile<2> y;
    block.multiply_by_w2(y, row, place.columns);
    float rstd[4];
    normalise<WidePlace::kSlots>(y, place.columns, block.buffers, place.rows, place.slot, C,
                                 block.args.eps, rstd);
    norm_backward<WidePlace::kSlots>(
        y, place.columns, block.norm2, block.norm2 + C, block.buffers.gradient, place.rows,
        place.slot, C, rstd, norm_grad, [&](int i, int j, int n) {
          return block.grad_at(row + place.rows[i], place.columns.of(j, n));
        });
    __syncwarp();  // lanes store what their neighbours have just read
    y.store(block.dy, row, P, place.columns);
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
        block.hidden, row, block.dy, place.columns, 0, block.row_depth());
    tile.store(GlobalRows<T>{target, C}, row, D, place.columns);
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
    tile.store(GlobalRows<T>{target, D}, row, C, columns);
  }
}

// kChannels and kInner are args.channels and args.inner if known beforehand, else 0.
template <class T, class Rois, int kChannels, int kInner>
__global__ void __launch_bounds__(kTileThreads, kChannels ? 2 : 1)
    dynamic_conv_backward_kernel(const DynamicConvArgs<T> args, const __grid_constant__ Rois rois,
                                 const DynamicConvGrads<T> grads) {
  const int P = args.bins, C = kChannels ? kChannels : args.channels;
  const int D = kInner ? kInner : args.inner;
  BackwardBlock<T> block(args, grads.grad, C, D, rois.scratch_bytes(), dynamic_shared<char>());
  const int64_t roi = block.roi;

  block.fetch(rois);
  block.clear_last_rows();
  WarpTile<1> h;
  float rstd[2];
  {
    const NarrowPlace place(D);
    block.multiply_by_w1(h, place);
    normalise<NarrowPlace::kSlots>(h, place.columns, block.buffers, place.rows, place.slot, D,
                                   args.eps, rstd);
    block.after_w1();  // the barriers of normalise() have shown that it is used up
    WarpTile<1> hidden = h;
    activate(hidden, place.columns, args.norm1_weight, args.norm1_bias);
    hidden.store(block.hidden, place.row, P, place.columns);
    block.park(h);
  }
  cp_async_wait<0>();
  __syncthreads();

  backward_to_dy(block, grads.grad_norms + roi * 2 * (D + C) + 2 * D);
  __syncthreads();
  T* const grad_w1 = grads.grad_parameters + roi * 2 * C * D;
  backward_w2(block, grad_w1 + int64_t{C} * D);
  const NarrowPlace place(D);  // anew: it would take registers in the meantime
  WarpTile<1> dhidden;
  block.multiply_by_w2_transposed(dhidden, place);
  block.fetch_parked(h);
  float norm_grad[2] = {};
  norm_backward<NarrowPlace::kSlots>(h, place.columns, args.norm1_weight, args.norm1_bias,
                                     block.buffers.gradient, place.rows, place.slot, D, rstd,
                                     norm_grad, [&](int i, int j, int n) {
                                       const float(&value)[4] = dhidden.value[0][j][n];
                                       return Vec<float, 2>{{value[2 * i], value[2 * i + 1]}};
                                     });
  // Its barrier has shown that W2, hidden and dy are used up.
  h.store(block.hidden, place.row, P, place.columns);
  float* const part = block.norm1_parts + place.row / 16 * 2 * D;
  NormGrads::store(norm_grad, part, part + D, place.columns);
  block.fetch_again(rois);
  __syncthreads();

  float* const norm1_grad = grads.grad_norms + roi * 2 * (D + C);
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

// Launches the kernel if it suits.
template <class T, class Rois>
bool launch_backward(const DynamicConvInputs& inputs, const Rois& rois,
                     const DynamicConvGrads<T>& grads, cudaStream_t stream) {
  const DynamicConvArgs<T> args = inputs.args<T>();
  const BackwardPlan<T> plan(args.bins, args.channels, args.inner, rois.scratch_bytes());
  if (!inputs.suits_tensor_cores() || plan.end > kSharedLimit) return false;
  const auto kernel = is_usual_size(args) ? dynamic_conv_backward_kernel<T, Rois, 256, 64>
                                          : dynamic_conv_backward_kernel<T, Rois, 0, 0>;
  launch(kernel, one_block_a_roi(args.rois), dim3(kTileThreads), plan.end, stream, args, rois,
         grads);
  return true;
}

}  // namespace sparse_rcnn
