// Rows of normalize_pad; compiled once for each level of cpu/isa.h. The arithmetic is that of
// common/resample_math.h, in integers of 32 bits.

typedef int32_t Ints __attribute__((vector_size(sizeof(Vec<float>))));
constexpr int kIntLanes = lanes<float>;

static inline Ints load_ints(const int32_t* p) {
  Ints result;
  __builtin_memcpy(&result, p, sizeof(result));
  return result;
}

// A lane a byte.
static inline Ints load_bytes(const uint8_t* p) {
#if SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return same_bits<Ints>(_mm512_maskz_cvtepu8_epi32(0xffff, bytes));
#elif SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX2
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return same_bits<Ints>(_mm256_cvtepu8_epi32(bytes));
#else
  Ints result;
  for (int lane = 0; lane < kIntLanes; ++lane) {
    result[lane] = p[lane];
  }
  return result;
#endif
}

// A pixel's three bytes, and the one that follows.
static inline int32_t load_pixel(const uint8_t* p) {
  int32_t result;
  __builtin_memcpy(&result, p, sizeof(result));
  return result;
}

// A lane a pixel. Put together from single loads: gather instructions are slow on many processors.
static inline Ints load_pixels(const uint8_t* row, const int32_t* at) {
#define SPARSE_RCNN_FOUR_PIXELS(k)                                                          \
  load_pixel(row + at[k]), load_pixel(row + at[k + 1]), load_pixel(row + at[k + 2]),        \
      load_pixel(row + at[k + 3])
#if SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX512
  return Ints{SPARSE_RCNN_FOUR_PIXELS(0), SPARSE_RCNN_FOUR_PIXELS(4), SPARSE_RCNN_FOUR_PIXELS(8),
              SPARSE_RCNN_FOUR_PIXELS(12)};
#elif SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX2
  return Ints{SPARSE_RCNN_FOUR_PIXELS(0), SPARSE_RCNN_FOUR_PIXELS(4)};
#else
  return Ints{SPARSE_RCNN_FOUR_PIXELS(0)};
#endif
#undef SPARSE_RCNN_FOUR_PIXELS
}

// The lower three bytes of each lane, one after the other; up to four bytes behind them are written
// as well.
static inline void store_pixels(uint8_t* out, Ints pixels) {
#if SPARSE_RCNN_LEVEL >= SPARSE_RCNN_AVX2
  __m128i quads[kIntLanes / 4];
  __builtin_memcpy(quads, &pixels, sizeof(pixels));
  const __m128i dense = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  for (int k = 0; k < kIntLanes / 4; ++k) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 12 * k), _mm_shuffle_epi8(quads[k], dense));
  }
#else
  for (int lane = 0; lane < kIntLanes; ++lane) {
    const int32_t pixel = pixels[lane];
    __builtin_memcpy(out + 3 * lane, &pixel, sizeof(pixel));
  }
#endif
}

// A sum that began with kResampleHalf, in 8 bits. Rounded weights may add up to a little over one.
static inline Ints level_of(Ints sum) {
  const Ints level = sum >> kResampleBits;
  return level < 255 ? level : Ints{} + 255;
}

// The horizontal pass over a row of interleaved pixels: groups of kPixelGroup pixels, with where
// the first tap of each lies (in bytes) and their weights [groups, taps, kPixelGroup].
static void resample_row(const uint8_t* row, const int32_t* at, const int32_t* weights,
                         int64_t groups, int taps, uint8_t* out) {
  for (int64_t group = 0; group < groups; ++group) {
    for (int part = 0; part < kPixelGroup; part += kIntLanes) {
      Ints red = Ints{} + kResampleHalf, green = red, blue = red;
      for (int tap = 0; tap < taps; ++tap) {
        const Ints pixels = load_pixels(row + 3 * tap, at + part);
        const Ints weight = load_ints(weights + tap * kPixelGroup + part);
        red += (pixels & 255) * weight;
        green += ((pixels >> 8) & 255) * weight;
        blue += ((pixels >> 16) & 255) * weight;
      }
      store_pixels(out + 3 * part, level_of(red) | level_of(green) << 8 | level_of(blue) << 16);
    }
    at += kPixelGroup;
    weights += taps * kPixelGroup;
    out += 3 * kPixelGroup;
  }
}

static inline Vec<float> normalize_levels(const uint8_t* const* rows, const int32_t* weights,
                                          int taps, int64_t at, Vec<float> mean, Vec<float> std) {
  Ints sum = Ints{} + kResampleHalf;
  for (int tap = 0; tap < taps; ++tap) {
    sum += load_bytes(rows[tap] + at) * weights[tap];
  }
  return (__builtin_convertvector(level_of(sum), Vec<float>) - mean) / std;
}

// The vertical pass over `taps` rows of `count` bytes, normalised. `mean` and `std` repeat their
// three numbers over kPixelGroup + 2 places.
template <typename T>
static void normalize_row(const uint8_t* const* rows, const int32_t* weights, int taps,
                          int64_t count, const float* mean, const float* std, T* out) {
  // Three vectors are whole pixels: their channels are the same all along the row.
  Vec<float> means[3], stds[3];
  for (int k = 0; k < 3; ++k) {
    means[k] = load(mean + k * kIntLanes % 3);
    stds[k] = load(std + k * kIntLanes % 3);
  }
  int64_t at = 0;
  for (; at + 3 * kIntLanes <= count; at += 3 * kIntLanes) {
    for (int k = 0; k < 3; ++k) {
      const int64_t here = at + k * kIntLanes;
      store(out + here, normalize_levels(rows, weights, taps, here, means[k], stds[k]));
    }
  }
  for (; at < count; ++at) {  // less than three vectors
    int32_t sum = kResampleHalf;
    for (int tap = 0; tap < taps; ++tap) {
      sum += rows[tap][at] * weights[tap];
    }
    const int32_t level = sum >> kResampleBits < 255 ? sum >> kResampleBits : 255;
    const float value = (static_cast<float>(level) - mean[at % 3]) / std[at % 3];
    store_part(out + at, splat(value), 1);
  }
}
