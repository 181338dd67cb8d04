// The dynamic interaction of one RoI and its gradient, for cpu/for_each_isa.h (rules in cpu/isa.h); include
// cpu/dynamic_conv.h before. Everything between the RoI's inputs and outputs stays in the core's cache.
#include "cpu/small_gemm_operands.h"
// (after the operands that it multiplies)
#include "cpu/small_gemm_kernels.h"

// ---- memory of one thread ----

// Hands out pieces of it; from address 0 it only counts.
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

// ---- LayerNorm and ReLU of a row of sums, which has whole vectors ----

static inline float square_root(float x) { return __builtin_sqrtf(x); }
static inline double square_root(double x) { return __builtin_sqrt(x); }

// The sums of row and of row * row over `width`, whole vectors; two chains of additions, so that they overlap.
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

// Each row less its mean, zeros beyond `count`; rstd: the reciprocals of the standard deviations. Pass by pass over all
// rows, because what one row's sum waits for another row's can use.
template <typename A>
static void center_rows(A* values, int64_t step, int64_t rows, int64_t count, A eps, A* rstd) {
  const int64_t width = padded<A>(count);
  for (int64_t i = 0; i < rows; ++i) {
    A* row = values + i * step;
    for (int64_t k = count; k < width; ++k) {
      row[k] = A(0);
    }
    rstd[i] = sum_of_row<false>(row, width) / static_cast<A>(count);
  }
  for (int64_t i = 0; i < rows; ++i) {
    A* row = values + i * step;
    for (int64_t k = 0; k < width; k += lanes<A>) {
      store(row + k, load(row + k) - broadcast(rstd[i]));
    }
    for (int64_t k = count; k < width; ++k) {
      row[k] = A(0);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    rstd[i] = A(1) / square_root(sum_of_row<true>(values + i * step, width) / static_cast<A>(count) + eps);
  }
}

// The comparison keeps NaN, as PyTorch's ReLU does.
template <typename V>
static inline V relu(V values) {
  return V{} > values ? V{} : values;
}

// out [rows, count] = relu(values * rstd * weight + bias), where `values` are centered.
template <typename A, typename T>
static void scale_rows(const A* values, int64_t step, int64_t rows, int64_t count, const A* rstd, const A* weight,
                       const A* bias, T* out, int64_t out_step) {
  for (int64_t i = 0; i < rows; ++i, values += step, out += out_step) {
    const Vec<A> scale = broadcast(rstd[i]);
    int64_t k = 0;
    for (; k + lanes<A> <= count; k += lanes<A>) {
      store(out + k, relu(fused_multiply_add(load(values + k), load(weight + k) * scale, load(bias + k))));
    }
    if (k < count) {
      const Vec<A> value = fused_multiply_add(load(values + k), load(weight + k) * scale, load(bias + k));
      store_part(out + k, relu(value), static_cast<int>(count - k));
    }
  }
}

// ---- forward ----

template <typename T>
struct ForwardSpace {
  using A = Accumulation<T>;
  Unit<T>*weight1, *weight2;  // [C, D], [D, C] where they cannot be read as stored
  Unit<T>*x, *hidden_units;   // of a block of rows: [., C], [., D]
  A *hidden, *result;         // [., D], [., C]
};

// Bins that are taken through everything at once: the weights come from the second-level cache once a block.
template <typename T>
constexpr int64_t block_rows = 3 * tile_rows<T>;

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
static void forward_roi(DynamicConvSizes sizes, DynamicConvNorms<A> norms, const T* x, const T* parameters,
                        Ahead& ahead, char* memory, T* out) {
  const int64_t C = sizes.channels, D = sizes.inner, wide_C = padded<A>(C), wide_D = padded<A>(D);
  Space space = {reinterpret_cast<uintptr_t>(memory), 0};
  const ForwardSpace<T> own = forward_pieces<T>(sizes, space);
  const Operand<T> weight1 = right_operand<T>(parameters, D, C, D, own.weight1);
  const Operand<T> weight2 = right_operand<T>(parameters + C * D, C, D, C, own.weight2);
  A rstd[block_rows<T>];
  for (int64_t first = 0; first < sizes.bins; first += block_rows<T>) {
    const int64_t rows = smaller(block_rows<T>, sizes.bins - first);
    const Operand<T> left = left_operand<T>(x + first * C, C, rows, C, own.x);
    multiply<T>(left, weight1, rows, wide_D, units<T>(C), ahead, own.hidden, wide_D);
    center_rows(own.hidden, wide_D, rows, D, norms.eps, rstd);
    scale_rows(own.hidden, wide_D, rows, D, rstd, norms.weight1, norms.bias1, own.hidden, wide_D);
    const Operand<T> hidden = left_operand<T>(own.hidden, wide_D, rows, D, own.hidden_units);
    multiply<T>(hidden, weight2, rows, wide_C, units<T>(D), ahead, own.result, wide_C);
    center_rows(own.result, wide_C, rows, C, norms.eps, rstd);
    scale_rows(own.result, wide_C, rows, C, rstd, norms.weight2, norms.bias2, out + first * C, C);
  }
}

// ---- backward ----

template <typename T>
struct BackwardSpace {
  using A = Accumulation<T>;
  Unit<T>* weights;                          // [C, D] or [D, C], whichever is multiplied by
  Unit<T>*x, *x_pairs;                       // [P, C], and the same as units down the columns
  Unit<T>*hidden_units, *hidden_pairs;       // [P, D]
  Unit<T>*grad_units, *grad_pairs;           // [P, C], then [P, D]
  A *normal, *rstd, *hidden, *grad_hidden;   // [P, D], [P], [P, D], [P, D]
  A *result, *result_rstd, *grad_result;     // of a block of rows [., C] and [.]; [P, C]
  A *norm1, *norm2;                          // the norms' gradients: weight [D], bias [D]; [C], [C]
};

template <typename T>
static inline BackwardSpace<T> backward_pieces(DynamicConvSizes sizes, Space& space) {
  using A = Accumulation<T>;
  const int64_t P = sizes.bins, C = sizes.channels, D = sizes.inner, wide_C = padded<A>(C), wide_D = padded<A>(D);
  const int64_t most = C > D ? C : D, pairs = paired<T> ? 1 : 0;  // units that are not pairs are read as they lie
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
          .norm1 = take<A>(space, 2 * wide_D),
          .norm2 = take<A>(space, 2 * wide_C)};
}

