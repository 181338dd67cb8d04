// The arguments of multiscale_roi_align and roi_dynamic_conv, checked and packed once for the CPU
// and the CUDA kernels.
//
// Python has already refused bad arguments with the user's error; these checks keep a direct call
// through torch.ops from reading out of bounds. The kernels get RoiAlignArgs by value and trust
// every number in it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "common/check.h"

namespace sparse_rcnn {

constexpr int kMaxLevels = 8;
constexpr int kMaxSamples = 512;  // a side of a box: output_size * sampling_ratio

enum class LevelRule : int32_t { detectron2, mmdet };

// One level of the pyramid: a dense channels-last map [B, height, width, C].
struct RoiAlignLevel {
  const void* data;
  int64_t row_offset;  // of the level's region [B, height, width] among the rows of grad_cells
  double scale;        // cells a pixel, 1 / stride: a power of two, exact in every floating type
  int32_t height;
  int32_t width;
};

struct RoiAlignArgs {
  RoiAlignLevel levels[kMaxLevels];
  int32_t level_count;
  int32_t finest;  // log2(strides[0])
  LevelRule level_rule;
  int32_t output_size;     // S bins a side, P = S * S
  int32_t sampling_ratio;  // samples a side of each bin
  int64_t images;          // B
  int64_t proposals;       // N, of each image
  int64_t channels;        // C
  int64_t cells;           // rows of grad_cells: B * sum(height * width)
  const void* boxes;       // [B, N, 4]
  bool double_boxes;       // boxes are double, else float

  int64_t rois() const { return images * proposals; }
  int64_t bins() const { return int64_t{output_size} * output_size; }
};

// The arguments and the tensors that own the memory they point to.
struct RoiAlignInputs {
  RoiAlignArgs args;
  std::vector<Tensor> maps;  // channels-last
  Tensor boxes;              // [B, N, 4], contiguous, float32 or float64
  ScalarType dtype;          // of the maps
};

inline void check_floating_map(const Tensor& map) {
  const ScalarType dtype = map.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "features: expected float32, float64, bfloat16 or float16");
}

inline void check_strides(const std::vector<int64_t>& strides, size_t level_count) {
  STD_TORCH_CHECK(level_count >= 1 && level_count <= kMaxLevels, "features: expected 1 to ",
                  kMaxLevels, " levels, got ", level_count);
  STD_TORCH_CHECK(strides.size() == level_count, "strides: expected one a level, got ",
                  strides.size(), " for ", level_count, " features");
  constexpr int64_t largest = int64_t{1} << 30;
  for (size_t index = 0; index < strides.size(); ++index) {
    const int64_t stride = strides[index];
    STD_TORCH_CHECK(stride >= 1 && stride <= largest && (stride & (stride - 1)) == 0 &&
                        (index == 0 || stride == 2 * strides[index - 1]),
                    "strides: expected powers of two, each twice the one before, got ", stride,
                    " at level ", index);
  }
}

