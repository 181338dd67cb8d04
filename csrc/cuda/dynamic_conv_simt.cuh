// The dynamic interaction, forward and backward, of any size and element type without tensor cores:
// float64, float32 unless TF32 is allowed (products are exact FMAs), and all types where the sizes
// do not suit the tensor-core kernels.
//
// A block takes one RoI after another. Intermediates are kept in the accumulation type in a
// workspace: dynamic shared memory if it fits, else a slot of global memory for each block. Results
// of products go in 64 x 64 pieces, 4 x 4 a thread, operands by way of shared memory in 64 x 16.
//
// Budget in float32 for P 49, C 256, D 64, two blocks on a multiprocessor of 228 KB, one on one of
// 100 KB: shared memory 69.8 KB (forward) and 82.4 KB (backward), of which 8.5 KB for staging;
// registers 128 at most, no spills. float64 has one block and up to 218 registers.
//
// Predicted for an H200, not measured: 3.2 (forward) and 9.6 (backward) MFLOP a RoI, padded from 49
// to 64 rows, at half of the FMA peak of 67 TFLOP/s: 38 and 115 us for 300 RoIs.
// budget: dynamic_conv_forward_simt_kernel: 176 registers, 101376 bytes shared, 256 threads
// budget: dynamic_conv_backward_simt_kernel: 240 registers, 101376 bytes shared, 256 threads
#pragma once

#include <algorithm>

#include "cuda/dynamic_conv.cuh"

namespace sparse_rcnn {

inline constexpr int kSimtThreads = 256;
inline constexpr int kSimtSide = 64;   // of a piece of the result
inline constexpr int kSimtDepth = 16;  // staged at a time
inline constexpr int kSimtPitch = kSimtSide + 4;
inline constexpr int kSimtStaging = 2 * kSimtDepth * kSimtPitch;  // elements
template <class T>
inline constexpr int kSimtBlocks = std::is_same_v<T, double> ? 1 : 2;  // a multiprocessor

// Which index of an operand runs along memory: threads read along it.
enum class Along { depth, side };

// One operand's 64 x 16 piece, on its way from memory to the staging buffer [depth][side].
template <class A, Along along>
struct SimtPiece {
  static constexpr int kPerThread = kSimtSide * kSimtDepth / kSimtThreads;

  A value[kPerThread];

  __device__ static int depth_of(int i) {
    const int t = static_cast<int>(threadIdx.x);
    return along == Along::depth ? t % kSimtDepth : t / kSimtSide + i * (kSimtThreads / kSimtSide);
  }
  __device__ static int side_of(int i) {
    const int t = static_cast<int>(threadIdx.x);
    return along == Along::side ? t % kSimtSide : t / kSimtDepth + i * (kSimtThreads / kSimtDepth);
  }

  // element(side, depth), zero outside of sides x depths.
  template <class Element>
  __device__ __forceinline__ void load(Element element, int side, int sides, int depth,
                                       int depths) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int s = side + side_of(i), d = depth + depth_of(i);
      value[i] = s < sides && d < depths ? element(s, d) : A(0);
    }
  }

  __device__ __forceinline__ void stage(A* staging) const {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) staging[depth_of(i) * kSimtPitch + side_of(i)] = value[i];
  }
};

// store(m, n, sum over k < K of a(m, k) * b(n, k)) for m < M, n < N. Barriers: none of the operands
// may be written until all threads have left, nor read before what wrote them has passed a barrier.
template <Along a_along, Along b_along, class Acc, class A, class B, class Store>
__device__ __forceinline__ void simt_product(int M, int N, int K, A a, B b, Store store,
                                             Acc* staging) {
  Acc* const a_staging = staging;
  Acc* const b_staging = staging + kSimtDepth * kSimtPitch;
  const int m_first = static_cast<int>(threadIdx.x) / 16 * 4;
  const int n_first = static_cast<int>(threadIdx.x) % 16 * 4;
  for (int m = 0; m < M; m += kSimtSide) {
    for (int n = 0; n < N; n += kSimtSide) {
      Acc sums[4][4] = {};
      SimtPiece<Acc, a_along> a_piece;
      SimtPiece<Acc, b_along> b_piece;
      a_piece.load(a, m, M, 0, K);
      b_piece.load(b, n, N, 0, K);
      for (int k = 0; k < K; k += kSimtDepth) {
        __syncthreads();
        a_piece.stage(a_staging);
        b_piece.stage(b_staging);
        __syncthreads();
        if (k + kSimtDepth < K) {  // fetched while this one is used
          a_piece.load(a, m, M, k + kSimtDepth, K);
          b_piece.load(b, n, N, k + kSimtDepth, K);
        }
#pragma unroll 4
        for (int d = 0; d < kSimtDepth; ++d) {
          const Vec<Acc, 4> av = load_vec<4>(a_staging + d * kSimtPitch + m_first);
          const Vec<Acc, 4> bv = load_vec<4>(b_staging + d * kSimtPitch + n_first);
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i][j] += av[i] * bv[j];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (m + m_first + i < M && n + n_first + j < N) {
            store(m + m_first + i, n + n_first + j, sums[i][j]);
          }
        }
    }
  }
}

