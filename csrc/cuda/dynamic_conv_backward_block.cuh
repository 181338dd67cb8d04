// What a block of the backward has of its RoI in shared memory, and the products with W1 and W2.
//
// In 16 bits x, grad and a whole W1 or W2 are there at once. In TF32 everything is twice as large:
// x and grad take turns, so that x is fetched, or pooled, a second time; weights come in pieces.
//
// Each tile has a row of zeros after its P rows, which stands for the rows up to the next multiple
// of an mma's depth where P is the depth of a product.
#pragma once

#include "cuda/dynamic_conv_forward.cuh"

namespace sparse_rcnn {

// Byte offsets in shared memory.
template <class T>
struct BackwardPlan {
  size_t sums, x, grad, hidden, end;  // W1 and W2 are at 0

  // `scratch` bytes can be used in the places of x and of grad.
  __host__ __device__ BackwardPlan(int bins, int channels, int inner, size_t scratch) {
    const size_t tile = larger(tile_bytes<T>(bins + 1, channels), scratch);
    const size_t norm1_parts = 4 * 2 * inner * sizeof(float);
    sums = larger(tile_bytes<T>(channels, inner), w2_bytes<T>(channels, inner));
    x = sums + NormSums::kBackward * sizeof(float);
    grad = x + tile;
    hidden = grad + larger(tile, norm1_parts);
    // Products read up to 8 columns beyond the pitch of the last row, for rows of the result that
    // nobody stores.
    end = hidden + tile_bytes<T>(bins + 1, inner) + 8 * sizeof(T);
  }
};

// Pieces of weights in TF32: rows of W1, rows of W2, columns of W2.
inline constexpr int kPieceOfW1 = 32, kRowsOfW2 = 8, kColumnsOfW2 = 32;

template <>
struct BackwardPlan<float> {
  size_t norm2, parked, pieces, x, hidden, scratch, end;  // sums are at 0

  // What depends on the bins comes last: other places are constants where the sizes are, which
  // saves registers.
  __host__ __device__ BackwardPlan(int bins, int channels, int inner, size_t scratch_bytes) {
    norm2 = NormSums::kBackward * sizeof(float);
    parked = norm2 + 2 * channels * sizeof(float);
    pieces = parked + kTileThreads * sizeof(Vec<float, 4>);
    x = pieces + 2 * piece_bytes(channels, inner);
    hidden = x + tile_bytes<float>(bins + 1, channels);
    // Beyond the last row as above, which may be a shifted one.
    scratch = hidden + tile_bytes<float>(bins + 1, inner) + 12 * sizeof(float);
    end = scratch + scratch_bytes;
  }

  __host__ __device__ static constexpr size_t piece_bytes(int channels, int inner) {
    return larger(tile_bytes<float>(kPieceOfW1, inner),
                  larger(tile_bytes<float>(kRowsOfW2, channels),
                         tile_bytes<float>(inner, kColumnsOfW2)));
  }
};

// What both forms of a BackwardBlock have.
template <class T>
struct BackwardTiles {
  const DynamicConvArgs<T>& args;
  int P, C, D;
  int64_t roi;
  const T *w1_source, *w2_source;
  const T* grad_source;
  Tile<T> x, dy, hidden;  // dy takes the place of grad, then dx that of dy; dh that of hidden
  float* norm2;           // weight and bias
  float* norm1_parts;     // [4, 2 D], between dy and dx
  NormSums buffers;

  __device__ BackwardTiles(const DynamicConvArgs<T>& args_, const T* grad, int channels, int inner)
      : args(args_),
        P(args_.bins),
        C(channels),
        D(inner),
        roi(blockIdx.x),
        w1_source(args_.parameters + roi * 2 * C * D),
        w2_source(w1_source + C * D),
        grad_source(grad + roi * P * C),
        buffers(nullptr) {}

  __device__ void copy_grad() const {
    copy_tile_async(dy, grad_source, C, 0, P, 0, C);
    cp_async_commit();
  }
  __device__ Vec<float, 2> grad_at(int row, int column) const {
    const Vec<T, 2> pair = load_vec<2>(dy.at(row, column));
    return {{to_acc(pair[0]), to_acc(pair[1])}};
  }

