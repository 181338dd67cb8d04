// Products of small matrices that stay in a core's cache. Included level by level (see cpu/isa.h),
// after cpu/small_gemm_operands.h, which says what units and operands are: no include guard.
//
//   c [M, N] = a [M, K] * b [K, N]
//
// Units of type U are summed in Sum<U>. `a` may have any steps, so that a transposed matrix is read
// where it lies; a row of `b` lies in whole vectors. K counts units.

// ---- one multiplication ----

static inline Vec<float> broadcast_unit(const float* p) { return broadcast(*p); }
static inline Vec<double> broadcast_unit(const double* p) { return broadcast(*p); }
static inline FloatBits broadcast_unit(const uint32_t* p) {
  uint32_t value;  // a row of bfloat16 may begin between two words
  __builtin_memcpy(&value, p, sizeof(value));
  return value - FloatBits{};
}

// Two bfloat16 are multiplied and added by one instruction of avx512_bf16, elsewhere one by one.
template <typename U>
constexpr int unit_parts =
    __is_same(U, uint32_t) && SPARSE_RCNN_LEVEL < SPARSE_RCNN_AVX512_BF16 ? 2 : 1;

template <typename U, int kPart, typename V>
static inline auto unit_part(V values) {
  if constexpr (unit_parts<U> == 1) {
    return values;
  } else if constexpr (kPart == 0) {
    return same_bits<Vec<float>>(values << 16);
  } else {
    return same_bits<Vec<float>>(values & 0xffff0000u);
  }
}

template <typename V>
static inline V multiply_add(V a, V b, V sum) {
  return fused_multiply_add(a, b, sum);
}
#if SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512_BF16
static inline Vec<float> multiply_add(FloatBits a, FloatBits b, Vec<float> sum) {
  return _mm512_dpbf16_ps(sum, same_bits<__m512bh>(a), same_bits<__m512bh>(b));
}
#endif

// ---- memory to fetch in the meantime ----

// In every step along K: as many as bring the next operands in time, of pairs in half the steps; more
// would hold up the products.
template <typename U>
constexpr int fetched_lines = __is_same(U, uint32_t) ? 2 : 1;

struct Fetch {
  const char* first;
  int64_t step;
};

// What to fetch in the course of `steps`; `otherwise`, over and over, when nothing is left.
template <typename U>
static inline Fetch take_ahead(Ahead& ahead, int64_t steps, const void* otherwise) {
  constexpr int64_t bytes = 64 * fetched_lines<U>;
  while (ahead.current < ahead.count) {
    Ahead::Range& range = ahead.ranges[ahead.current];
    if (range.next < range.end) {
      const char* first = range.next;
      range.next += bytes * steps;
      return {first, bytes};
    }
    ++ahead.current;
  }
  return {static_cast<const char*>(otherwise), 0};
}

// ---- a tile of c in registers ----

// As many sums as fit the registers beside the operands: 32 of them on AVX512, else 16. The 49 bins
// of a RoI are seven times 7 rows, or nine times 5 and 4. (Of 7 times 4 sums one passes through the
// stack in every step; behind float products that does not show, behind products of pairs it does.)
constexpr int tile_vectors = SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512 ? 4 : 2;
template <typename U>
constexpr int tile_rows =
    SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512 && !__is_same(U, uint32_t) ? 7 : 5;

template <typename U, int kPart, int kRows, int kVectors, typename V>
static inline __attribute__((always_inline)) void add_products(
    const U* a, int64_t a_row, const V* b, Vec<Sum<U>> (&sums)[kRows][kVectors]) {
  for (int i = 0; i < kRows; ++i) {
    const auto left = unit_part<U, kPart>(broadcast_unit(a + i * a_row));
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = multiply_add(left, unit_part<U, kPart>(b[j]), sums[i][j]);
    }
  }
}

