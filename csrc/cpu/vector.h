// Vectors as wide as the level of cpu/isa.h that this is compiled for. Included by
// cpu/for_each_isa.h inside the level's namespace: no include guard and no #include here.
//
//   Vec<A>                       lanes<A> values of an accumulation type, float or double
//   splat<A>(x)                  x in all lanes
//   fused_multiply_add(a, b, c)  a * b + c
//   load(p), store(p, v)         lanes of a stored type (float, double, BFloat16Bits, HalfBits),
//                                widened to its accumulation type and rounded to nearest even
//   load_part, store_part        the first `count` < lanes of them; the others are 0, or untouched
//   sum_of<A>(v), Sums<A>        the sum of the lanes; several sums at once

#if SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512
#define SPARSE_RCNN_VECTOR_BYTES 64
#elif SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX2
#define SPARSE_RCNN_VECTOR_BYTES 32
#else
#define SPARSE_RCNN_VECTOR_BYTES 16
#endif

template <typename A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(SPARSE_RCNN_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(SPARSE_RCNN_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(SPARSE_RCNN_VECTOR_BYTES)));
};
template <typename A>
using Vec = typename VecOf<A>::type;
using FloatBits = VecOf<float>::bits;

template <typename A>
constexpr int lanes = SPARSE_RCNN_VECTOR_BYTES / static_cast<int>(sizeof(A));

// As many 16-bit values as there are floats in a vector.
typedef uint16_t HalfLanes __attribute__((vector_size(SPARSE_RCNN_VECTOR_BYTES / 2)));

template <typename A>
static inline Vec<A> splat(A value) {
  return Vec<A>{} + value;
}

// The compiler contracts the sum where the level has a fused instruction.
template <typename V>
static inline V fused_multiply_add(V a, V b, V c) {
  return a * b + c;
}

template <typename To, typename From>
static inline To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

// By hand where GCC's own conversion goes by way of scalars. (Masked forms of AVX-512 conversions,
// here and below: the plain ones make GCC 12 warn of an uninitialized value of its own.)
static inline FloatBits zero_extend(HalfLanes values) {
#if SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512
  return same_bits<FloatBits>(_mm512_maskz_cvtepu16_epi32(0xffff, same_bits<__m256i>(values)));
#elif SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX2
  return same_bits<FloatBits>(_mm256_cvtepu16_epi32(same_bits<__m128i>(values)));
#elif SPARSE_RCNN_X86
  const __m128i low = _mm_cvtsi64_si128(same_bits<long long>(values));
  return same_bits<FloatBits>(_mm_unpacklo_epi16(low, _mm_setzero_si128()));
#else
  return __builtin_convertvector(values, FloatBits);
#endif
}

static inline Vec<float> widen_bfloat16(HalfLanes values) {
  return same_bits<Vec<float>>(zero_extend(values) << 16);
}

static inline HalfLanes narrow_to_bfloat16(Vec<float> values) {
#if SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512_BF16
  return same_bits<HalfLanes>(_mm512_cvtneps_pbh(values));
#else
  const FloatBits bits = same_bits<FloatBits>(values);
  const FloatBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const FloatBits is_nan = same_bits<FloatBits>(values != values);
  return __builtin_convertvector((rounded & ~is_nan) | (((bits >> 16) | 0x40) & is_nan), HalfLanes);
#endif
}

static inline Vec<float> widen_half(HalfLanes values) {
#if SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512
  return _mm512_maskz_cvtph_ps(0xffff, same_bits<__m256i>(values));
#elif SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX2
  return _mm256_cvtph_ps(same_bits<__m128i>(values));
#else
  // The exponent is re-biased by a product, which also normalises subnormals; infinities and NaN
  // keep theirs.
  const FloatBits bits = zero_extend(values), magnitude = (bits & 0x7fff) << 13;
  const FloatBits special = same_bits<FloatBits>((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  const Vec<float> scaled = same_bits<Vec<float>>(magnitude) * 0x1p112f;
  return same_bits<Vec<float>>(same_bits<FloatBits>(scaled) | special | ((bits & 0x8000) << 16));
#endif
}

static inline HalfLanes narrow_to_half(Vec<float> values) {
#if SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512
  return same_bits<HalfLanes>(
      _mm512_maskz_cvtps_ph(0xffff, values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX2
  return same_bits<HalfLanes>(
      _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const FloatBits bits = same_bits<FloatBits>(values), magnitude = bits & 0x7fffffff;
  // A normal result: drop 13 bits to nearest even, re-bias the exponent; what overflows becomes
  // infinite.
  const FloatBits normal =
      (magnitude + 0xfff + ((magnitude >> 13) & 1) - (uint32_t{112} << 23)) >> 13;
  // A subnormal one: the addition of 0.5 rounds at the last bit that the result keeps.
  const FloatBits subnormal =
      same_bits<FloatBits>(same_bits<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;
  const FloatBits is_small = same_bits<FloatBits>(magnitude < 0x38800000);
  const FloatBits is_large = same_bits<FloatBits>(magnitude >= 0x47800000);
  const FloatBits is_nan = same_bits<FloatBits>(magnitude > 0x7f800000);
  const FloatBits large = 0x7c00 | (is_nan & 0x0200);
  const FloatBits result =
      (subnormal & is_small) | (large & is_large) | (normal & ~is_small & ~is_large);
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000), HalfLanes);
#endif
}

static inline Vec<float> load(const float* p) {
  Vec<float> result;
  __builtin_memcpy(&result, p, sizeof(result));
  return result;
}
static inline Vec<double> load(const double* p) {
  Vec<double> result;
  __builtin_memcpy(&result, p, sizeof(result));
  return result;
}
static inline Vec<float> load(const BFloat16Bits* p) {
  HalfLanes values;
  __builtin_memcpy(&values, p, sizeof(values));
  return widen_bfloat16(values);
}
static inline Vec<float> load(const HalfBits* p) {
  HalfLanes values;
  __builtin_memcpy(&values, p, sizeof(values));
  return widen_half(values);
}

static inline void store(float* p, Vec<float> values) {
  __builtin_memcpy(p, &values, sizeof(values));
}
static inline void store(double* p, Vec<double> values) {
  __builtin_memcpy(p, &values, sizeof(values));
}
static inline void store(BFloat16Bits* p, Vec<float> values) {
  const HalfLanes narrow = narrow_to_bfloat16(values);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}
static inline void store(HalfBits* p, Vec<float> values) {
  const HalfLanes narrow = narrow_to_half(values);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}

template <typename T>
static inline Vec<Accumulation<T>> load_part(const T* p, int count) {
  T values[lanes<Accumulation<T>>] = {};
  __builtin_memcpy(values, p, count * sizeof(T));
  return load(values);
}

template <typename T>
static inline void store_part(T* p, Vec<Accumulation<T>> values, int count) {
  T stored[lanes<Accumulation<T>>];
  store(stored, values);
  __builtin_memcpy(p, stored, count * sizeof(T));
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

#undef SPARSE_RCNN_VECTOR_BYTES
