// Products of small matrices that stay in a core's cache; included level by level (see cpu/isa.h): no include guard.
//
//   c [M, N] = a [M, K] * b [K, N],  summed in Accumulation<T>
//
// Both operands consist of units (see cpu/small_gemm_operands.h, included before), and K counts them: a float, a double
// or two bfloat16 that avx512_bf16 multiplies and adds in one instruction. `a` may have any steps, so that a transposed
// matrix is read where it lies; a row of `b` lies in whole vectors.

// The compiler sees through the subtraction of zero, not through an addition, which would change -0.
template <typename A>
static inline Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

// ---- one multiplication ----

static inline Vec<float> broadcast_unit(const float* p) { return broadcast(*p); }
static inline Vec<double> broadcast_unit(const double* p) { return broadcast(*p); }
static inline FloatBits broadcast_unit(const uint32_t* p) {
  uint32_t value;  // a row of bfloat16 may begin between two words
  __builtin_memcpy(&value, p, sizeof(value));
  return value - FloatBits{};
}

// A multiplication of units takes unit_steps<T> steps, each on its own part of them.
template <typename T>
constexpr int unit_steps = paired<T> && SPARSE_RCNN_LEVEL < SPARSE_RCNN_AVX512_BF16 ? 2 : 1;

template <typename T, int kStep, typename V>
static inline auto unit_part(V values) {
  if constexpr (unit_steps<T> == 1) {
    return values;
  } else if constexpr (kStep == 0) {
    return same_bits<Vec<float>>(values << 16);
  } else {
    return same_bits<Vec<float>>(values & 0xffff0000u);
  }
}

static inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> sum) {
  return fused_multiply_add(a, b, sum);
}
static inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> sum) {
  return fused_multiply_add(a, b, sum);
}
#if SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512_BF16
static inline Vec<float> multiply_add(FloatBits a, FloatBits b, Vec<float> sum) {
  return _mm512_dpbf16_ps(sum, same_bits<__m512bh>(a), same_bits<__m512bh>(b));
}
#endif

// ---- a tile of c in registers ----

// As many sums as fit the registers beside the operands: 32 of them on AVX512, else 16. The 49 bins of a RoI are seven
// times 7 rows or nine times 5 and 4. (7 rows take units of b from memory, which products of pairs cannot.)
constexpr int tile_vectors = SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512 ? 4 : 2;
template <typename T>
constexpr int tile_rows = SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512 && !paired<T> ? 7 : 5;

// Cache lines fetched in every step of a product, and from where on.
constexpr int fetched_lines = SPARSE_RCNN_FETCH;
struct Fetch {
  const char* first;
  int64_t step;
};

// What to fetch in the course of `steps`; `otherwise`, over and over, when there is nothing left.
static inline Fetch take_ahead(Ahead& ahead, int64_t steps, const void* otherwise) {
  constexpr int64_t bytes = 64 * fetched_lines;
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

template <typename T, int kStep, int kRows, int kVectors, typename V>
static inline __attribute__((always_inline)) void add_products(const Unit<T>* a, int64_t a_row, const V* b,
                                                               Vec<Accumulation<T>> (&sums)[kRows][kVectors]) {
  for (int i = 0; i < kRows; ++i) {
    const auto left = unit_part<T, kStep>(broadcast_unit(a + i * a_row));
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = multiply_add(left, unit_part<T, kStep>(b[j]), sums[i][j]);
    }
  }
}

template <typename T, int kRows, int kVectors>
static __attribute__((noinline)) void multiply_tile(Operand<T> a, const Unit<T>* b, int64_t b_row, int64_t depth,
                                                    Fetch fetch, Accumulation<T>* c, int64_t c_row) {
  using A = Accumulation<T>;
  Vec<A> sums[kRows][kVectors] = {};
  const Unit<T>* left = a.data;
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load_units(b)) right[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      right[j] = load_units(b + j * lanes<A>);
    }
    add_products<T, 0>(left, a.row, right, sums);
    if constexpr (unit_steps<T> == 2) add_products<T, 1>(left, a.row, right, sums);
    for (int line = 0; line < fetched_lines; ++line) {
      __builtin_prefetch(fetch.first + 64 * line, 0, 2);
    }
    fetch.first += fetch.step;
    left += a.column;
    b += b_row;
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      store(c + i * c_row + j * lanes<A>, sums[i][j]);
    }
  }
}

// kVectors of columns of c, kRows by kRows, what is left in smaller tiles.
template <typename T, int kRows, int kVectors>
static inline void multiply_rows(Operand<T> a, Operand<T> b, int64_t rows, int64_t depth, Ahead& ahead,
                                 Accumulation<T>* c, int64_t c_row) {
  for (; rows >= kRows; rows -= kRows) {
    multiply_tile<T, kRows, kVectors>(a, b.data, b.row, depth, take_ahead(ahead, depth, c), c, c_row);
    a.data += kRows * a.row;
    c += kRows * c_row;
  }
  if constexpr (kRows > 1) {
    constexpr int fewer = kRows > tile_rows<T> ? tile_rows<T> : kRows > 4 ? 4 : kRows / 2;
    if (rows > 0) multiply_rows<T, fewer, kVectors>(a, b, rows, depth, ahead, c, c_row);
  }
}

// `columns` of c (and of b) are whole vectors.
template <typename T, int kVectors = tile_vectors>
static void multiply(Operand<T> a, Operand<T> b, int64_t rows, int64_t columns, int64_t depth, Ahead& ahead,
                     Accumulation<T>* c, int64_t c_row) {
  constexpr int width = kVectors * lanes<Accumulation<T>>;
  for (; columns >= width; columns -= width) {
    // A single vector of columns needs twice the rows to have enough sums to overlap.
    multiply_rows<T, (kVectors == 1 ? 2 : 1) * tile_rows<T>, kVectors>(a, b, rows, depth, ahead, c, c_row);
    b.data += width;
    c += width;
  }
  if constexpr (kVectors > 1) {
    if (columns > 0) multiply<T, kVectors / 2>(a, b, rows, columns, depth, ahead, c, c_row);
  }
}

// c [M, N] without gaps, of the type Out, from any N.
template <typename T, typename Out>
static void multiply_to(Operand<T> a, Operand<T> b, int64_t rows, int64_t columns, int64_t depth, Ahead& ahead,
                        Out* c) {
  using A = Accumulation<T>;
  if constexpr (__is_same(Out, A)) {
    if (columns % lanes<A> == 0) return multiply<T>(a, b, rows, columns, depth, ahead, c, columns);
  }
  constexpr int width = tile_vectors * lanes<A>;
  alignas(64) A tile[tile_rows<T> * width];
  for (int64_t column = 0; column < columns; column += width) {
    const int64_t count = smaller<int64_t>(width, columns - column);
    for (int64_t row = 0; row < rows; row += tile_rows<T>) {
      const int64_t height = smaller<int64_t>(tile_rows<T>, rows - row);
      const Operand<T> left = {a.data + row * a.row, a.row, a.column}, right = {b.data + column, b.row, 1};
      multiply<T>(left, right, height, padded<A>(count), depth, ahead, tile, width);
      for (int64_t i = 0; i < height; ++i) {
        narrow_row(tile + i * width, count, c + (row + i) * columns + column);
      }
    }
  }
}
