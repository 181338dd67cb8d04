// The dynamic interaction of one RoI and its gradient, for cpu/for_each_isa.h (its rules:
// cpu/isa.h). Needs cpu/dynamic_conv.h. What lies between inputs and outputs is in `memory` of the
// calling thread, small enough for the core's cache.
#include "cpu/small_gemm_operands.h"
// Second, as it uses the first.
#include "cpu/small_gemm_kernels.h"

// ---- the thread's memory ----

// Hands out pieces of it; from address 0 on it only counts.
struct Space {
  uintptr_t address;
  int64_t used;
};

template <typename U>
static inline U* take(Space& space, int64_t count) {
  U* piece = reinterpret_cast<U*>(space.address + space.used);
  space.used += (count * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
  return piece;
}

// ---- LayerNorm and ReLU of rows of sums, which have whole vectors ----

static inline float square_root(float x) { return __builtin_sqrtf(x); }
static inline double square_root(double x) { return __builtin_sqrt(x); }

// The sum of a row, or of its squares; in two chains of additions, which overlap.
template <bool kSquares, typename A>
static inline A sum_of_row(const A* row, int64_t width) {
  Vec<A> sums[2] = {};
  for (int64_t k = 0; k < width; k += 2 * lanes<A>) {
    const Vec<A> first = load(row + k);
    sums[0] = kSquares ? fused_multiply_add(first, first, sums[0]) : sums[0] + first;
    if (k + lanes<A> < width) {
      const Vec<A> second = load(row + k + lanes<A>);
      sums[1] = kSquares ? fused_multiply_add(second, second, sums[1]) : sums[1] + second;
    }
  }
  return sum_of_lanes(sums[0] + sums[1]);
}

// Each row less its mean, zeros beyond `count`; rstd: the reciprocals of the standard deviations.
// Pass by pass over all rows: while the sum of one is waited for, the next ones are added.
template <typename A>
static void center_rows(A* values, int64_t step, int64_t rows, int64_t count, A eps, A* rstd) {
  const int64_t width = padded<A>(count);
  for (int64_t i = 0; i < rows; ++i) {
    A* row = values + i * step;
    for (int64_t k = count; k < width; ++k) row[k] = A(0);
    rstd[i] = sum_of_row<false>(row, width) / static_cast<A>(count);
  }
  for (int64_t i = 0; i < rows; ++i) {
    A* row = values + i * step;
    const Vec<A> mean = broadcast(rstd[i]);
    for (int64_t k = 0; k < width; k += lanes<A>) store(row + k, load(row + k) - mean);
    for (int64_t k = count; k < width; ++k) row[k] = A(0);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const A variance = sum_of_row<true>(values + i * step, width) / static_cast<A>(count);
    rstd[i] = A(1) / square_root(variance + eps);
  }
}

// The comparison keeps NaN, as PyTorch's ReLU does.
template <typename V>
static inline V relu(V values) {
  return V{} > values ? V{} : values;
}

// out [rows, count] = relu(values * rstd * weight + bias), of centered values.
template <typename A, typename T>
static void scale_rows(const A* values, int64_t step, int64_t rows, int64_t count, const A* rstd,
                       const A* weight, const A* bias, T* out, int64_t out_step) {
  for (int64_t i = 0; i < rows; ++i, values += step, out += out_step) {
    const Vec<A> scale = broadcast(rstd[i]);
    for (int64_t k = 0; k < count; k += lanes<A>) {
      const Vec<A> gain = load(weight + k) * scale;
      const Vec<A> result = relu(fused_multiply_add(load(values + k), gain, load(bias + k)));
      if (k + lanes<A> <= count) {
        store(out + k, result);
      } else {
        store_part(out + k, result, static_cast<int>(count - k));
      }
    }
  }
}

// ---- forward ----

template <typename T>
struct ForwardSpace {
  using A = Accumulation<T>;
  Unit<T>* weight1;       // [C, D] and
  Unit<T>* weight2;       // [D, C], where they cannot be read as they are stored
  Unit<T>* x;             // of a block of bins: [., C]
  Unit<T>* hidden_units;  // [., D]
  A* hidden;              // [., D]
  A* result;              // [., C]
};

// Bins that go through all of it together: few, so that their sums stay in the first cache; but the
// weights come from the second once a block.
template <typename T>
constexpr int64_t block_rows = 3 * tile_rows<Unit<T>>;

template <typename T>
static inline ForwardSpace<T> forward_pieces(DynamicConvSizes sizes, Space& space) {
  using A = Accumulation<T>;
  const int64_t C = sizes.channels, D = sizes.inner, rows = block_rows<T>;
  return {.weight1 = take<Unit<T>>(space, right_space<T>(C, D)),
          .weight2 = take<Unit<T>>(space, right_space<T>(D, C)),
          .x = take<Unit<T>>(space, left_space<T>(rows, C)),
          .hidden_units = take<Unit<T>>(space, left_space<T>(rows, D)),
          .hidden = take<A>(space, rows * padded<A>(D)),
          .result = take<A>(space, rows * padded<A>(C))};
}

template <typename T>
static int64_t forward_space(DynamicConvSizes sizes) {
  Space space = {};
  forward_pieces<T>(sizes, space);
  return space.used;
}

template <typename T, typename A = Accumulation<T>>
static void forward_roi(DynamicConvSizes sizes, DynamicConvNorms<A> norms, const T* x,
                        const T* parameters, Ahead& ahead, char* memory, T* out) {
  const int64_t C = sizes.channels, D = sizes.inner;
  const int64_t wide_C = padded<A>(C), wide_D = padded<A>(D);
  Space space = {reinterpret_cast<uintptr_t>(memory), 0};
  const ForwardSpace<T> own = forward_pieces<T>(sizes, space);
  const auto weight1 = right_operand<T>(parameters, D, C, D, own.weight1);
  const auto weight2 = right_operand<T>(parameters + C * D, C, D, C, own.weight2);
  A rstd[block_rows<T>];
  for (int64_t first = 0; first < sizes.bins; first += block_rows<T>) {
    const int64_t rows = smaller(block_rows<T>, sizes.bins - first);
    const auto left = left_operand<T>(x + first * C, C, rows, C, own.x);
    multiply(left, weight1, rows, wide_D, units<T>(C), ahead, own.hidden, wide_D);
    center_rows(own.hidden, wide_D, rows, D, norms.eps, rstd);
    scale_rows(own.hidden, wide_D, rows, D, rstd, norms.weight1, norms.bias1, own.hidden, wide_D);
    const auto hidden = left_operand<T>(own.hidden, wide_D, rows, D, own.hidden_units);
    multiply(hidden, weight2, rows, wide_C, units<T>(D), ahead, own.result, wide_C);
    center_rows(own.result, wide_C, rows, C, norms.eps, rstd);
    scale_rows(own.result, wide_C, rows, C, rstd, norms.weight2, norms.bias2, out + first * C, C);
  }
}

// ---- backward ----

template <typename T>
struct BackwardSpace {
  using A = Accumulation<T>;
  Unit<T>* weights;       // [C, D] or [D, C], whichever is multiplied by
  Unit<T>* x;             // [P, C]
  Unit<T>* x_pairs;       // the same, paired down the columns
  Unit<T>* hidden_units;  // [P, D]
  Unit<T>* hidden_pairs;
  Unit<T>* grad_units;  // of the result's rows [P, C], then of the hidden ones [P, D]
  Unit<T>* grad_pairs;
  A* normal;  // the hidden rows less their means, [P, D]
  A* rstd;    // [P]
  A* hidden;  // [P, D]
  A* grad_hidden;
  A* result;  // of a block of bins, less their means, [., C]
  A* result_rstd;
  A* grad_result;  // [P, C]
  A* grad_norm1;   // weight, bias [2, D]
  A* grad_norm2;   // [2, C]
};

template <typename T>
static inline BackwardSpace<T> backward_pieces(DynamicConvSizes sizes, Space& space) {
  using A = Accumulation<T>;
  const int64_t P = sizes.bins, C = sizes.channels, D = sizes.inner, most = larger(C, D);
  const int64_t wide_C = padded<A>(C), wide_D = padded<A>(D);
  const int64_t pairs = paired<T> ? 1 : 0;  // other units need no second form
  return {.weights = take<Unit<T>>(space, larger(right_space<T>(C, D), right_space<T>(D, C))),
          .x = take<Unit<T>>(space, left_space<T>(P, C)),
          .x_pairs = take<Unit<T>>(space, pairs * right_space<T>(P, C)),
          .hidden_units = take<Unit<T>>(space, pairs * left_space<T>(P, D)),
          .hidden_pairs = take<Unit<T>>(space, pairs * right_space<T>(P, D)),
          .grad_units = take<Unit<T>>(space, pairs * left_space<T>(P, most)),
          .grad_pairs = take<Unit<T>>(space, pairs * right_space<T>(P, most)),
          .normal = take<A>(space, P * wide_D),
          .rstd = take<A>(space, P),
          .hidden = take<A>(space, P * wide_D),
          .grad_hidden = take<A>(space, P * wide_D),
          .result = take<A>(space, block_rows<T> * wide_C),
          .result_rstd = take<A>(space, block_rows<T>),
          .grad_result = take<A>(space, P * wide_C),
          .grad_norm1 = take<A>(space, 2 * wide_D),
          .grad_norm2 = take<A>(space, 2 * wide_C)};
}

template <typename T>
static int64_t backward_space(DynamicConvSizes sizes) {
  Space space = {};
  backward_pieces<T>(sizes, space);
  return space.used;
}

// The transpose, as a left operand, of a matrix [rows, columns] of stored values or sums, of which
// `left` is the left operand.
template <typename T, typename S>
static Operand<Unit<T>> left_operand_of_transposed(Operand<Unit<T>> left, const S* values,
                                                   int64_t step, int64_t rows, int64_t columns,
                                                   Unit<T>* space) {
  if constexpr (paired<T>) {
    return transposed(right_operand<T>(values, step, rows, columns, space));
  } else {
    return transposed(left);
  }
}

// A vector of at most `count` values; of `whole` rows all may be read.
template <typename S>
static inline Vec<Accumulation<S>> load_some(const S* p, int64_t count, bool whole) {
  if (whole || count >= lanes<Accumulation<S>>) return load(p);
  return load_part(p, static_cast<int>(count));
}

// From the gradient of what scale_rows made of centered values, that of what center_rows was given.
// `grad_values` may be `grad` if that has whole vectors. Adds to grad_norm: weight, bias, each in
// whole vectors.
template <typename S, typename A = Accumulation<S>>
static void norm_backward_rows(const A* values, int64_t step, int64_t rows, int64_t count,
                               const A* rstd, const A* weight, const A* bias, const S* grad,
                               int64_t grad_step, A* grad_values, A* grad_norm) {
  const int64_t width = padded<A>(count);
  const bool whole = grad_step >= width;
  for (int64_t i = 0; i < rows; ++i) {
    const A* row = values + i * step;
    const S* given = grad + i * grad_step;
    A* out = grad_values + i * step;
    const Vec<A> scale = broadcast(rstd[i]);
    Vec<A> sum = {}, dot = {};  // of the normal row's gradient, and of it with the normal row
    for (int64_t k = 0; k < count; k += lanes<A>) {
      const Vec<A> value = load(row + k), gain = load(weight + k), normal = value * scale;
      const Vec<A> result = fused_multiply_add(value, gain * scale, load(bias + k));
      const Vec<A> passed = result <= Vec<A>{} ? Vec<A>{} : load_some(given + k, count - k, whole);
      A* grad_weight = grad_norm + k;
      A* grad_bias = grad_weight + width;
      store(grad_weight, fused_multiply_add(passed, normal, load(grad_weight)));
      store(grad_bias, load(grad_bias) + passed);
      const Vec<A> grad_normal = passed * gain;
      store(out + k, grad_normal);
      sum += grad_normal;
      dot = fused_multiply_add(grad_normal, normal, dot);
    }
    const Vec<A> mean = broadcast(sum_of_lanes(sum) / static_cast<A>(count));
    const Vec<A> slope = broadcast(sum_of_lanes(dot) / static_cast<A>(count)) * scale;
    for (int64_t k = 0; k < count; k += lanes<A>) {
      store(out + k, (load(out + k) - mean - load(row + k) * slope) * scale);
    }
  }
}

// own.grad_result and own.grad_norm2, from the gradient of the output and the hidden rows.
template <typename T, typename A = Accumulation<T>>
static void backward_of_result(DynamicConvSizes sizes, const DynamicConvNorms<A>& norms,
                               const T* grad, Operand<Unit<T>> hidden, Operand<Unit<T>> weight2,
                               Ahead& ahead, const BackwardSpace<T>& own) {
  const int64_t C = sizes.channels, wide_C = padded<A>(C);
  for (int64_t first = 0; first < sizes.bins; first += block_rows<T>) {
    const int64_t rows = smaller(block_rows<T>, sizes.bins - first);
    const Operand<Unit<T>> left = {hidden.data + first * hidden.row, hidden.row, 1};
    multiply(left, weight2, rows, wide_C, units<T>(sizes.inner), ahead, own.result, wide_C);
    center_rows(own.result, wide_C, rows, C, norms.eps, own.result_rstd);
    norm_backward_rows(own.result, wide_C, rows, C, own.result_rstd, norms.weight2, norms.bias2,
                       grad + first * C, C, own.grad_result + first * wide_C, own.grad_norm2);
  }
}

// grad_norms [2 * (D + C)] from the sums, which are in whole vectors.
template <typename A>
static void store_grad_norms(DynamicConvSizes sizes, const A* norm1, const A* norm2,
                             A* grad_norms) {
  for (int which = 0; which < 4; ++which) {
    const int64_t count = which < 2 ? sizes.inner : sizes.channels;
    const A* sums = (which < 2 ? norm1 : norm2) + which % 2 * padded<A>(count);
    __builtin_memcpy(grad_norms, sums, count * sizeof(A));
    grad_norms += count;
  }
}

template <typename T, typename A = Accumulation<T>>
static void backward_roi(DynamicConvSizes sizes, DynamicConvNorms<A> norms, const T* grad,
                         const T* x, const T* parameters, Ahead& ahead, char* memory, A* grad_x,
                         T* grad_parameters, A* grad_norms) {
  const int64_t P = sizes.bins, C = sizes.channels, D = sizes.inner;
  const int64_t wide_C = padded<A>(C), wide_D = padded<A>(D), unit_P = units<T>(P);
  const T* weight1 = parameters;
  const T* weight2 = parameters + C * D;
  Space space = {reinterpret_cast<uintptr_t>(memory), 0};
  const BackwardSpace<T> own = backward_pieces<T>(sizes, space);
  __builtin_memset(own.grad_norm1, 0, 2 * wide_D * sizeof(A));
  __builtin_memset(own.grad_norm2, 0, 2 * wide_C * sizeof(A));

  // The forward again, as far as the hidden rows.
  const auto left_x = left_operand<T>(x, C, P, C, own.x);
  auto right = right_operand<T>(weight1, D, C, D, own.weights);
  multiply(left_x, right, P, wide_D, units<T>(C), ahead, own.normal, wide_D);
  center_rows(own.normal, wide_D, P, D, norms.eps, own.rstd);
  scale_rows(own.normal, wide_D, P, D, own.rstd, norms.weight1, norms.bias1, own.hidden, wide_D);
  auto left = left_operand<T>(own.hidden, wide_D, P, D, own.hidden_units);

  // Through the second norm, then to the second weight and to the hidden rows.
  right = right_operand<T>(weight2, C, D, C, own.weights);
  backward_of_result(sizes, norms, grad, left, right, ahead, own);
  left = left_operand_of_transposed<T>(left, own.hidden, wide_D, P, D, own.hidden_pairs);
  right = right_operand<T>(own.grad_result, wide_C, P, C, own.grad_pairs);
  multiply_to(left, right, D, C, unit_P, ahead, grad_parameters + C * D);
  left = left_operand<T>(own.grad_result, wide_C, P, C, own.grad_units);
  right = right_operand_of_transposed(weight2, C, D, own.weights);
  multiply(left, right, P, wide_D, units<T>(C), ahead, own.grad_hidden, wide_D);

  // Through the first norm, then to the first weight and to x.
  norm_backward_rows(own.normal, wide_D, P, D, own.rstd, norms.weight1, norms.bias1,
                     own.grad_hidden, wide_D, own.grad_hidden, own.grad_norm1);
  left = left_operand_of_transposed<T>(left_x, x, C, P, C, own.x_pairs);
  right = right_operand<T>(own.grad_hidden, wide_D, P, D, own.grad_pairs);
  multiply_to(left, right, C, D, unit_P, ahead, grad_parameters);
  if (grad_x) {
    left = left_operand<T>(own.grad_hidden, wide_D, P, D, own.grad_units);
    right = right_operand_of_transposed(weight1, D, C, own.weights);
    multiply_to(left, right, P, C, units<T>(D), ahead, grad_x);
  }
  store_grad_norms(sizes, own.grad_norm1, own.grad_norm2, grad_norms);
}

template <typename T>
static void narrow_values(const Accumulation<T>* values, int64_t count, T* out) {
  narrow_row(values, count, out);
}
