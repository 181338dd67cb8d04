// Operands of cpu/small_gemm_kernels.h, made of stored matrices and of sums. Included level by
// level (see cpu/isa.h): no include guard.
//
// An operand consists of units, what one multiplication takes: a float for float and half, a
// double, and for bfloat16 two values that are adjacent along K (an odd K ends in a zero). Matrices
// that lie in memory as an operand has to are used there; for the others each function is given
// `space`. Columns beyond those of a matrix, up to whole vectors, are zeros in a right operand; one
// made of sums has there what the sums have.

// `count` values, rounded up to whole vectors of A.
template <typename A>
static inline int64_t padded(int64_t count) {
  return (count + lanes<A> - 1) / lanes<A> * lanes<A>;
}

template <typename N>
static inline N smaller(N a, N b) {
  return a < b ? a : b;
}

template <typename N>
static inline N larger(N a, N b) {
  return a > b ? a : b;
}

// The compiler sees through the subtraction of zero, not through an addition, which changes -0.
template <typename A>
static inline Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

// ---- units ----

template <typename T>
struct UnitOf {
  using type = Accumulation<T>;
};
template <>
struct UnitOf<BFloat16Bits> {
  using type = uint32_t;  // the first value in the lower half, as in the memory of x86 and ARM
};
template <typename T>
using Unit = typename UnitOf<T>::type;

template <typename T>
constexpr bool paired = __is_same(Unit<T>, uint32_t);

// What products of units are summed in.
template <typename U>
using Sum = Accumulation<U>;

// How many along K hold `count` values of T.
template <typename T>
static inline int64_t units(int64_t count) {
  return paired<T> ? (count + 1) / 2 : count;
}

template <typename U>
static inline auto load_units(const U* p) {
  if constexpr (__is_same(U, uint32_t)) {
    FloatBits result;
    __builtin_memcpy(&result, p, sizeof(result));
    return result;
  } else {
    return load(p);
  }
}

template <typename V, typename U>
static inline void store_units(U* p, V values) {
  __builtin_memcpy(p, &values, sizeof(values));
}

template <typename U>
struct Operand {
  const U* data;
  int64_t row;     // step from row to row
  int64_t column;  // step from column to column; 1 in a right operand
};

template <typename U>
static inline Operand<U> transposed(Operand<U> operand) {
  return {operand.data, operand.column, operand.row};
}

// ---- moving lanes ----

// Stored 16-bit values that fill a vector.
typedef uint16_t Words __attribute__((vector_size(sizeof(FloatBits))));

template <int kBytes>
struct LaneIndices;
template <>
struct LaneIndices<2> {
  typedef uint16_t type __attribute__((vector_size(sizeof(FloatBits))));
};
template <>
struct LaneIndices<4> {
  typedef uint32_t type __attribute__((vector_size(sizeof(FloatBits))));
};
template <>
struct LaneIndices<8> {
  typedef uint64_t type __attribute__((vector_size(sizeof(FloatBits))));
};

template <typename V>
constexpr int lane_count = sizeof(V) / sizeof(V{}[0]);

template <typename V>
using Lanes = std::make_integer_sequence<int, lane_count<V>>;

// Lanes kFrom.. of a and, counted on, of b.
template <int... kFrom, typename V>
static inline V pick(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, typename LaneIndices<sizeof(a[0])>::type{kFrom...});
#endif
}

template <int kFirst, int... kLane, typename V>
static inline V interleave_from(V a, V b, std::integer_sequence<int, kLane...>) {
  return pick<(kFirst + kLane / 2 + (kLane % 2 ? lane_count<V> : 0))...>(a, b);
}

// a0 b0 a1 b1 ..: of the lower halves of a and b, or of the upper.
template <bool kUpper, typename V>
static inline V interleave(V a, V b) {
  return interleave_from<kUpper ? lane_count<V> / 2 : 0>(a, b, Lanes<V>{});
}