// `need_maps` is false where the maps' sizes are enough, as in a backward: their data is null then.
inline RoiAlignInputs parse_roi_align(const std::vector<Tensor>& features, const Tensor& boxes,
                                      const std::vector<int64_t>& strides, int64_t output_size,
                                      int64_t sampling_ratio, const std::string& level_rule,
                                      bool need_maps = true) {
  check_strides(strides, features.size());
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, "boxes: expected [B, N, 4], got ",
                  shape_of(boxes));
  STD_TORCH_CHECK(
      boxes.scalar_type() == ScalarType::Float || boxes.scalar_type() == ScalarType::Double,
      "boxes: expected float32 or float64");
  // Far above any use; it keeps the taps of a box in the shared memory of a GPU block.
  STD_TORCH_CHECK(output_size >= 1 && output_size <= kMaxSamples && sampling_ratio >= 1 &&
                      sampling_ratio <= kMaxSamples && output_size * sampling_ratio <= kMaxSamples,
                  "output_size, sampling_ratio: expected 1 to ", kMaxSamples,
                  " samples a side, got ", output_size, " * ", sampling_ratio);
  STD_TORCH_CHECK(level_rule == "detectron2" || level_rule == "mmdet",
                  "level_rule: expected detectron2 or mmdet, got ", level_rule);

  RoiAlignInputs inputs{
      .args = {}, .maps = {}, .boxes = torch::stable::contiguous(boxes), .dtype = {}};
  RoiAlignArgs& args = inputs.args;
  args.level_count = static_cast<int32_t>(features.size());
  args.level_rule = level_rule == "mmdet" ? LevelRule::mmdet : LevelRule::detectron2;
  args.output_size = static_cast<int32_t>(output_size);
  args.sampling_ratio = static_cast<int32_t>(sampling_ratio);
  args.boxes = inputs.boxes.data_ptr();
  args.double_boxes = boxes.scalar_type() == ScalarType::Double;
  args.images = boxes.size(0);
  args.proposals = boxes.size(1);
  while ((int64_t{1} << args.finest) < strides[0]) {
    ++args.finest;
  }

  check_floating_map(features[0]);
  inputs.dtype = features[0].scalar_type();
  for (size_t index = 0; index < features.size(); ++index) {
    const Tensor& feature = features[index];
    STD_TORCH_CHECK(feature.dim() == 4 && feature.size(0) == args.images &&
                        feature.size(1) == features[0].size(1) && feature.size(2) >= 1 &&
                        feature.size(3) >= 1,
                    "features[", index, "]: expected [", args.images,
                    ", C, H, W] of one C and at least one cell, got ", shape_of(feature));
    STD_TORCH_CHECK(feature.size(2) <= std::numeric_limits<int32_t>::max() &&
                        feature.size(3) <= std::numeric_limits<int32_t>::max(),
                    "features[", index, "]: expected sides below 2^31");
    STD_TORCH_CHECK(feature.scalar_type() == inputs.dtype, "features[", index,
                    "]: expected the dtype of features[0]");
    STD_TORCH_CHECK(same_device(feature, boxes), "features[", index,
                    "]: expected the device of boxes");
    RoiAlignLevel& level = args.levels[index];
    if (need_maps) {  // a no-op when the map is channels_last already
      inputs.maps.push_back(
          torch::stable::contiguous(feature, torch::headeronly::MemoryFormat::ChannelsLast));
      level.data = inputs.maps.back().data_ptr();
    }
    level.row_offset = args.cells;
    level.scale = 1.0 / static_cast<double>(strides[index]);
    level.height = static_cast<int32_t>(feature.size(2));
    level.width = static_cast<int32_t>(feature.size(3));
    args.cells += args.images * feature.size(2) * feature.size(3);
  }
  args.channels = features[0].size(1);
  return inputs;
}

// The gradient of the pooled features, [B, N, P, C] of the maps' dtype, made contiguous.
inline Tensor parse_roi_align_grad(const Tensor& grad, const RoiAlignInputs& inputs) {
  const RoiAlignArgs& args = inputs.args;
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == args.images &&
                      grad.size(1) == args.proposals && grad.size(2) == args.bins() &&
                      grad.size(3) == args.channels,
                  "grad: expected [", args.images, ", ", args.proposals, ", ", args.bins(), ", ",
                  args.channels, "], got ", shape_of(grad));
  STD_TORCH_CHECK(grad.scalar_type() == inputs.dtype, "grad: expected the dtype of features");
  STD_TORCH_CHECK(same_device(grad, inputs.boxes), "grad: expected the device of boxes");
  return torch::stable::contiguous(grad);
}

// Whether the gradient of the features is wanted: grad_cells is [cells, C], to add into, or has no
// rows.
inline bool wants_grad_cells(const Tensor& grad_cells, const RoiAlignInputs& inputs) {
  const RoiAlignArgs& args = inputs.args;
  STD_TORCH_CHECK(grad_cells.dim() == 2, "grad_cells: expected rank 2, got ",
                  shape_of(grad_cells));
  if (grad_cells.size(0) == 0) {
    return false;
  }
  STD_TORCH_CHECK(grad_cells.size(0) == args.cells && grad_cells.size(1) == args.channels &&
                      grad_cells.is_contiguous(),
                  "grad_cells: expected contiguous [", args.cells, ", ", args.channels, "], got ",
                  shape_of(grad_cells));
  STD_TORCH_CHECK(grad_cells.scalar_type() == accumulation_type(inputs.dtype),
                  "grad_cells: expected the accumulation type of features");
  STD_TORCH_CHECK(same_device(grad_cells, inputs.boxes),
                  "grad_cells: expected the device of boxes");
  return true;
}

}  // namespace sparse_rcnn
