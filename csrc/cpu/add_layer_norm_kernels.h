// Rows of add_layer_norm; compiled once for each level of cpu/isa.h. The scratch row holds C
// values, rounded up to whole vectors, and stays in the first-level cache from pass to pass.

// The first `count` values at p, or, known to the compiler, a whole vector of them.
template <bool whole, typename T>
static inline Vec<Accumulation<T>> load_some(const T* p, int count) {
  if constexpr (whole) return load(p);
  return load_part(p, count);
}

template <bool whole, typename T>
static inline void store_some(T* p, Vec<Accumulation<T>> values, int count) {
  if constexpr (whole) {
    store(p, values);
  } else {
    store_part(p, values, count);
  }
}

static inline float square_root(float x) { return __builtin_sqrtf(x); }
static inline double square_root(double x) { return __builtin_sqrt(x); }

template <bool whole, bool add, typename T, typename A = Accumulation<T>>
static inline Vec<A> add_residual(const T* x, const T* residual, A* row, int c, int count) {
  Vec<A> value = load_some<whole>(x + c, count);
  if constexpr (add) value += load_some<whole>(residual + c, count);
  store(row + c, value);
  return value;
}

// row = x + residual, returning the mean. The row's last vector is filled up with the mean.
template <bool add, typename T, typename A = Accumulation<T>>
static inline A sum_row(const T* x, const T* residual, int channels, A* row) {
  constexpr int step = lanes<A>, ways = Sums<A>::ways;
  Sums<A> sums;
  int c = 0;
  for (; c + ways * step <= channels; c += ways * step) {
    for (int k = 0; k < ways; ++k) {
      sums.parts[k] += add_residual<true, add>(x, residual, row, c + k * step, step);
    }
  }
  for (; c + step <= channels; c += step) {
    sums.parts[0] += add_residual<true, add>(x, residual, row, c, step);
  }
  if (c < channels) sums.parts[0] += add_residual<false, add>(x, residual, row, c, channels - c);
  const A mean = sums.total() / static_cast<A>(channels);
  for (c = channels; c % step != 0; ++c) {
    row[c] = mean;  // its deviation counts nothing
  }
  return mean;
}

template <typename A>
struct Statistics {
  A mean;
  A rstd;  // the reciprocal of the standard deviation
};

// row = x + residual, and its statistics: the variance from the deviations, never from the squares
// of the values.
template <typename T, typename A = Accumulation<T>>
static inline Statistics<A> measure(const T* x, const T* residual, A eps, int channels, A* row) {
  constexpr int step = lanes<A>, ways = Sums<A>::ways;
  const A mean = residual ? sum_row<true>(x, residual, channels, row)
                          : sum_row<false>(x, residual, channels, row);
  Sums<A> squares;
  int c = 0;
  for (; c + ways * step <= channels; c += ways * step) {
    for (int k = 0; k < ways; ++k) {
      const Vec<A> deviation = load(row + c + k * step) - mean;
      squares.parts[k] = fused_multiply_add(deviation, deviation, squares.parts[k]);
    }
  }
  for (; c < channels; c += step) {
    const Vec<A> deviation = load(row + c) - mean;
    squares.parts[0] = fused_multiply_add(deviation, deviation, squares.parts[0]);
  }
  return {mean, A(1) / square_root(squares.total() / static_cast<A>(channels) + eps)};
}

template <bool whole, typename T, typename A = Accumulation<T>>
static inline void write_normal(const A* row, Statistics<A> of, const A* weight, const A* bias,
                                bool relu, int c, int count, T* out) {
  const Vec<A> scale = load_some<whole>(weight + c, count) * of.rstd;
  const Vec<A> shift = load_some<whole>(bias + c, count);
  const Vec<A> value = fused_multiply_add(load(row + c) - of.mean, scale, shift);
  // The comparison keeps NaN, as PyTorch's ReLU does.
  store_some<whole>(out + c, relu ? (value < A(0) ? Vec<A>{} : value) : value, count);
}

template <typename T, typename A = Accumulation<T>>
static void add_layer_norm_rows(const T* x, const T* residual, const A* weight, const A* bias,
                                A eps, bool relu, int64_t rows, int channels, A* row, T* out) {
  constexpr int step = lanes<A>;
  for (int64_t r = 0; r < rows; ++r) {
    const Statistics<A> of = measure(x, residual, eps, channels, row);
    int c = 0;
    for (; c + step <= channels; c += step) {
      write_normal<true>(row, of, weight, bias, relu, c, step, out);
    }
    if (c < channels) write_normal<false>(row, of, weight, bias, relu, c, channels - c, out);
    x += channels;
    residual += residual ? channels : 0;
    out += channels;
  }
}