template <typename U, int kRows, int kVectors>
static __attribute__((noinline)) void multiply_tile(Operand<U> a, const U* b, int64_t b_row,
                                                    int64_t depth, Fetch fetch, Sum<U>* c,
                                                    int64_t c_row) {
  Vec<Sum<U>> sums[kRows][kVectors] = {};
  const U* left = a.data;
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load_units(b)) right[kVectors];
    for (int j = 0; j < kVectors; ++j) right[j] = load_units(b + j * lanes<Sum<U>>);
    add_products<U, 0>(left, a.row, right, sums);
    if constexpr (unit_parts<U> == 2) add_products<U, 1>(left, a.row, right, sums);
    for (int line = 0; line < fetched_lines<U>; ++line) {
      __builtin_prefetch(fetch.first + 64 * line, 0, 2);
    }
    fetch.first += fetch.step;
    left += a.column;
    b += b_row;
  }
  // Unrolled by decree: left a loop, it would have the sums copied to the stack first.
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(c + i * c_row + j * lanes<Sum<U>>, sums[i][j]);
  }
}

// kVectors of columns of c, kRows by kRows, what is left in smaller tiles.
template <typename U, int kRows, int kVectors>
static inline void multiply_rows(Operand<U> a, Operand<U> b, int64_t rows, int64_t depth,
                                 Ahead& ahead, Sum<U>* c, int64_t c_row) {
  for (; rows >= kRows; rows -= kRows) {
    const Fetch fetch = take_ahead<U>(ahead, depth, c);
    multiply_tile<U, kRows, kVectors>(a, b.data, b.row, depth, fetch, c, c_row);
    a.data += kRows * a.row;
    c += kRows * c_row;
  }
  if constexpr (kRows > 1) {
    constexpr int fewer = kRows > tile_rows<U> ? tile_rows<U> : kRows > 4 ? 4 : kRows / 2;
    if (rows > 0) multiply_rows<U, fewer, kVectors>(a, b, rows, depth, ahead, c, c_row);
  }
}

// `columns`, of c and of b, are whole vectors.
template <typename U, int kVectors = tile_vectors>
static void multiply(Operand<U> a, Operand<U> b, int64_t rows, int64_t columns, int64_t depth,
                     Ahead& ahead, Sum<U>* c, int64_t c_row) {
  constexpr int width = kVectors * lanes<Sum<U>>;
  // A single vector of columns needs twice the rows to have enough sums that do not wait.
  constexpr int height = (kVectors == 1 ? 2 : 1) * tile_rows<U>;
  for (; columns >= width; columns -= width) {
    multiply_rows<U, height, kVectors>(a, b, rows, depth, ahead, c, c_row);
    b.data += width;
    c += width;
  }
  if constexpr (kVectors > 1) {
    if (columns > 0) multiply<U, kVectors / 2>(a, b, rows, columns, depth, ahead, c, c_row);
  }
}

// c [M, N] of stored values or of sums, of any N, without gaps.
template <typename U, typename Out>
static void multiply_to(Operand<U> a, Operand<U> b, int64_t rows, int64_t columns, int64_t depth,
                        Ahead& ahead, Out* c) {
  if constexpr (__is_same(Out, Sum<U>)) {
    if (columns % lanes<Sum<U>> == 0) {
      return multiply(a, b, rows, columns, depth, ahead, c, columns);
    }
  }
  constexpr int width = tile_vectors * lanes<Sum<U>>;
  alignas(64) Sum<U> tile[tile_rows<U> * width];
  for (int64_t column = 0; column < columns; column += width) {
    const int64_t count = smaller<int64_t>(width, columns - column);
    for (int64_t row = 0; row < rows; row += tile_rows<U>) {
      const int64_t height = smaller<int64_t>(tile_rows<U>, rows - row);
      const Operand<U> left = {a.data + row * a.row, a.row, a.column};
      const Operand<U> right = {b.data + column, b.row, 1};
      multiply(left, right, height, padded<Sum<U>>(count), depth, ahead, tile, width);
      for (int64_t i = 0; i < height; ++i) {
        narrow_row(tile + i * width, count, c + (row + i) * columns + column);
      }
    }
  }
}
