// The weights of one axis of an antialiased bilinear resize, to the last bit those of Pillow's
// 8-bit images, which detectors of this family are trained with: a triangle of the width of one
// output pixel (at least of one input pixel) around each output pixel's centre, cut at the image's
// rim, normalised in double and rounded to 22 bits. Both passes sum in integers and round to 8
// bits; the horizontal one comes first. Shared by the CPU and CUDA kernels.
#pragma once

#include "common/box_math.h"

namespace sparse_rcnn {

constexpr int kResampleBits = 22;
constexpr int kResampleHalf = 1 << (kResampleBits - 1);

struct ResampleAxis {
  int from;        // pixels that there are
  double scale;    // input pixels an output pixel
  double support;  // half of the triangle's base, in input pixels
  double slope;    // 1 / support
};

SPARSE_RCNN_HD inline ResampleAxis resample_axis(int from, int to) {
  const double scale = static_cast<double>(from) / to;
  const double support = scale < 1.0 ? 1.0 : scale;
  return {from, scale, support, 1.0 / support};
}

// The input pixels that an output pixel sees.
struct ResampleWindow {
  double center;
  double total;  // of the weights before they are normalised
  int begin;
  int count;
};

SPARSE_RCNN_HD inline double triangle_at(const ResampleAxis& axis, const ResampleWindow& window,
                                         int tap) {
  const double offset = window.begin + tap - window.center + 0.5;
  const double distance = rounded_product(offset < 0.0 ? -offset : offset, axis.slope);
  return distance < 1.0 ? 1.0 - distance : 0.0;
}

SPARSE_RCNN_HD inline ResampleWindow resample_window(const ResampleAxis& axis, int index) {
  ResampleWindow window{rounded_product(index + 0.5, axis.scale), 0.0, 0, 0};
  const int begin = static_cast<int>(window.center - axis.support + 0.5);
  const int end = static_cast<int>(window.center + axis.support + 0.5);
  window.begin = begin < 0 ? 0 : begin;
  window.count = (end < axis.from ? end : axis.from) - window.begin;
  for (int tap = 0; tap < window.count; ++tap) window.total += triangle_at(axis, window, tap);
  return window;
}

SPARSE_RCNN_HD inline int resample_weight(const ResampleAxis& axis, const ResampleWindow& window,
                                          int tap) {
  const double share = triangle_at(axis, window, tap) / window.total;
  return static_cast<int>(0.5 + share * (1 << kResampleBits));
}

}  // namespace sparse_rcnn
