// The arguments of normalize_pad, checked and packed for the CPU and CUDA kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/check.h"
#include "common/resample_math.h"

namespace sparse_rcnn {

// Longer sides would overflow the sums of 32 bits.
constexpr int64_t kMaxSide = (int64_t{1} << 20) - 1;

// Where an image lies, in bytes. Packed: `capacity` bytes with the rows one after the other, so
// that their pitch follows from the width that `sizes` names.
struct ImageView {
  const uint8_t* data;
  int64_t row_stride, pixel_stride, channel_stride;
  int64_t height, width;  // the most that `sizes` may name
  int64_t capacity;
  bool packed;
};

// One image's row of `sizes`; new_height 0: none of its pixels is used.
struct ImageSizes {
  int height, width;
  int new_height, new_width;
  int64_t row_stride;
};

// What does not fit becomes padding: on a GPU nobody can raise.
SPARSE_RCNN_HD inline ImageSizes resolve_sizes(const ImageView& image, const int64_t* sizes,
                                               int64_t height, int64_t width) {
  const int64_t h = sizes[0], w = sizes[1], new_h = sizes[2], new_w = sizes[3];
  const bool fits = h >= 1 && w >= 1 && new_h >= 1 && new_w >= 1 && h <= image.height &&
                    w <= image.width && new_h <= height && new_w <= width &&
                    (!image.packed || 3 * h * w <= image.capacity);
  if (!fits) return {0, 0, 0, 0, 0};
  return {static_cast<int>(h), static_cast<int>(w), static_cast<int>(new_h),
          static_cast<int>(new_w), image.packed ? 3 * w : image.row_stride};
}

struct NormalizePadInputs {
  std::vector<ImageView> images;
  Tensor sizes;  // [B, 4] contiguous int64
  int64_t height;
  int64_t width;
  float mean[3];
  float std[3];
};

inline ImageView view_of(const Tensor& image) {
  const uint8_t* data = image.const_data_ptr<uint8_t>();
  if (image.dim() == 1) return {data, 0, 3, 1, kMaxSide, kMaxSide, image.numel(), true};
  return {data,           image.stride(1), image.stride(2), image.stride(0), image.size(1),
          image.size(2), 0,               false};
}

inline NormalizePadInputs parse_normalize_pad(const std::vector<Tensor>& images,
                                              const Tensor& sizes, int64_t height, int64_t width,
                                              const std::vector<double>& mean,
                                              const std::vector<double>& std) {
  STD_TORCH_CHECK(!images.empty(), "images: expected at least one");
  STD_TORCH_CHECK(height >= 1 && width >= 1 && height <= kMaxSide && width <= kMaxSide,
                  "shape: expected 1..", kMaxSide, ", got ", height, " and ", width);
  STD_TORCH_CHECK(mean.size() == 3 && std.size() == 3, "mean, std: expected three numbers each");
  check_shape("sizes", sizes, {static_cast<int64_t>(images.size()), 4});
  check_dtype("sizes", sizes, ScalarType::Long);
  check_same_device("sizes", sizes, images[0]);
  NormalizePadInputs inputs{.images = {},
                            .sizes = torch::stable::contiguous(sizes),
                            .height = height,
                            .width = width,
                            .mean = {},
                            .std = {}};
  for (const Tensor& image : images) {
    check_dtype("images", image, ScalarType::Byte);
    check_same_device("images", image, images[0]);
    const bool fits = image.dim() == 1 || (image.dim() == 3 && image.size(0) == 3 &&
                                           image.size(1) <= kMaxSide && image.size(2) <= kMaxSide);
    STD_TORCH_CHECK(fits, "images: expected shape [3, h, w] with sides of at most ", kMaxSide,
                    " or [bytes], got ", shape_of(image));
    STD_TORCH_CHECK(image.dim() == 3 || image.is_contiguous(), "images: expected bytes in a row");
    inputs.images.push_back(view_of(image));
  }
  for (int channel = 0; channel < 3; ++channel) {
    inputs.mean[channel] = static_cast<float>(mean[channel]);
    inputs.std[channel] = static_cast<float>(std[channel]);
  }
  return inputs;
}

}  // namespace sparse_rcnn