// visit(row) for the rows that the warp has.
template <class Visit>
__device__ __forceinline__ void for_each_warp_row(int rows, Visit visit) {
  // By shfl() the compiler knows that lanes stay together, as the sums of a row want them.
  const int warp = shfl(static_cast<int>(threadIdx.x) / kWarp, 0);
  for (int row = warp; row < rows; row += kSimtThreads / kWarp) visit(row);
}

// Sum of term(column) over the columns, by a warp.
template <class A, class Term>
__device__ __forceinline__ A sum_columns(int columns, Term term) {
  A sum = 0;
  for (int c = static_cast<int>(threadIdx.x) % kWarp; c < columns; c += kWarp) sum += term(c);
  return warp_sum(sum);
}

template <class Visit>
__device__ __forceinline__ void for_each_lane_column(int columns, Visit visit) {
  for (int c = static_cast<int>(threadIdx.x) % kWarp; c < columns; c += kWarp) visit(c);
}

// LayerNorm of each row in place, without its affine part; the reciprocal standard deviations to
// rstd, unless it is null.
template <class A>
__device__ __forceinline__ void simt_normalise(A* values, A* rstd, int rows, int columns, A eps) {
  for_each_warp_row(rows, [&](int p) {
    A* const row = values + int64_t{p} * columns;
    const A mean = sum_columns<A>(columns, [&](int c) { return row[c]; }) / columns;
    const A variance =
        sum_columns<A>(columns, [&](int c) { return (row[c] - mean) * (row[c] - mean); }) / columns;
    const A scale = inverse_sqrt(variance + eps);
    for_each_lane_column(columns, [&](int c) { row[c] = (row[c] - mean) * scale; });
    if (rstd != nullptr && threadIdx.x % kWarp == 0) rstd[p] = scale;
  });
}

// Through ReLU, affine part and normalisation. grad(p, c) is the gradient of the output; that of
// LayerNorm's input goes to result, whose element (p, c) may be what grad(p, c) reads. The
// gradients of weight and bias, summed over the rows, go to norm_grad[0..2 * columns).
template <class A, class Grad>
__device__ __forceinline__ void simt_norm_backward(const A* normal, const A* rstd, const A* weight,
                                                   const A* bias, int rows, int columns, Grad grad,
                                                   A* norm_grad, A* result) {
  const auto passed = [&](int p, int c) {
    const A output = normal[int64_t{p} * columns + c] * weight[c] + bias[c];
    return output <= 0 ? A(0) : grad(p, c);
  };
  for (int c = threadIdx.x; c < columns; c += kSimtThreads) {
    A weight_grad = 0, bias_grad = 0;
    for (int p = 0; p < rows; ++p) {
      const A g = passed(p, c);
      weight_grad += g * normal[int64_t{p} * columns + c];
      bias_grad += g;
    }
    norm_grad[c] = weight_grad;
    norm_grad[columns + c] = bias_grad;
  }
  __syncthreads();
  for_each_warp_row(rows, [&](int p) {
    const A* const row = normal + int64_t{p} * columns;
    const A mean =
        sum_columns<A>(columns, [&](int c) { return passed(p, c) * weight[c]; }) / columns;
    const A slope =
        sum_columns<A>(columns, [&](int c) { return passed(p, c) * weight[c] * row[c]; }) / columns;
    for_each_lane_column(columns, [&](int c) {
      const A g = passed(p, c) * weight[c];
      result[int64_t{p} * columns + c] = rstd[p] * (g - mean - row[c] * slope);
    });
  });
}

// Where a block keeps its intermediates: behind the staging buffer, or in global memory.
template <class A>
struct SimtWorkspace {
  A* global;            // null: shared memory
  int64_t global_size;  // elements a block

  __device__ A* staging() const { return dynamic_shared<A>(); }
  __device__ A* data() const {
    return global == nullptr ? dynamic_shared<A>() + kSimtStaging
                             : global + int64_t{blockIdx.x} * global_size;
  }
};

inline int64_t simt_forward_elements(const DynamicConvSizes& sizes) {
  return sizes.bins * (sizes.channels + sizes.inner);
}

inline int64_t simt_backward_elements(const DynamicConvSizes& sizes) {
  return sizes.bins * (sizes.channels + 2 * sizes.inner + 2);
}

