// Which pyramid level a box reads and which cells, with which weights, it reads there. Shared by
// the CPU and CUDA kernels; every function is templated on T, the boxes' own type (float or
// double), in which coordinates are computed.
//
// A bin of RoIAlign is the mean of samples^2 points, each a bilinear blend of 4 cells. Points and
// blends are products of an x and a y part, so that
//     bin (i, j) = sum over rows y and columns x of Ay[i, y] * Ax[j, x] * feature[y, x],
// and each axis is a short list of taps (bin, cell, weight): at most 2 * samples a bin, 2 * size *
// samples an axis.
//   - By bin: `bin_taps` lists the taps of one bin, its cells ascending. Bins are independent (one
//     thread each on a GPU).
//   - By cell: `sort_by_cell` (or `rank_by_cell`, one thread a tap) reorders the taps of all bins
//     so that those of one cell are adjacent: a forward then reads each footprint row once, a
//     backward writes each cell once.
//
// Results must equal the reference's op-by-op arithmetic to the last bit, or a box on a level
// boundary or a sample on the rim of the map would go the other way: products that feed a sum are
// kept out of fused multiply-adds.
//
// CPU files include this before cpu/for_each_isa.h, so that its functions are of the baseline.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define SPARSE_RCNN_HD __host__ __device__
#else
#define SPARSE_RCNN_HD
#endif

namespace sparse_rcnn {

// Own overloads of the C functions: an inline function of <cmath>, once compiled for a wider
// instruction set, could be the copy the linker keeps for every caller.
SPARSE_RCNN_HD inline float floor_of(float x) { return floorf(x); }
SPARSE_RCNN_HD inline double floor_of(double x) { return floor(x); }
SPARSE_RCNN_HD inline float sqrt_of(float x) { return sqrtf(x); }
SPARSE_RCNN_HD inline double sqrt_of(double x) { return sqrt(x); }
SPARSE_RCNN_HD inline float log2_of(float x) { return log2f(x); }
SPARSE_RCNN_HD inline double log2_of(double x) { return log2(x); }
SPARSE_RCNN_HD inline float split_exponent(float x, int* exponent) { return frexpf(x, exponent); }
SPARSE_RCNN_HD inline double split_exponent(double x, int* exponent) { return frexp(x, exponent); }

// a * b, rounded: the compiler may not fuse it into an addition that follows.
template <typename T>
SPARSE_RCNN_HD inline T rounded_product(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return __fmul_rn(a, b);
  } else {
    return __dmul_rn(a, b);
  }
#else
  volatile T product = a * b;
  return product;
#endif
}

// log2, correctly rounded just below a power of two: libraries differ there in the last bit, which
// decides the level.
template <typename T>
SPARSE_RCNN_HD inline T level_log2(T x) {
  constexpr T kNear =
      T(64) * (sizeof(T) == sizeof(float) ? T(1.1920928955078125e-7) : T(2.220446049250313e-16));
  int exponent = 0;
  T below = split_exponent(x, &exponent) - T(1);  // x = (1 + below) * 2^exponent, exactly
  if (below > -kNear && below < T(0)) {
    return T(exponent) + rounded_product(below, T(1.4426950408889634));
  }
  return log2_of(x);
}

template <typename T>
SPARSE_RCNN_HD inline T box_area(const T* box) {
  return (box[2] - box[0]) * (box[3] - box[1]);
}

// False for a box of negative or NaN area: it pools to zeros, has no gradient and reads nothing.
template <typename T>
SPARSE_RCNN_HD inline bool box_pools(const T* box) {
  return box_area(box) >= T(0);
}

// Index of the level that `box` (xyxy in pixels) reads; 0 for a box that does not pool. `finest` is
// log2 of the first level's stride. Rule is LevelRule of roi_align_args.h, which needs torch's
// headers; this one needs none.
template <typename T, typename Rule>
SPARSE_RCNN_HD inline int box_level(const T* box, Rule rule, int finest, int levels) {
  T area = box_area(box);
  if (!(area >= T(0))) return 0;
  T side = sqrt_of(area);
  T level;
  if (rule == Rule::detectron2) {
    level = floor_of(T(4) + level_log2(side / T(224) + T(1e-8)));
  } else {
    level = floor_of(level_log2(side / T(56) + T(1e-6))) + T(2);
  }
  level -= T(finest);
  if (!(level > T(0))) return 0;  // compared as T: the level of an infinite box is infinite
  return level >= T(levels - 1) ? levels - 1 : static_cast<int>(level);
}