template <typename T>
static int64_t backward_space(DynamicConvSizes sizes) {
  Space space = {};
  backward_pieces<T>(sizes, space);
  return space.used;
}

// The left operand that is the transpose of a matrix [rows, columns], stored or sums, whose own left operand is given.
template <typename T, typename S>
static Operand<T> left_operand_of_transposed(Operand<T> left, const S* values, int64_t step, int64_t rows,
                                             int64_t columns, Unit<T>* space) {
  if constexpr (paired<T>) {
    return transposed(right_operand<T>(values, step, rows, columns, space));
  } else {
    return transposed(left);
  }
}

// The first `count` values at p, at most a vector; of sums, which have whole vectors, always all.
template <typename S>
static inline Vec<Accumulation<S>> load_grad(const S* p, int64_t count, bool whole) {
  return whole || count >= lanes<Accumulation<S>> ? load(p) : load_part(p, static_cast<int>(count));
}

// From the gradient of scale_rows' result that of what center_rows was given. `grad_values` may be `grad` itself if
// that has whole vectors; adds to the gradients of weight and bias.
template <typename S, typename A = Accumulation<S>>
static void norm_backward_rows(const A* values, int64_t step, int64_t rows, int64_t count, const A* rstd,
                               const A* weight, const A* bias, const S* grad, int64_t grad_step, A* grad_values,
                               A* grad_weight, A* grad_bias) {
  const bool whole = grad_step >= padded<A>(count);
  for (int64_t i = 0; i < rows; ++i) {
    const A* row = values + i * step;
    A* out = grad_values + i * step;
    const Vec<A> scale = broadcast(rstd[i]);
    Vec<A> sum = {}, dot = {};  // of the normalised row's gradient, and of it with the normalised row
    for (int64_t k = 0; k < count; k += lanes<A>) {
      const Vec<A> value = load(row + k), gain = load(weight + k);
      const Vec<A> result = fused_multiply_add(value, gain * scale, load(bias + k));
      const Vec<A> given = load_grad(grad + i * grad_step + k, count - k, whole);
      const Vec<A> passed = result <= Vec<A>{} ? Vec<A>{} : given;
      const Vec<A> normal = value * scale, grad_normal = passed * gain;
      store(grad_weight + k, fused_multiply_add(passed, normal, load(grad_weight + k)));
      store(grad_bias + k, load(grad_bias + k) + passed);
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

// grad_result, and the gradients of the second norm, from `grad` and the hidden rows.
template <typename T, typename A = Accumulation<T>>
static void backward_of_result(DynamicConvSizes sizes, const DynamicConvNorms<A>& norms, const T* grad,
                               Operand<T> hidden, Operand<T> weight2, Ahead& ahead, const BackwardSpace<T>& own) {
  const int64_t C = sizes.channels, wide_C = padded<A>(C);
  for (int64_t first = 0; first < sizes.bins; first += block_rows<T>) {
    const int64_t rows = smaller(block_rows<T>, sizes.bins - first);
    const Operand<T> left = {hidden.data + first * hidden.row, hidden.row, 1};
    multiply<T>(left, weight2, rows, wide_C, units<T>(sizes.inner), ahead, own.result, wide_C);
    center_rows(own.result, wide_C, rows, C, norms.eps, own.result_rstd);
    norm_backward_rows(own.result, wide_C, rows, C, own.result_rstd, norms.weight2, norms.bias2, grad + first * C, C,
                       own.grad_result + first * wide_C, own.norm2, own.norm2 + wide_C);
  }
}

template <typename A>
static inline A* copy_values(const A* values, int64_t count, A* out) {
  __builtin_memcpy(out, values, count * sizeof(A));
  return out + count;
}

template <typename T, typename A = Accumulation<T>>
static void backward_roi(DynamicConvSizes sizes, DynamicConvNorms<A> norms, const T* grad, const T* x,
                         const T* parameters, Ahead& ahead, char* memory, A* grad_x, T* grad_parameters,
                         A* grad_norms) {
  const int64_t P = sizes.bins, C = sizes.channels, D = sizes.inner, wide_C = padded<A>(C), wide_D = padded<A>(D);
  const T *weight1 = parameters, *weight2 = parameters + C * D;
  Space space = {reinterpret_cast<uintptr_t>(memory), 0};
  const BackwardSpace<T> own = backward_pieces<T>(sizes, space);
  __builtin_memset(own.norm1, 0, 2 * wide_D * sizeof(A));
  __builtin_memset(own.norm2, 0, 2 * wide_C * sizeof(A));

  // The forward again, up to the hidden rows.
  const Operand<T> left_x = left_operand<T>(x, C, P, C, own.x);
  multiply<T>(left_x, right_operand<T>(weight1, D, C, D, own.weights), P, wide_D, units<T>(C), ahead, own.normal,
              wide_D);
  center_rows(own.normal, wide_D, P, D, norms.eps, own.rstd);
  scale_rows(own.normal, wide_D, P, D, own.rstd, norms.weight1, norms.bias1, own.hidden, wide_D);
  const Operand<T> hidden = left_operand<T>(own.hidden, wide_D, P, D, own.hidden_units);

  // Through the second norm and product.
  backward_of_result(sizes, norms, grad, hidden, right_operand<T>(weight2, C, D, C, own.weights), ahead, own);
  multiply_to<T>(left_operand_of_transposed<T>(hidden, own.hidden, wide_D, P, D, own.hidden_pairs),
                 right_operand<T>(own.grad_result, wide_C, P, C, own.grad_pairs), D, C, units<T>(P), ahead,
                 grad_parameters + C * D);
  multiply<T>(left_operand<T>(own.grad_result, wide_C, P, C, own.grad_units),
              right_operand_of_transposed<T>(weight2, C, D, own.weights), P, wide_D, units<T>(C), ahead,
              own.grad_hidden, wide_D);

  // Through the first.
  norm_backward_rows(own.normal, wide_D, P, D, own.rstd, norms.weight1, norms.bias1, own.grad_hidden, wide_D,
                     own.grad_hidden, own.norm1, own.norm1 + wide_D);
  multiply_to<T>(left_operand_of_transposed<T>(left_x, x, C, P, C, own.x_pairs),
                 right_operand<T>(own.grad_hidden, wide_D, P, D, own.grad_pairs), C, D, units<T>(P), ahead,
                 grad_parameters);
  if (grad_x) {
    multiply_to<T>(left_operand<T>(own.grad_hidden, wide_D, P, D, own.grad_units),
                   right_operand_of_transposed<T>(weight1, D, C, own.weights), P, C, units<T>(D), ahead, grad_x);
  }
  grad_norms = copy_values(own.norm1, D, grad_norms);
  grad_norms = copy_values(own.norm1 + wide_D, D, grad_norms);
  grad_norms = copy_values(own.norm2, C, grad_norms);
  copy_values(own.norm2 + wide_C, C, grad_norms);
}

template <typename T>
static void narrow_values(const Accumulation<T>* values, int64_t count, T* out) {
  narrow_row(values, count, out);
}