// How a SIMT kernel with a workspace of so many elements is launched.
template <class A>
struct SimtLaunch {
  static constexpr int64_t kBlocks = 264;  // with a workspace in global memory: two on each SM

  SimtWorkspace<A> workspace = {};
  Tensor memory;
  dim3 grid;
  size_t shared_bytes = kSimtStaging * sizeof(A);

  SimtLaunch(const DynamicConvInputs& inputs, int64_t elements)
      : grid(one_block_a_roi(inputs.rois)) {
    if (shared_bytes + elements * sizeof(A) <= kSharedLimit) {
      shared_bytes += elements * sizeof(A);
      return;
    }
    const int64_t blocks = std::min(kBlocks, inputs.rois);
    memory = torch::stable::new_empty(inputs.norms[0], {blocks, elements});
    workspace = {memory.mutable_data_ptr<A>(), elements};
    grid = one_block_a_roi(blocks);
  }
};

// The RoI features of one RoI come from a source: `fetch` gives where they are, which may be
// `place` of [P, C] elements; all threads of the block call it, and what is in `place` lasts until
// the place is used otherwise. `grad_place` gives where dx is to go, `backward` disposes of it.
template <class T>
struct SimtStoredRois {
  const T* data;
  T* grad;

  __device__ const T* fetch(int64_t roi, int64_t size, acc_t<T>* /*place*/,
                            acc_t<T>* /*staging*/) const {
    return data + roi * size;
  }
  __device__ T* grad_place(int64_t roi, int64_t size, acc_t<T>* /*place*/) const {
    return grad + roi * size;
  }
  __device__ void backward(int64_t /*roi*/, int64_t /*size*/, acc_t<T>* /*place*/,
                           acc_t<T>* /*staging*/) const {}
};

// One RoI: its sizes, parameters and the block's memory.
template <class T>
struct SimtRoi {
  using A = acc_t<T>;

  int64_t index;
  int P, C, D;
  const T *w1, *w2;
  A *normal2, *normal1;  // normalised values of the LayerNorms, [P, C] and [P, D]
  A* staging;

  __device__ SimtRoi(const DynamicConvArgs<T>& args, int64_t roi, const SimtWorkspace<A>& workspace)
      : index(roi),
        P(args.bins),
        C(args.channels),
        D(args.inner),
        w1(args.parameters + roi * 2 * C * D),
        w2(w1 + int64_t{C} * D),
        normal2(workspace.data()),
        normal1(normal2 + size()),
        staging(workspace.staging()) {}

  __device__ int64_t size() const { return int64_t{P} * C; }
  __device__ A w1_at(int c, int d) const { return to_acc(w1[int64_t{c} * D + d]); }
  __device__ A w2_at(int d, int c) const { return to_acc(w2[int64_t{d} * C + c]); }
  // Element of a matrix [P, C] or [P, D].
  template <class E>
  __device__ A wide_at(const E* values, int p, int c) const {
    return to_acc(values[int64_t{p} * C + c]);
  }
  template <class E>
  __device__ A narrow_at(const E* values, int p, int d) const {
    return to_acc(values[int64_t{p} * D + d]);
  }
};

// Fills normal1 and normal2, and rstd1 and rstd2 unless they are null.
template <class T, class Rois>
__device__ __forceinline__ void simt_forward(const DynamicConvArgs<T>& args, const Rois& rois,
                                             const SimtRoi<T>& roi, acc_t<T>* rstd1,
                                             acc_t<T>* rstd2) {
  using A = acc_t<T>;
  const int P = roi.P, C = roi.C, D = roi.D;
  const T* const x = rois.fetch(roi.index, roi.size(), roi.normal2, roi.staging);
  simt_product<Along::depth, Along::side>(
      P, D, C, [&](int p, int c) { return roi.wide_at(x, p, c); },
      [&](int d, int c) { return roi.w1_at(c, d); },
      [&](int p, int d, A sum) { roi.normal1[int64_t{p} * D + d] = sum; }, roi.staging);
  __syncthreads();
  simt_normalise(roi.normal1, rstd1, P, D, args.eps);
  __syncthreads();
  simt_product<Along::depth, Along::side>(
      P, C, D,
      [&](int p, int d) {
        return relu(roi.narrow_at(roi.normal1, p, d) * args.norm1_weight[d] + args.norm1_bias[d]);
      },
      [&](int c, int d) { return roi.w2_at(d, c); },
      [&](int p, int c, A sum) { roi.normal2[int64_t{p} * C + c] = sum; }, roi.staging);
  __syncthreads();
  simt_normalise(roi.normal2, rstd2, P, C, args.eps);
  __syncthreads();
}