  __device__ void clear_last_rows() const {
    for (int i = threadIdx.x; i < larger(C, D); i += kTileThreads) {
      if (i < C) *x.place(P, i) = *dy.place(P, i) = T(0);
      if (i < D) *hidden.place(P, i) = T(0);
    }
  }

  // Depth of the products over the rows.
  __device__ int row_depth() const {
    return (P + kMmaDepth<T> - 1) / kMmaDepth<T> * kMmaDepth<T>;
  }
};

// 16 bits: W1, W2 and again W1 come whole, each as soon as the one before is used up.
template <class T>
struct BackwardBlock : BackwardTiles<T> {
  using Tiles = BackwardTiles<T>;
  using Tiles::args, Tiles::P, Tiles::C, Tiles::D, Tiles::roi, Tiles::x, Tiles::dy, Tiles::hidden;

  Tile<T> w1, w2;
  char* scratch;  // for the use of dx

  __device__ BackwardBlock(const DynamicConvArgs<T>& args_, const T* grad, int channels, int inner,
                           size_t scratch_bytes, char* shared)
      : Tiles(args_, grad, channels, inner) {
    const BackwardPlan<T> plan(P, C, D, scratch_bytes);
    const int wide = tile_pitch(C), narrow = tile_pitch(D);
    x = {reinterpret_cast<T*>(shared + plan.x), wide, P};
    dy = {reinterpret_cast<T*>(shared + plan.grad), wide, P};
    hidden = {reinterpret_cast<T*>(shared + plan.hidden), narrow, P};
    w1 = {reinterpret_cast<T*>(shared), narrow, kAllRows};
    w2 = {reinterpret_cast<T*>(shared), wide, kAllRows};
    scratch = reinterpret_cast<char*>(x.data);
    this->norm2 = norm2_place(w2, D);
    this->norm1_parts = reinterpret_cast<float*>(dy.data);
    this->buffers = NormSums(shared + plan.sums);
  }

  template <class Rois>
  __device__ void fetch(const Rois& rois) const {
    rois.start(x, roi, P, C, 0, C);
    copy_w1();
    rois.finish(x, roi, reinterpret_cast<char*>(dy.data));
    this->copy_grad();
  }
  template <class Rois>
  __device__ void fetch_again(const Rois& rois) const {
    if (rois.wants_grad()) copy_w1();
  }
  __device__ void copy_w1() const {
    copy_tile_async(w1, this->w1_source, D, 0, C, 0, D);
    cp_async_commit();
  }
  __device__ void after_w1() const {
    copy_tile_async(w2, this->w2_source, C, 0, D, 0, C);
    copy_norm2_async(args, C, this->norm2);
    cp_async_commit();
  }

  __device__ void park(const WarpTile<1>& /*h*/) const {}
  __device__ void fetch_parked(WarpTile<1>& /*h*/) const {}

  // += x W1, once x and W1 are there
  __device__ __forceinline__ void multiply_by_w1(WarpTile<1>& h, const NarrowPlace& place) const {
    cp_async_wait<1>();
    __syncthreads();
    h.template multiply<Stored::straight, Stored::straight>(x, place.row, w1, place.columns, 0, C);
  }
  // += hidden W2, from `row` on
  __device__ __forceinline__ void multiply_by_w2(WarpTile<2>& y, int row,
                                                 const WarpColumns& columns) const {
    y.template multiply<Stored::straight, Stored::straight>(hidden, row, w2, columns, 0, D);
  }
  // += dy W2^T
  __device__ __forceinline__ void multiply_by_w2_transposed(WarpTile<1>& dhidden,
                                                            const NarrowPlace& place) const {
    dhidden.template multiply<Stored::straight, Stored::transposed>(dy, place.row, w2,
                                                                    place.columns, 0, C);
  }
  // dx = dh W1^T, to a Tile or GlobalRows
  template <class Target>
  __device__ __forceinline__ void backward_x(const Target& target) const {
    const WidePlace place(C);
    for (int row = 0; row < P; row += 32) {
      WarpTile<2> tile;
      tile.template multiply<Stored::straight, Stored::transposed>(hidden, row, w1, place.columns,
                                                                   0, D);
      tile.store(target, row, P, place.columns);
    }
  }
};

// TF32
template <>
struct BackwardBlock<float> : BackwardTiles<float> {
  float *piece, *other_piece;
  float* parked;  // of the thread
  char* scratch;  // for x to be fetched, and for the use of dx

