// Rows of add_layer_norm and of its gradient; compiled once for each level of cpu/isa.h. Scratch rows hold C values,
// rounded up to whole vectors, and stay in the first-level cache from pass to pass.

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

// Halves until few are left: the additions of a half do not wait for one another.
template <typename A, int count>
static inline A sum_of_array(const A* values) {
  if constexpr (count == 1) {
    return values[0];
  } else {
    A halves[count / 2];
    for (int i = 0; i < count / 2; ++i) {
      halves[i] = values[i] + values[i + count / 2];
    }
    return sum_of_array<A, count / 2>(halves);
  }
}

template <typename A>
static inline A sum_of(Vec<A> values) {
  A array[lanes<A>];
  store(array, values);
  return sum_of_array<A, lanes<A>>(array);
}

// Several sums side by side: one alone would wait for each addition before the next.
template <typename A>
struct Sums {
  static constexpr int ways = 4;
  Vec<A> parts[ways] = {};

  inline A total() const { return sum_of<A>((parts[0] + parts[1]) + (parts[2] + parts[3])); }
};

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

// row = x + residual, and its statistics: the variance from the deviations, never from the squares of the values.
template <typename T, typename A = Accumulation<T>>
static inline Statistics<A> measure(const T* x, const T* residual, A eps, int channels, A* row) {
  constexpr int step = lanes<A>, ways = Sums<A>::ways;
  const A mean = residual ? sum_row<true>(x, residual, channels, row) : sum_row<false>(x, residual, channels, row);
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
static inline void write_normal(const A* row, Statistics<A> of, const A* weight, const A* bias, bool relu, int c,
                                int count, T* out) {
  const Vec<A> scale = load_some<whole>(weight + c, count) * of.rstd;
  const Vec<A> value = fused_multiply_add(load(row + c) - of.mean, scale, load_some<whole>(bias + c, count));
  // The comparison keeps NaN, as PyTorch's ReLU does.
  store_some<whole>(out + c, relu ? (value < A(0) ? Vec<A>{} : value) : value, count);
}

template <typename T, typename A = Accumulation<T>>
static void add_layer_norm_rows(const T* x, const T* residual, const A* weight, const A* bias, A eps, bool relu,
                                int64_t rows, int channels, A* row, T* out) {
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

// The gradient that comes in, after the ReLU's share.
template <bool whole, typename T, typename A = Accumulation<T>>
static inline Vec<A> incoming(const T* grad, const NormGradient<A>& to, Vec<A> normal, Vec<A> weight, int c,
                              int count) {
  const Vec<A> g = load_some<whole>(grad + c, count);
  if (!to.relu) return g;
  const Vec<A> value = fused_multiply_add(normal, weight, load_some<whole>(to.bias + c, count));
  return value <= A(0) ? Vec<A>{} : g;
}

// One vector of `count_rows` rows: adds to the gradients of weight and bias, to `sums` the normalised rows' gradients
// and to `dots` their products with the normalised rows.
template <int count_rows, bool whole, typename T, typename A = Accumulation<T>>
static inline void add_vector(const T* grad, const NormGradient<A>& to, const Statistics<A>* of, int c, int count,
                              Vec<A>* sums, Vec<A>* dots) {
  const Vec<A> weight = load_some<whole>(to.weight + c, count);
  Vec<A> grad_weight = load_some<whole>(to.grad_weight + c, count);
  Vec<A> grad_bias = load_some<whole>(to.grad_bias + c, count);
  for (int r = 0; r < count_rows; ++r) {
    const Vec<A> normal = (load(to.rows + r * to.pitch + c) - of[r].mean) * of[r].rstd;
    const Vec<A> g = incoming<whole>(grad + int64_t{r} * to.channels, to, normal, weight, c, count);
    const Vec<A> grad_normal = g * weight;
    grad_weight = fused_multiply_add(g, normal, grad_weight);
    grad_bias += g;
    sums[r] += grad_normal;
    dots[r] = fused_multiply_add(grad_normal, normal, dots[r]);
  }
  store_some<whole>(to.grad_weight + c, grad_weight, count);
  store_some<whole>(to.grad_bias + c, grad_bias, count);
}

template <bool whole, typename T, typename A = Accumulation<T>>
static inline void write_grad(const T* grad, const NormGradient<A>& to, const A* row, Statistics<A> of, A mean,
                              A slope, int c, int count, T* grad_x) {
  const Vec<A> weight = load_some<whole>(to.weight + c, count);
  const Vec<A> normal = (load(row + c) - of.mean) * of.rstd;
  const Vec<A> g = incoming<whole>(grad, to, normal, weight, c, count) * weight;
  store_some<whole>(grad_x + c, (g - mean - normal * slope) * of.rstd, count);
}

// Several rows at once: the gradients of weight and bias are loaded and stored once for all of them.
template <int count_rows, typename T, typename A = Accumulation<T>>
static inline void add_layer_norm_backward_some(const T* grad, const T* x, const T* residual, A eps,
                                                const NormGradient<A>& to, T* grad_x) {
  constexpr int step = lanes<A>;
  const int channels = to.channels;
  Statistics<A> of[count_rows];
  Vec<A> sums[count_rows] = {}, dots[count_rows] = {};
  for (int r = 0; r < count_rows; ++r) {
    const int64_t offset = int64_t{r} * channels;
    of[r] = measure(x + offset, residual ? residual + offset : residual, eps, channels, to.rows + r * to.pitch);
  }
  int c = 0;
  for (; c + step <= channels; c += step) {
    add_vector<count_rows, true>(grad, to, of, c, step, sums, dots);
  }
  if (c < channels) add_vector<count_rows, false>(grad, to, of, c, channels - c, sums, dots);
  for (int r = 0; r < count_rows; ++r) {
    const int64_t offset = int64_t{r} * channels;
    const A* row = to.rows + r * to.pitch;
    const A mean = sum_of<A>(sums[r]) / static_cast<A>(channels);
    const A slope = sum_of<A>(dots[r]) / static_cast<A>(channels);
    for (c = 0; c + step <= channels; c += step) {
      write_grad<true>(grad + offset, to, row, of[r], mean, slope, c, step, grad_x + offset);
    }
    if (c < channels) {
      write_grad<false>(grad + offset, to, row, of[r], mean, slope, c, channels - c, grad_x + offset);
    }
  }
}

template <typename T, typename A = Accumulation<T>>
static void add_layer_norm_backward_rows(const T* grad, const T* x, const T* residual, A eps, int64_t rows,
                                         const NormGradient<A>& to, T* grad_x) {
  constexpr int at_once = NormGradient<A>::rows_at_once;
  for (int64_t r = 0; r < rows;) {
    const bool many = rows - r >= at_once;
    const int64_t offset = r * to.channels;
    const T* other = residual ? residual + offset : residual;
    if (many) {
      add_layer_norm_backward_some<at_once>(grad + offset, x + offset, other, eps, to, grad_x + offset);
    } else {
      add_layer_norm_backward_some<1>(grad + offset, x + offset, other, eps, to, grad_x + offset);
    }
    r += many ? at_once : 1;
  }
}
