// RoIAlign over the levels of a pyramid, and its backward, on the CPU.
//
// Both are bound by memory: for 49 bins a box reads up to 28 x 28 cells (0.8 MB of 256 floats).
//
// Forward: threads take one box after another, neighbours next to one another, whose cells are
// still in a cache; each output is written once, straight from registers.
//
// Backward: threads take one band of rows after another, which stays in a cache while all boxes
// that reach it are added in order. Every sum is so made by one thread in one order: no atomics,
// and the same bits on any number of threads.
#include "cpu/multiscale_roi_align.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>
#include <vector>

#include "common/roi_align_args.h"
#include "cpu/roi_taps.h"

#define SPARSE_RCNN_KERNELS "cpu/roi_align_kernels.h"
#include "cpu/for_each_isa.h"

namespace sparse_rcnn {
namespace {

// work(index) for 0 <= index < count, threads taking the next index when they are done with one.
template <typename MakeWork>
void share_out(int64_t count, const MakeWork& make_work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto work = make_work();
    for (int64_t index = next++; index < count; index = next++) work(index);
  });
}

// function(T{}, BoxType{}) for the stored type of the maps and the type of the boxes.
template <typename T, typename Function>
void with_box_type(const RoiAlignInputs& inputs, const Function& function) {
  if (inputs.boxes.scalar_type() == ScalarType::Double) {
    function(T{}, double{});
  } else {
    function(T{}, float{});
  }
}

template <typename Function>
void with_types(ScalarType dtype, const RoiAlignInputs& inputs, const Function& function) {
  switch (dtype) {
    case ScalarType::Float:
      return with_box_type<float>(inputs, function);
    case ScalarType::Double:
      return with_box_type<double>(inputs, function);
    case ScalarType::BFloat16:
      return with_box_type<BFloat16Bits>(inputs, function);
    default:
      return with_box_type<HalfBits>(inputs, function);
  }
}

// The level of a box and a range that its rows on it lie in: empty for a box that pools to zeros.
template <typename BoxType>
struct Reach {
  int level;
  BoxType low;
  BoxType high;

  Reach(const RoiAlignArgs& args, const BoxType* box)
      : level(box_level(box, args.level_rule, args.finest, args.level_count)), low(1), high(0) {
    if (!box_pools(box)) return;
    const auto scale = static_cast<BoxType>(args.levels[level].scale);
    low = std::min(box[1], box[3]) * scale - 3;
    high = std::max(box[1], box[3]) * scale + 3;
  }
};

template <typename BoxType>
std::vector<Reach<BoxType>> reaches_of(const RoiAlignArgs& args, const BoxType* boxes) {
  std::vector<Reach<BoxType>> reaches;
  reaches.reserve(args.rois());
  for (int64_t roi = 0; roi < args.rois(); ++roi) reaches.emplace_back(args, boxes + roi * 4);
  return reaches;
}

// The boxes image by image, level by level and from top to bottom.
template <typename BoxType>
std::vector<int64_t> reading_order(const RoiAlignArgs& args, const BoxType* boxes) {
  const auto reaches = reaches_of(args, boxes);
  std::vector<int64_t> order(args.rois());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return std::make_tuple(a / args.proposals, reaches[a].level, reaches[a].low, a) <
           std::make_tuple(b / args.proposals, reaches[b].level, reaches[b].low, b);
  });
  return order;
}

template <typename T, typename BoxType>
void pool(const RoiAlignInputs& inputs, T* out) {
  const RoiAlignArgs& args = inputs.args;
  const auto* boxes = static_cast<const BoxType*>(inputs.boxes.const_data_ptr());
  const auto pool_box = SPARSE_RCNN_BEST(pool_roi<T, T>);
  const auto order = reading_order(args, boxes);
  share_out(args.rois(), [&] {
    return [&, maker = RoiTapMaker<Accumulation<T>>(args)](int64_t place) mutable {
      const int64_t roi = order[place];
      const auto taps = maker.by_bin(boxes, roi);
      const RoiAlignLevel& level = args.levels[taps.level];
      const int64_t image_start = taps.image * level.height * level.width * args.channels;
      pool_box(taps, static_cast<const T*>(level.data) + image_start, args.channels,
               out + roi * args.bins() * args.channels);
    };
  });
}