  __device__ BackwardBlock(const DynamicConvArgs<float>& args_, const float* grad, int channels,
                           int inner, size_t scratch_bytes, char* shared)
      : BackwardTiles<float>(args_, grad, channels, inner) {
    const BackwardPlan<float> plan(P, C, D, scratch_bytes);
    x = dy = {reinterpret_cast<float*>(shared + plan.x), tile_pitch(C), P};
    hidden = {reinterpret_cast<float*>(shared + plan.hidden), tile_pitch(D), P};
    buffers = NormSums(shared);
    norm2 = reinterpret_cast<float*>(shared + plan.norm2);
    norm1_parts = buffers.mean;  // and the variances' place
    piece = reinterpret_cast<float*>(shared + plan.pieces);
    parked = reinterpret_cast<float*>(shared + plan.parked) + 4 * threadIdx.x;
    scratch = shared + plan.scratch;
    other_piece = piece + plan.piece_bytes(C, D) / sizeof(float);
  }

  template <class Rois>
  __device__ void fetch(const Rois& rois) const {
    rois.start(x, roi, P, C, 0, C);
    cp_async_commit();
    rois.finish(x, roi, scratch);
  }
  template <class Rois>
  __device__ void fetch_again(const Rois& rois) const {
    fetch(rois);
    cp_async_wait<0>();
  }
  __device__ void after_w1() const {
    copy_norm2_async(args, C, norm2);
    copy_grad();
  }

  // A quarter of h is out of the registers while y, which needs almost all, is in them.
  __device__ void park(const WarpTile<1>& h) const {
    const float(&value)[4] = h.value[0][1][1];
    store_vec(parked, Vec<float, 4>{{value[0], value[1], value[2], value[3]}});
  }
  __device__ void fetch_parked(WarpTile<1>& h) const {
    const Vec<float, 4> value = load_vec<4>(parked);
#pragma unroll
    for (int i = 0; i < 4; ++i) h.value[0][1][1][i] = value[i];
  }

  __device__ __forceinline__ void multiply_by_w1(WarpTile<1>& h, const NarrowPlace& place) const {
    const auto w1 = row_pieces(w1_source, C, kPieceOfW1, D, piece, other_piece);
    w1.start();
    w1.use([&](int first, int count, const Tile<float>& w) {
      h.multiply<Stored::straight, Stored::straight>(x.from_column(first), place.row, w,
                                                     place.columns, 0, count);
    });
  }
  __device__ __forceinline__ void multiply_by_w2(WarpTile<2>& y, int row,
                                                 const WarpColumns& columns) const {
    const auto w2 = row_pieces(w2_source, D, kRowsOfW2, C, piece, other_piece);
    w2.start();
    w2.use([&](int first, int count, const Tile<float>& w) {
      y.multiply<Stored::straight, Stored::straight>(hidden.from_column(first), row, w, columns,
                                                     0, count);
    });
  }
  __device__ __forceinline__ void multiply_by_w2_transposed(WarpTile<1>& dhidden,
                                                            const NarrowPlace& place) const {
    const auto w2 = column_pieces(w2_source, C, kColumnsOfW2, D, piece, other_piece);
    w2.start();
    w2.use([&](int first, int count, const Tile<float>& w) {
      dhidden.multiply<Stored::straight, Stored::transposed>(dy.from_column(first), place.row,
                                                             w, place.columns, 0, count);
    });
  }
  template <class Target>
  __device__ __forceinline__ void backward_x(const Target& target) const {
    const auto w1 = row_pieces(w1_source, C, kPieceOfW1, D, piece, other_piece);
    w1.start();
    w1.use([&](int first, int count, const Tile<float>& w) {
      const NarrowPlace place(count);
      WarpTile<1> tile;
      tile.multiply<Stored::straight, Stored::transposed>(hidden, place.row, w, place.columns,
                                                          0, D);
      tile.store(target.from_column(first), place.row, P, place.columns);
    });
  }
};

}  // namespace sparse_rcnn
