// Small matrix products by tensor cores: operands are tiles in shared memory, results stay in
// registers until they are normalised and stored. For element types T of 16 bits, and for float,
// whose operands are rounded to TF32; sums in float.
//
// A warp owns 16 or 32 rows of a result and up to two groups of 16 of its columns (WarpTile). With
// g = lane / 4 and t = lane % 4, a thread's value[m][j][n][v] is the element at row
// 16 m + 8 (v / 2) + g of the warp's rows and column 8 n + 2 t + v % 2 of its group j.
#pragma once

#include "common/cuda.cuh"

namespace sparse_rcnn {

inline constexpr int kTileThreads = 256;  // of the blocks that use this file
inline constexpr int kTileWarps = kTileThreads / kWarp;

// A row-major matrix in shared memory. Rows of 16-bit elements lie an odd number of 16-byte units
// apart, so that the eight 16-byte pieces that ldmatrix reads hit all banks. Rows of floats lie 8
// or 24 banks apart, for the fragments that are read by element, from four rows and eight columns;
// every second four rows are shifted by four banks, for ldmatrix.
template <class T>
struct Tile {
  T* data;
  int pitch;
  int last_row;  // is read in place of the rows beyond it

  // For rows up to last_row.
  __device__ T* place(int row, int column) const {
    const int shift = std::is_same_v<T, float> ? row & 4 : 0;
    return data + row * pitch + shift + column;
  }
  __device__ const T* at(int row, int column) const { return place(min(row, last_row), column); }

  __device__ Tile from_column(int column) const { return {data + column, pitch, last_row}; }
};

inline constexpr int kAllRows = 1 << 30;  // a last_row that stands for no other

// For tiles whose columns are a multiple of 16.
__host__ __device__ constexpr int tile_pitch(int columns) { return columns + 8; }

template <class T>
__host__ __device__ constexpr size_t tile_bytes(int rows, int columns) {
  return rows * tile_pitch(columns) * sizeof(T);
}

// A row-major matrix in global memory.
template <class T, class Index = int>
struct GlobalRows {
  T* data;
  Index pitch;

  __device__ T* place(int row, int column) const { return data + row * pitch + column; }
  __device__ GlobalRows from_column(int column) const { return {data + column, pitch}; }
};

// Starts copying rows [first, last) and columns [begin, end), multiples of 16 bytes, of a matrix in
// global memory to the same place of a tile.
template <class T>
__device__ __forceinline__ void copy_tile_async(const Tile<T>& tile, const T* source, int pitch,
                                                int first, int last, int begin, int end) {
  if (begin >= end) return;
  constexpr int kPiece = kVecWidth<T>;  // of 16 bytes
  const int pieces = (end - begin) / kPiece;  // in a row
  const int row_step = kTileThreads / pieces, piece_step = kTileThreads % pieces;
  int row = first + static_cast<int>(threadIdx.x) / pieces;
  int piece = static_cast<int>(threadIdx.x) % pieces;
  while (row < last) {
    const int column = begin + kPiece * piece;
    cp_async_16(tile.place(row, column), source + row * pitch + column, true);
    row += row_step;
    piece += piece_step;
    if (piece_step > 0 && piece >= pieces) {
      piece -= pieces;
      ++row;
    }
  }
}

// The columns of a result that one warp computes: groups of 16, `stride` apart.
struct WarpColumns {
  int first;
  int stride;
  int groups;  // 0, 1 or 2, the same in all lanes

  // First of the two neighbouring columns that value[..][j][n][..] is of.
  __device__ int of(int j, int n) const {
    return first + j * stride + 8 * n + 2 * (static_cast<int>(threadIdx.x) % 4);
  }
};

// Deals `columns` columns to `warps` warps in turn; there are at most two groups for each.
__device__ __forceinline__ WarpColumns deal_columns(int columns, int warp, int warps) {
  const int left = columns / 16 - warp;
  const bool full = columns == 32 * warps;  // known to the compiler where `columns` is
  return {16 * warp, 16 * warps, full ? 2 : left <= 0 ? 0 : left <= warps ? 1 : 2};
}

// The thread's warp, in a form that the compiler knows to be the same in all lanes.
__device__ __forceinline__ int tile_warp() {
  return shfl(static_cast<int>(threadIdx.x) / kWarp, 0);
}

// Whether an operand lies in its tile as the product has it, or transposed.
enum class Stored { straight, transposed };

// Depth of one mma.
template <class T>
inline constexpr int kMmaDepth = 32 / sizeof(T);

// d += a * b
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>) {
    mma_m16n8k8_tf32(d, a, b);
  } else {
    mma_m16n8k16<T>(d, a, b);
  }
}

