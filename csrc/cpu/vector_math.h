// Exponential, logarithm and what the losses make of them, on the vectors of cpu/vector.h. Included
// by kernel headers inside a level's namespace: no include guard and no #include here.
//
// In float within 2 units in the last place (the polynomials are those of Cephes, expf and logf);
// in double the C library's functions, lane by lane. NaN stays NaN.

typedef int32_t FloatIntegers __attribute__((vector_size(sizeof(Vec<float>))));

static inline Vec<float> exponential(Vec<float> x) {
  const Vec<float> inside = x > 88.0f ? splat(88.0f) : x;
  // The sum with 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits.
  const Vec<float> shifted = inside * 1.44269504f + 12582912.0f;
  const Vec<float> power = shifted - 12582912.0f;
  Vec<float> r = fused_multiply_add(power, splat(-0.693359375f), inside);
  r = fused_multiply_add(power, splat(2.12194440e-4f), r);
  Vec<float> sum = splat(1.9875691500e-4f);
  sum = fused_multiply_add(sum, r, splat(1.3981999507e-3f));
  sum = fused_multiply_add(sum, r, splat(8.3334519073e-3f));
  sum = fused_multiply_add(sum, r, splat(4.1665795894e-2f));
  sum = fused_multiply_add(sum, r, splat(1.6666665459e-1f));
  sum = fused_multiply_add(sum, r, splat(5.0000001201e-1f));
  const Vec<float> fraction = fused_multiply_add(sum, r * r, r) + 1.0f;
  const Vec<float> scaled = same_bits<Vec<float>>(same_bits<FloatBits>(fraction) +
                                                  (same_bits<FloatBits>(shifted) << 23));
  const Vec<float> result = x < -87.0f ? Vec<float>{} : scaled;  // below it the exponent underflows
  return x == x ? result : x;
}

// Of normal positive numbers.
static inline Vec<float> logarithm(Vec<float> x) {
  const FloatBits bits = same_bits<FloatBits>(x);
  Vec<float> exponent = __builtin_convertvector(
      same_bits<FloatIntegers>(bits >> 23) - 126, Vec<float>);
  const Vec<float> half = same_bits<Vec<float>>((bits & 0x007fffff) | 0x3f000000);  // in [0.5, 1)
  const auto is_low = half < 0.707106781f;
  exponent = is_low ? exponent - 1.0f : exponent;
  const Vec<float> m = (is_low ? half + half : half) - 1.0f;
  Vec<float> sum = splat(7.0376836292e-2f);
  sum = fused_multiply_add(sum, m, splat(-1.1514610310e-1f));
  sum = fused_multiply_add(sum, m, splat(1.1676998740e-1f));
  sum = fused_multiply_add(sum, m, splat(-1.2420140846e-1f));
  sum = fused_multiply_add(sum, m, splat(1.4249322787e-1f));
  sum = fused_multiply_add(sum, m, splat(-1.6668057665e-1f));
  sum = fused_multiply_add(sum, m, splat(2.0000714765e-1f));
  sum = fused_multiply_add(sum, m, splat(-2.4999993993e-1f));
  sum = fused_multiply_add(sum, m, splat(3.3333331174e-1f));
  const Vec<float> square = m * m;
  Vec<float> tail = fused_multiply_add(exponent, splat(-2.12194440e-4f), sum * m * square);
  tail = fused_multiply_add(square, splat(-0.5f), tail);
  const Vec<float> result = fused_multiply_add(exponent, splat(0.693359375f), m + tail);
  return x == x ? result : x;
}

// log(1 + x) of x in [0, 1]: what the rounding of 1 + x lost is added again.
static inline Vec<float> logarithm_of_one_plus(Vec<float> x) {
  const Vec<float> sum = x + 1.0f;
  return logarithm(sum) - ((sum - 1.0f) - x) / sum;
}

static inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
static inline Vec<double> logarithm(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}
static inline Vec<double> logarithm_of_one_plus(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_log1p(x[i]);
  return x;
}

template <typename A>
static inline Vec<A> absolute(Vec<A> x) {
  return x > -x ? x : -x;
}

// sigmoid(x) and sigmoid(-x), neither of them by subtraction from 1, and exp(-|x|).
template <typename A>
struct Sigmoid {
  Vec<A> of, of_negated, small;
};

template <typename A>
static inline Sigmoid<A> sigmoid(Vec<A> x) {
  const Vec<A> small = exponential(-absolute<A>(x)), one = splat(A(1));
  const Vec<A> large = one / (small + A(1)), rest = small * large;
  return {x >= A(0) ? large : rest, x >= A(0) ? rest : large, small};
}

// base ^ exponent of base in [0, 1] and exponent >= 0.
template <typename A>
static inline Vec<A> power(Vec<A> base, A exponent) {
  if (exponent == A(2)) return base * base;
  if (exponent == A(0)) return splat(A(1));
  if (exponent == A(1)) return base;
  const Vec<A> least = splat(A(1e-37));
  const Vec<A> result = exponential(exponent * logarithm(base > least ? base : least));
  return base > least ? result : Vec<A>{} * base;  // NaN stays NaN
}