template <int kHalf, int... kLane, typename V>
static inline auto sum_of_lanes(V values, std::integer_sequence<int, kLane...> lane) {
  values += pick<(kLane ^ kHalf)...>(values, values);
  if constexpr (kHalf > 1) {
    return sum_of_lanes<kHalf / 2>(values, lane);
  } else {
    return values[0];
  }
}

template <typename V>
static inline auto sum_of_lanes(V values) {
  return sum_of_lanes<lane_count<V> / 2>(values, Lanes<V>{});
}

// As many vectors as each has lanes, transposed: interleaving rows i and i + kCount / 2 moves every
// bit of an element's place on by one.
template <int kCount, typename V>
static inline void transpose_block(V (&rows)[kCount]) {
  for (int done = 1; done < kCount; done *= 2) {
    V next[kCount];
    for (int i = 0; i < kCount / 2; ++i) {
      next[2 * i] = interleave<false>(rows[i], rows[i + kCount / 2]);
      next[2 * i + 1] = interleave<true>(rows[i], rows[i + kCount / 2]);
    }
    for (int i = 0; i < kCount; ++i) rows[i] = next[i];
  }
}

// ---- rows ----

// `out` has room for whole vectors.
template <typename S, typename A>
static inline void widen_row(const S* values, int64_t count, A* out) {
  int64_t k = 0;
  for (; k + lanes<A> <= count; k += lanes<A>) store(out + k, load(values + k));
  if (k < count) store(out + k, load_part(values + k, static_cast<int>(count - k)));
}

// Neither is touched beyond `count`.
template <typename S, typename T>
static inline void narrow_row(const S* values, int64_t count, T* out) {
  constexpr int step = lanes<Accumulation<T>>;
  int64_t k = 0;
  for (; k + step <= count; k += step) store(out + k, load(values + k));
  const int rest = static_cast<int>(count - k);
  if (rest > 0) store_part(out + k, load_part(values + k, rest), rest);
}

// ---- a [M, K]: units along the rows ----

template <typename T>
static inline int64_t left_space(int64_t rows, int64_t depth) {
  return rows * padded<Accumulation<T>>(depth);
}

// Of values of T or of sums, `step` from row to row.
template <typename T, typename S>
static Operand<Unit<T>> left_operand(const S* values, int64_t step, int64_t rows, int64_t depth,
                                     Unit<T>* space) {
  if constexpr (__is_same(S, Unit<T>)) {
    return {values, step, 1};
  } else if constexpr (!paired<T>) {
    const int64_t row_units = padded<Accumulation<T>>(depth);
    for (int64_t row = 0; row < rows; ++row) {
      widen_row(values + row * step, depth, space + row * row_units);
    }
    return {space, row_units, 1};
  } else {
    if constexpr (__is_same(S, T)) {
      if (step % 2 == 0) return {reinterpret_cast<const Unit<T>*>(values), step / 2, 1};
    }
    const int64_t row_units = units<T>(depth);
    for (int64_t row = 0; row < rows; ++row) {
      T* out = reinterpret_cast<T*>(space + row * row_units);
      narrow_row(values + row * step, depth, out);
      if (depth % 2 != 0) out[depth].bits = 0;
    }
    return {space, row_units, 1};
  }
}

// ---- b [K, N]: units down the columns ----

template <typename T>
static inline int64_t right_space(int64_t depth, int64_t columns) {
  return units<T>(depth) * padded<Accumulation<T>>(columns);
}

// The `count` first words at p, followed by zeros.
static inline Words load_words(const BFloat16Bits* p, int64_t count) {
  Words words = {};
  if (count >= lane_count<Words>) {
    __builtin_memcpy(&words, p, sizeof(words));
  } else {
    __builtin_memcpy(&words, p, count * sizeof(*p));
  }
  return words;
}