// One side of a box on the map of one level.
template <typename T>
struct Axis {
  T start;     // first edge, in cells from the first cell's centre
  T extent;    // of one bin, in cells; negative in a box turned inside out
  int length;  // cells of the map
};

// `scale` is cells a pixel: a power of two, so that the products are exact.
template <typename T>
SPARSE_RCNN_HD inline Axis<T> make_axis(T first, T last, T scale, int length, int size) {
  T start = first * scale - T(0.5), end = last * scale - T(0.5);
  return {start, (end - start) / T(size), length};
}

// W is the type of the weights, that of the accumulation.
template <typename W>
struct Tap {
  int cell;
  int bin;
  W weight;
};

// Add to the `count` taps of one bin, ascending in cell. Returns the new count.
template <typename W>
SPARSE_RCNN_HD inline int insert_tap(Tap<W>* taps, int count, int bin, int cell, W weight) {
  int place = count;
  while (place > 0 && taps[place - 1].cell > cell) --place;
  if (place > 0 && taps[place - 1].cell == cell) {
    taps[place - 1].weight += weight;
    return count;
  }
  for (int k = count; k > place; --k) taps[k] = taps[k - 1];
  taps[place] = {cell, bin, weight};
  return count + 1;
}

// The taps of one bin: at most 2 * samples, cells ascending and distinct, weights positive and
// already divided by `samples`. Returns how many. A sample more than one cell outside the map (or
// NaN) gives none.
template <typename T, typename W>
SPARSE_RCNN_HD inline int bin_taps(const Axis<T>& axis, int bin, int samples, Tap<W>* taps) {
  const T bin_start = axis.start + rounded_product(T(bin), axis.extent), last = T(axis.length - 1);
  int count = 0;
  for (int sample = 0; sample < samples; ++sample) {
    T point = bin_start + rounded_product(T(sample) + T(0.5), axis.extent) / T(samples);
    if (!(point >= T(-1) && point <= T(axis.length))) continue;
    if (point >= last) {  // before any conversion: `last` may round up, beyond what an int holds
      count = insert_tap(taps, count, bin, axis.length - 1, W(1));
      continue;
    }
    if (point < T(0)) point = T(0);
    T low = floor_of(point);
    W fraction = static_cast<W>(point - low);
    if (fraction < W(1))
      count = insert_tap(taps, count, bin, static_cast<int>(low), W(1) - fraction);
    if (fraction > W(0)) count = insert_tap(taps, count, bin, static_cast<int>(low) + 1, fraction);
  }
  for (int k = 0; k < count; ++k) taps[k].weight /= W(samples);
  return count;
}

// The taps of all bins of an axis (room for 2 * size * samples), bin after bin. In a box turned
// inside out the bins come last to first, so that cells ascend (but for ties and roundings) either
// way. Returns how many.
template <typename T, typename W>
SPARSE_RCNN_HD inline int axis_taps(const Axis<T>& axis, int size, int samples, Tap<W>* taps) {
  int count = 0;
  for (int k = 0; k < size; ++k) {
    count += bin_taps(axis, axis.extent < T(0) ? size - 1 - k : k, samples, taps + count);
  }
  return count;
}

template <typename W>
SPARSE_RCNN_HD inline bool before_by_cell(const Tap<W>& a, const Tap<W>& b) {
  return a.cell < b.cell || (a.cell == b.cell && a.bin < b.bin);
}

// Reorder taps by cell, then bin. By insertion: `axis_taps` leaves them nearly in that order.
template <typename W>
SPARSE_RCNN_HD inline void sort_by_cell(Tap<W>* taps, int count) {
  for (int k = 1; k < count; ++k) {
    const Tap<W> tap = taps[k];
    int place = k;
    for (; place > 0 && before_by_cell(tap, taps[place - 1]); --place)
      taps[place] = taps[place - 1];
    taps[place] = tap;
  }
}

// Where `sort_by_cell` would put taps[index]: for one thread a tap. (cell, bin) pairs are distinct,
// so ranks are too.
template <typename W>
SPARSE_RCNN_HD inline int rank_by_cell(const Tap<W>* taps, int count, int index) {
  int rank = 0;
  for (int k = 0; k < count; ++k) rank += before_by_cell(taps[k], taps[index]);
  return rank;
}

}  // namespace sparse_rcnn