// A share of the backward's work: some rows of one level of one image.
struct Band {
  int64_t image;
  int level;
  int first;
  int end;
};

constexpr int kBandRows = 16;  // 8 to 64 take about the same time

std::vector<Band> make_bands(const RoiAlignArgs& args) {
  std::vector<Band> bands;
  for (int64_t image = 0; image < args.images; ++image) {
    for (int level = 0; level < args.level_count; ++level) {
      const int height = args.levels[level].height;
      for (int first = 0; first < height; first += kBandRows) {
        bands.push_back({image, level, first, std::min(first + kBandRows, height)});
      }
    }
  }
  return bands;
}

template <typename BoxType>
bool meets(const Reach<BoxType>& reach, const Band& band) {
  return reach.level == band.level && reach.low < static_cast<BoxType>(band.end) &&
         reach.high > static_cast<BoxType>(band.first);
}

template <typename T, typename BoxType>
void scatter(const RoiAlignInputs& inputs, const T* grad, Accumulation<T>* cells) {
  const RoiAlignArgs& args = inputs.args;
  const int64_t C = args.channels, N = args.proposals;
  const auto* boxes = static_cast<const BoxType*>(inputs.boxes.const_data_ptr());
  const auto scatter_box = SPARSE_RCNN_BEST(scatter_roi<T>);
  const auto reaches = reaches_of(args, boxes);
  const auto bands = make_bands(args);
  share_out(static_cast<int64_t>(bands.size()), [&] {
    return [&, maker = RoiTapMaker<Accumulation<T>>(args)](int64_t index) mutable {
      const Band& band = bands[index];
      for (int64_t roi = band.image * N; roi < (band.image + 1) * N; ++roi) {
        if (!meets(reaches[roi], band)) continue;
        const auto taps = maker.by_cell(boxes, roi);
        scatter_box(taps, band.first, band.end, grad + roi * args.bins() * C, C,
                    cells + taps.first_row * C);
      }
    };
  });
}

Tensor multiscale_roi_align_cpu(const std::vector<Tensor>& features, const Tensor& boxes,
                                const std::vector<int64_t>& strides, int64_t output_size,
                                int64_t sampling_ratio, const std::string& level_rule) {
  const RoiAlignInputs inputs =
      parse_roi_align(features, boxes, strides, output_size, sampling_ratio, level_rule);
  const RoiAlignArgs& args = inputs.args;
  const Tensor pooled = torch::stable::new_empty(
      features[0], {args.images, args.proposals, args.bins(), args.channels});
  with_types(inputs.dtype, inputs, [&](auto value, auto box_value) {
    using T = decltype(value);
    pool<T, decltype(box_value)>(inputs, static_cast<T*>(pooled.mutable_data_ptr()));
  });
  return pooled;
}

void multiscale_roi_align_backward_cpu(const Tensor& grad, const std::vector<Tensor>& features,
                                       const Tensor& boxes, const std::vector<int64_t>& strides,
                                       int64_t output_size, int64_t sampling_ratio,
                                       const std::string& level_rule, bool /*deterministic*/,
                                       Tensor grad_cells) {
  const RoiAlignInputs inputs =
      parse_roi_align(features, boxes, strides, output_size, sampling_ratio, level_rule);
  if (wants_grad_cells(grad_cells, inputs)) {
    scatter_roi_grads(inputs, parse_roi_align_grad(grad, inputs), grad_cells);
  }
}

}  // namespace

void scatter_roi_grads(const RoiAlignInputs& inputs, const Tensor& grad, const Tensor& grad_cells) {
  with_types(grad.scalar_type(), inputs, [&](auto value, auto box_value) {
    using T = decltype(value);
    scatter<T, decltype(box_value)>(inputs, static_cast<const T*>(grad.const_data_ptr()),
                                    static_cast<Accumulation<T>*>(grad_cells.mutable_data_ptr()));
  });
}

}  // namespace sparse_rcnn

STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CPU, m) {
  m.impl("multiscale_roi_align", TORCH_BOX(&sparse_rcnn::multiscale_roi_align_cpu));
  m.impl("multiscale_roi_align_backward",
         TORCH_BOX(&sparse_rcnn::multiscale_roi_align_backward_cpu));
}