// The units of two rows, `values` and `values + step`, or of the first and zeros if it is `single`.
static inline void pair_rows(const BFloat16Bits* values, int64_t step, bool single,
                             int64_t columns, uint32_t* out) {
  constexpr int width = lane_count<Words>;
  for (int64_t n = 0; n < columns; n += width) {
    const Words first = load_words(values + n, columns - n);
    const Words second = single ? Words{} : load_words(values + step + n, columns - n);
    store_units(out + n, interleave<false>(first, second));
    if (n + width / 2 < columns) store_units(out + n + width / 2, interleave<true>(first, second));
  }
}

// The same of sums, in rows of whole vectors.
static inline void pair_rows(const float* values, int64_t step, bool single, int64_t columns,
                             uint32_t* out) {
  for (int64_t n = 0; n < columns; n += lanes<float>) {
    const Vec<float> below = single ? Vec<float>{} : load(values + step + n);
    const FloatBits first = zero_extend(narrow_to_bfloat16(load(values + n)));
    store_units(out + n, first | (zero_extend(narrow_to_bfloat16(below)) << 16));
  }
}

// Of values of T, or of sums in rows of whole vectors; `step` from row to row.
template <typename T, typename S>
static Operand<Unit<T>> right_operand(const S* values, int64_t step, int64_t depth,
                                      int64_t columns, Unit<T>* space) {
  const int64_t row_units = padded<Accumulation<T>>(columns);
  if constexpr (__is_same(S, Unit<T>)) {
    if (step >= row_units) return {values, step, 1};
  }
  if constexpr (paired<T>) {
    for (int64_t k = 0; k < depth; k += 2) {
      const bool single = k + 1 == depth;
      pair_rows(values + k * step, step, single, columns, space + k / 2 * row_units);
    }
  } else {
    for (int64_t k = 0; k < depth; ++k) {
      widen_row(values + k * step, columns, space + k * row_units);
    }
  }
  return {space, row_units, 1};
}

// ---- b [K, N] of a stored matrix [N, K], whose rows become columns ----

template <typename T>
static inline auto load_row_units(const T* p) {
  if constexpr (paired<T>) {
    return same_bits<FloatBits>(load_words(p, lane_count<Words>));
  } else {
    return load(p);
  }
}

// Unit k of a row of `count` values.
template <typename T>
static inline Unit<T> row_unit(const T* row, int64_t k, int64_t count) {
  if constexpr (paired<T>) {
    return row[2 * k].bits | (2 * k + 1 < count ? uint32_t{row[2 * k + 1].bits} << 16 : 0);
  } else {
    return load_part(row + k, 1)[0];
  }
}

template <typename T>
static Operand<Unit<T>> right_operand_of_transposed(const T* values, int64_t depth,
                                                    int64_t columns, Unit<T>* space) {
  constexpr int width = lanes<Accumulation<T>>, unit_values = paired<T> ? 2 : 1;
  const int64_t row_units = padded<Accumulation<T>>(columns), unit_rows = units<T>(depth);
  for (int64_t n = 0; n < columns; n += width) {
    for (int64_t k = 0; k < unit_rows; k += width) {
      if (n + width <= columns && (k + width) * unit_values <= depth) {
        const T* block = values + n * depth + k * unit_values;
        decltype(load_row_units(block)) rows[width];
        for (int i = 0; i < width; ++i) rows[i] = load_row_units(block + i * depth);
        transpose_block(rows);
        for (int i = 0; i < width; ++i) store_units(space + (k + i) * row_units + n, rows[i]);
        continue;
      }
      const int64_t end = smaller<int64_t>(k + width, unit_rows);
      for (int64_t unit = k; unit < end; ++unit) {
        for (int64_t i = n; i < n + width; ++i) {
          space[unit * row_units + i] =
              i < columns ? row_unit(values + i * depth, unit, depth) : Unit<T>{};
        }
      }
    }
  }
  return {space, row_units, 1};
}