template <class T, class Rois>
__global__ void __launch_bounds__(kSimtThreads, kSimtBlocks<T>)
    dynamic_conv_forward_simt_kernel(const DynamicConvArgs<T> args,
                                     const __grid_constant__ Rois rois, T* out,
                                     const SimtWorkspace<acc_t<T>> workspace) {
  using A = acc_t<T>;
  for (int64_t r = blockIdx.x; r < args.rois; r += gridDim.x) {
    const SimtRoi<T> roi(args, r, workspace);
    simt_forward<T>(args, rois, roi, nullptr, nullptr);
    for_each_warp_row(roi.P, [&](int p) {
      for_each_lane_column(roi.C, [&](int c) {
        const A value = roi.wide_at(roi.normal2, p, c) * args.norm2_weight[c] + args.norm2_bias[c];
        out[r * roi.size() + int64_t{p} * roi.C + c] = from_acc<T>(relu(value));
      });
    });
    __syncthreads();
  }
}

template <class T, class Rois>
__device__ __forceinline__ void simt_backward(const DynamicConvArgs<T>& args, const Rois& rois,
                                              const SimtRoi<T>& roi, const T* grad, T* grad_w1,
                                              T* grad_w2, acc_t<T>* grad_norms) {
  using A = acc_t<T>;
  const int P = roi.P, C = roi.C, D = roi.D;
  A* const dh = roi.normal1 + int64_t{P} * D;
  A* const rstd1 = dh + int64_t{P} * D;
  A* const rstd2 = rstd1 + P;
  simt_forward<T>(args, rois, roi, rstd1, rstd2);

  A* const dy = roi.normal2;  // in its place
  simt_norm_backward(
      roi.normal2, rstd2, args.norm2_weight, args.norm2_bias, P, C,
      [&](int p, int c) { return roi.wide_at(grad, p, c); }, grad_norms + 2 * D, dy);
  __syncthreads();
  simt_product<Along::side, Along::side>(
      D, C, P,
      [&](int d, int p) {
        return relu(roi.narrow_at(roi.normal1, p, d) * args.norm1_weight[d] + args.norm1_bias[d]);
      },
      [&](int c, int p) { return roi.wide_at(dy, p, c); },
      [&](int d, int c, A sum) { grad_w2[int64_t{d} * C + c] = from_acc<T>(sum); }, roi.staging);
  simt_product<Along::depth, Along::depth>(
      P, D, C, [&](int p, int c) { return roi.wide_at(dy, p, c); },
      [&](int d, int c) { return roi.w2_at(d, c); },
      [&](int p, int d, A sum) { dh[int64_t{p} * D + d] = sum; }, roi.staging);
  __syncthreads();
  simt_norm_backward(
      roi.normal1, rstd1, args.norm1_weight, args.norm1_bias, P, D,
      [&](int p, int d) { return roi.narrow_at(dh, p, d); }, grad_norms, dh);
  __syncthreads();
  const T* const x = rois.fetch(roi.index, roi.size(), roi.normal2, roi.staging);
  simt_product<Along::side, Along::side>(
      C, D, P, [&](int c, int p) { return roi.wide_at(x, p, c); },
      [&](int d, int p) { return roi.narrow_at(dh, p, d); },
      [&](int c, int d, A sum) { grad_w1[int64_t{c} * D + d] = from_acc<T>(sum); }, roi.staging);
  T* const dx = rois.grad_place(roi.index, roi.size(), roi.normal2);
  if (dx == nullptr) return;
  __syncthreads();
  simt_product<Along::depth, Along::depth>(
      P, C, D, [&](int p, int d) { return roi.narrow_at(dh, p, d); },
      [&](int c, int d) { return roi.w1_at(c, d); },
      [&](int p, int c, A sum) { dx[int64_t{p} * C + c] = from_acc<T>(sum); }, roi.staging);
  rois.backward(roi.index, roi.size(), roi.normal2, roi.staging);
}

template <class T, class Rois>
__global__ void __launch_bounds__(kSimtThreads, kSimtBlocks<T>)
    dynamic_conv_backward_simt_kernel(const DynamicConvArgs<T> args,
                                      const __grid_constant__ Rois rois,
                                      const DynamicConvGrads<T> grads,
                                      const SimtWorkspace<acc_t<T>> workspace) {
  for (int64_t r = blockIdx.x; r < args.rois; r += gridDim.x) {
    const SimtRoi<T> roi(args, r, workspace);
    T* const grad_w1 = grads.grad_parameters + r * 2 * roi.C * roi.D;
    simt_backward<T>(args, rois, roi, grads.grad + r * roi.size(), grad_w1,
                     grad_w1 + int64_t{roi.C} * roi.D, grads.grad_norms + r * 2 * (roi.D + roi.C));
    __syncthreads();
  }
}

}  // namespace sparse_rcnn