// Floats become TF32, to the nearest: mma itself would cut them off.
template <class T>
__device__ __forceinline__ void round_operands(uint32_t (&registers)[4]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (uint32_t& value : registers) value = to_tf32(__uint_as_float(value));
  }
}

// The A fragment at row m and depth k: element (m, k) is tile(m, k), or tile(k, m) if transposed.
template <Stored stored, class T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Tile<T>& tile, int m, int k) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  constexpr int kHalf = kMmaDepth<T> / 2;
  if constexpr (stored == Stored::straight) {
    ldmatrix_x4(a, tile.at(m + lane % 16, k + lane / 16 * kHalf));
  } else if constexpr (!std::is_same_v<T, float>) {
    ldmatrix_x4_trans(a, tile.at(k + lane / 16 * kHalf + lane % 8, m + lane / 8 % 2 * 8));
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      a[r] = __float_as_uint(*tile.at(k + lane % 4 + r / 2 * kHalf, m + lane / 4 + r % 2 * 8));
    }
  }
  round_operands<T>(a);
}

// The B fragments of columns n to n + 15 at depth k: element (k, n) is tile(k, n), or tile(n, k) if
// transposed.
template <Stored stored, class T>
__device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const Tile<T>& tile, int k, int n) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  constexpr int kHalf = kMmaDepth<T> / 2;
  uint32_t r[4];
  if constexpr (stored == Stored::transposed) {
    ldmatrix_x4(r, tile.at(n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * kHalf));
  } else if constexpr (!std::is_same_v<T, float>) {
    ldmatrix_x4_trans(r, tile.at(k + lane % 16, n + lane / 16 * 8));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      r[i] = __float_as_uint(*tile.at(k + lane % 4 + i % 2 * kHalf, n + lane / 4 + i / 2 * 8));
    }
  }
  round_operands<T>(r);
  b[0][0] = r[0];
  b[0][1] = r[1];
  b[1][0] = r[2];
  b[1][1] = r[3];
}

// One warp's share of a result.
template <int RowTiles>
struct WarpTile {
  static constexpr int kRows = 2 * RowTiles;  // that a thread has values of

  float value[RowTiles][2][2][4] = {};

  // The thread's row i, counted from the warp's first.
  __device__ static int row(int i) { return 8 * i + static_cast<int>(threadIdx.x) % kWarp / 4; }

  // visit(value, i, j, n, c) for every value, which is of row(i) and column columns.of(j, n) + c.
  template <class Visit>
  __device__ __forceinline__ void for_each(const WarpColumns& columns, Visit visit) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j >= columns.groups) continue;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int c = 0; c < 2; ++c) visit(value[i / 2][j][n][i % 2 * 2 + c], i, j, n, c);
    }
  }

  // += A[row.., begin..end) B[begin..end, columns); the depth goes in steps of one mma.
  template <Stored a_stored, Stored b_stored, class T>
  __device__ __forceinline__ void multiply(const Tile<T>& a, int row, const Tile<T>& b,
                                           const WarpColumns& columns, int begin, int end) {
    if (columns.groups == 0) return;
#pragma unroll 1
    for (int k = begin; k < end; k += kMmaDepth<T>) {
      uint32_t a_fragment[RowTiles][4];
#pragma unroll
      for (int m = 0; m < RowTiles; ++m) load_a<a_stored>(a_fragment[m], a, row + 16 * m, k);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (j >= columns.groups) continue;
        uint32_t b_fragment[2][2];
        load_b<b_stored>(b_fragment, b, k, columns.first + j * columns.stride);
#pragma unroll
        for (int m = 0; m < RowTiles; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            mma<T>(value[m][j][n], a_fragment[m], b_fragment[n]);
          }
      }
    }
  }

  // Rounds the values to the target's type and writes those of rows first + row(i) < rows, to a
  // Tile or GlobalRows. Four lanes write 32 adjacent bytes: of 16-bit types, neighbours trade
  // halves for that first.
  template <class Target>
  __device__ __forceinline__ void store(const Target& target, int first, int rows,
                                        const WarpColumns& columns) const {
    using T = std::remove_reference_t<decltype(*target.data)>;
    const bool odd = threadIdx.x % 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j >= columns.groups) continue;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float(&left)[4] = value[i / 2][j][0], (&right)[4] = value[i / 2][j][1];
        const int c = i % 2 * 2, row_at = first + row(i);
        if constexpr (std::is_same_v<T, float>) {
          if (row_at >= rows) continue;
          const Vec<float, 2> first_pair{{left[c], left[c + 1]}};
          const Vec<float, 2> second_pair{{right[c], right[c + 1]}};
          store_vec(target.place(row_at, columns.of(j, 0)), first_pair);
          store_vec(target.place(row_at, columns.of(j, 1)), second_pair);
        } else {
          const uint32_t low = pack2<T>(left[c], left[c + 1]);
          const uint32_t high = pack2<T>(right[c], right[c + 1]);
          const uint32_t traded = shfl_xor(odd ? low : high, 1);
          if (row_at >= rows) continue;
          const uint64_t words = uint64_t{odd ? high : traded} << 32 | (odd ? traded : low);
          T* const address = target.place(row_at, columns.of(j, 0) + (odd ? 6 : 0));
          *reinterpret_cast<uint64_t*>(address) = words;
        }
      }
    }
  }
};

