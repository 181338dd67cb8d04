// Small matrix products by tensor cores: operands are tiles in shared memory, results stay in
// registers until they are normalised and stored. For 16-bit element types T, sums in float.
//
// A warp owns 16 or 32 rows of a result and up to two groups of 16 of its columns (WarpTile). With
// g = lane / 4 and t = lane % 4, a thread's value[m][j][n][v] is the element at row
// 16 m + 8 (v / 2) + g of the warp's rows and column 8 n + 2 t + v % 2 of its group j.
#pragma once

#include "common/cuda.cuh"

namespace sparse_rcnn {

inline constexpr int kTileThreads = 256;  // of the blocks that use this file
inline constexpr int kTileWarps = kTileThreads / kWarp;

// A row-major matrix in shared memory. Rows lie an odd number of 16-byte units apart, so that the
// eight 16-byte pieces of an 8x8 matrix, and the 4-byte accesses of a fragment, hit all banks.
template <class T>
struct Tile {
  T* data;
  int pitch;
  int last_row;  // is read in place of the rows beyond it

  __device__ T* at(int row, int column) const { return data + min(row, last_row) * pitch + column; }
};

inline constexpr int kAllRows = 1 << 30;  // a last_row that stands for no other

// For tiles whose columns are a multiple of 16.
__host__ __device__ constexpr int tile_pitch(int columns) { return columns + 8; }

// Starts copying rows [first, last) and columns [begin, end), multiples of 8, of a matrix in global
// memory to the same place of a tile.
template <class T>
__device__ __forceinline__ void copy_tile_async(const Tile<T>& tile, const T* source, int pitch,
                                                int first, int last, int begin, int end) {
  if (begin >= end) return;
  const int pieces = (end - begin) / 8;  // of 16 bytes in a row
  const int row_step = kTileThreads / pieces, piece_step = kTileThreads % pieces;
  int row = first + static_cast<int>(threadIdx.x) / pieces;
  int piece = static_cast<int>(threadIdx.x) % pieces;
  while (row < last) {
    const int column = begin + 8 * piece;
    cp_async_16(tile.data + row * tile.pitch + column, source + row * pitch + column, true);
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

// The A fragment at row m and depth k: element (m, k) is tile(m, k), or tile(k, m) if transposed.
template <Stored stored, class T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Tile<T>& tile, int m, int k) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if constexpr (stored == Stored::straight) {
    ldmatrix_x4(a, tile.at(m + lane % 16, k + lane / 16 * 8));
  } else {
    ldmatrix_x4_trans(a, tile.at(k + lane / 16 * 8 + lane % 8, m + lane / 8 % 2 * 8));
  }
}

// The B fragments of columns n to n + 15 at depth k: element (k, n) is tile(k, n), or tile(n, k) if
// transposed.
template <Stored stored, class T>
__device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const Tile<T>& tile, int k, int n) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint32_t r[4];
  if constexpr (stored == Stored::straight) {
    ldmatrix_x4_trans(r, tile.at(k + lane % 16, n + lane / 16 * 8));
  } else {
    ldmatrix_x4(r, tile.at(n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
  }
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

  // += A[row.., begin..end) B[begin..end, columns); the depth goes in steps of 16.
  template <Stored a_stored, Stored b_stored, class T>
  __device__ __forceinline__ void multiply(const Tile<T>& a, int row, const Tile<T>& b,
                                           const WarpColumns& columns, int begin, int end) {
    if (columns.groups == 0) return;
#pragma unroll 2
    for (int k = begin; k < end; k += 16) {
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
            mma_m16n8k16<T>(value[m][j][n], a_fragment[m], b_fragment[n]);
          }
      }
    }
  }

  // Rounds the values and writes those of rows first + row(i) < rows to target, in global or shared
  // memory. Neighbouring lanes trade halves first, so that four lanes write 32 adjacent bytes.
  template <class T>
  __device__ __forceinline__ void store(T* target, int pitch, int first, int rows,
                                        const WarpColumns& columns) const {
    const bool odd = threadIdx.x % 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j >= columns.groups) continue;
      const int column = columns.of(j, 0) + (odd ? 6 : 0);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float(&left)[4] = value[i / 2][j][0], (&right)[4] = value[i / 2][j][1];
        const uint32_t low = pack2<T>(left[i % 2 * 2], left[i % 2 * 2 + 1]);
        const uint32_t high = pack2<T>(right[i % 2 * 2], right[i % 2 * 2 + 1]);
        const uint32_t traded = shfl_xor(odd ? low : high, 1);
        if (first + row(i) >= rows) continue;
        const uint64_t words = uint64_t{odd ? high : traded} << 32 | (odd ? traded : low);
        T* const address = target + (first + row(i)) * pitch + column;
        *reinterpret_cast<uint64_t*>(address) = words;
      }
    }
  }
};

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