// An operand that comes in pieces of up to `step` of its `total` rows or columns: one piece is used
// while the next is copied, into `buffer` and `other` in turn. copy(first, count, tile) starts the
// copies of a piece. All threads of the block take part.
template <class T, class Copy>
struct Pieces {
  int total, step;
  Tile<T> buffer;
  T* other;
  Copy copy;

  // Call it when nothing reads or writes the buffers any more; other work may follow before use().
  __device__ __forceinline__ void start() const {
    copy(0, min(step, total), buffer);
    cp_async_commit();
  }

  // visit(first, count, tile) for one piece after the other; ends with a barrier. Waits for all
  // copies that were committed before start() as well.
  template <class Visit>
  __device__ __forceinline__ void use(Visit visit) const {
    Tile<T> current = buffer, next = buffer;
    next.data = other;
#pragma unroll 1
    for (int first = 0; first < total; first += step) {
      const int left = total - first - step;
      if (left > 0) copy(first + step, min(step, left), next);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
      visit(first, min(step, total - first), current);
      __syncthreads();
      T* const used = current.data;
      current.data = next.data;
      next.data = used;
    }
  }
};

// The rows of a matrix in global memory as pieces.
template <class T>
__device__ __forceinline__ auto row_pieces(const T* source, int rows, int step, int columns,
                                           T* buffer, T* other) {
  const auto copy = [=](int first, int count, const Tile<T>& piece) {
    copy_tile_async(piece, source + first * columns, columns, 0, count, 0, columns);
  };
  const Tile<T> tile{buffer, tile_pitch(columns), kAllRows};
  return Pieces<T, decltype(copy)>{rows, step, tile, other, copy};
}

// Its columns as pieces.
template <class T>
__device__ __forceinline__ auto column_pieces(const T* source, int columns, int step, int rows,
                                              T* buffer, T* other) {
  const auto copy = [=](int first, int count, const Tile<T>& piece) {
    copy_tile_async(piece, source + first, columns, 0, rows, 0, count);
  };
  const Tile<T> tile{buffer, tile_pitch(step), kAllRows};
  return Pieces<T, decltype(copy)>{columns, step, tile, other, copy};
}

// Sums over rows that several warps share, by way of `buffer` in shared memory (rows * Slots a
// sum). All threads of the block take part; `sums[i]`, over the thread's own columns, belongs to
// row rows[i] and to the warp's `slot` among the Slots warps of that row. Every thread leaves with
// the whole sums of its rows. One barrier: between two uses of a buffer there must be another one.
template <int Slots, int Count>
__device__ __forceinline__ void sum_rows(float (&sums)[Count], const int (&rows)[Count], int slot,
                                         float* buffer) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    sums[i] = warp_sum<4>(sums[i]);
    if (threadIdx.x % 4 == 0) buffer[rows[i] * Slots + slot] = sums[i];
  }
  __syncthreads();
  // The four lanes of a row share the work where there are enough slots for it.
  constexpr bool kShared = Slots >= 8;
  constexpr int kWidth = kShared ? Slots / 4 : Slots;
  const int first = kShared ? kWidth * (static_cast<int>(threadIdx.x) % 4) : 0;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const Vec<float, kWidth> part = load_vec<kWidth>(buffer + rows[i] * Slots + first);
    sums[i] = part[0];
#pragma unroll
    for (int k = 1; k < kWidth; ++k) sums[i] += part[k];
    if constexpr (kShared) sums[i] = warp_sum<4>(sums[i]);
  }
}

}  // namespace sparse_rcnn
