// Resize, normalise, pad and cast on the CPU. A thread goes down its rows of the batch with the
// horizontally resized rows that the next output row needs in a ring, so that each input row is
// read and resized once and nothing but the result is written to memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "common/normalize_pad_args.h"

namespace sparse_rcnn {
constexpr int kPixelGroup = 16;  // pixels of the horizontal pass that share a block of weights
}

#define SPARSE_RCNN_KERNELS "cpu/normalize_pad_kernels.h"
#include "cpu/for_each_isa.h"

namespace sparse_rcnn {
namespace {

constexpr int64_t kValuesPerTask = 32768;  // below it a second thread costs more than it saves
constexpr int64_t kSlack = 64;             // bytes that the horizontal pass may write behind a row

// The weights of an axis with the same number of taps for every output pixel; none is outside of
// the image.
struct AxisTable {
  int taps = 0;
  std::vector<int32_t> begin;    // [to]
  std::vector<int32_t> weights;  // [to, taps]
};

AxisTable make_table(int from, int to) {
  const ResampleAxis axis = resample_axis(from, to);
  AxisTable table;
  table.begin.resize(to);
  std::vector<int32_t> values;  // of all windows, without zeros at their ends
  std::vector<size_t> starts(to + 1, 0);
  for (int i = 0; i < to; ++i) {
    const ResampleWindow window = resample_window(axis, i);
    table.begin[i] = window.begin;
    for (int tap = 0; tap < window.count; ++tap) {
      values.push_back(resample_weight(axis, window, tap));
    }
    while (values.size() > starts[i] + 1 && values.back() == 0) values.pop_back();
    starts[i + 1] = values.size();
    table.taps = std::max(table.taps, static_cast<int>(starts[i + 1] - starts[i]));
  }
  table.weights.assign(static_cast<size_t>(to) * table.taps, 0);
  for (int i = 0; i < to; ++i) {
    const int begin = std::min(table.begin[i], from - table.taps);
    std::copy(values.begin() + starts[i], values.begin() + starts[i + 1],
              table.weights.begin() + static_cast<size_t>(i) * table.taps + table.begin[i] - begin);
    table.begin[i] = begin;
  }
  return table;
}

// All that the rows of one image share.
struct ImagePlan {
  ImageView image;
  ImageSizes sizes;
  AxisTable vertical;
  int horizontal_taps = 0;  // 0: the width stays
  int64_t groups = 0;
  std::vector<int32_t> at;       // of the horizontal pass, as resample_row() wants them
  std::vector<int32_t> weights;
};

ImagePlan make_plan(const ImageView& image, const ImageSizes& sizes) {
  ImagePlan plan{.image = image, .sizes = sizes};
  if (sizes.new_height == 0) return plan;
  plan.vertical = make_table(sizes.height, sizes.new_height);
  if (sizes.width == sizes.new_width) return plan;
  const AxisTable table = make_table(sizes.width, sizes.new_width);
  const int64_t taps = table.taps;
  plan.horizontal_taps = table.taps;
  plan.groups = (sizes.new_width + kPixelGroup - 1) / kPixelGroup;
  plan.at.assign(plan.groups * kPixelGroup, 0);
  plan.weights.assign(plan.groups * kPixelGroup * taps, 0);
  for (int64_t x = 0; x < sizes.new_width; ++x) {
    plan.at[x] = 3 * table.begin[x];
    for (int64_t tap = 0; tap < taps; ++tap) {
      plan.weights[(x / kPixelGroup * taps + tap) * kPixelGroup + x % kPixelGroup] =
          table.weights[x * taps + tap];
    }
  }
  return plan;
}

// Input rows of one image as interleaved pixels of the new width.
class Rows {
 public:
  explicit Rows(const ImagePlan& plan)
      : plan_(plan),
        pitch_(3 * (int64_t{plan.sizes.new_width} + kPixelGroup) + kSlack),
        taps_(plan.vertical.taps),
        ring_(new uint8_t[pitch_ * taps_]),
        copy_(new uint8_t[3 * int64_t{plan.sizes.width} + kSlack]),
        of_slot_(taps_, nullptr),
        window_(taps_) {}

  // Rows begin, begin + 1, ... of as many as there are taps. `begin` may not go back.
  const uint8_t* const* window(int begin) {
    for (next_ = std::max(next_, begin); next_ < begin + taps_; ++next_) {
      of_slot_[next_ % taps_] = make(next_, ring_.get() + next_ % taps_ * pitch_);
    }
    for (int tap = 0; tap < taps_; ++tap) window_[tap] = of_slot_[(begin + tap) % taps_];
    return window_.data();
  }

 private:
  const uint8_t* make(int y, uint8_t* slot) const {
    const uint8_t* row = plan_.image.data + y * plan_.sizes.row_stride;
    const bool interleaved = plan_.image.pixel_stride == 3 && plan_.image.channel_stride == 1;
    if (plan_.horizontal_taps == 0) return interleaved ? row : interleave(row, slot);
    // A byte behind the row is read with it: it must be the image's own.
    const bool followed = y + 1 < plan_.sizes.height &&
                          plan_.sizes.row_stride >= 3 * int64_t{plan_.sizes.width};
    if (!interleaved || !followed) row = interleave(row, copy_.get());
    SPARSE_RCNN_BEST(resample_row)
    (row, plan_.at.data(), plan_.weights.data(), plan_.groups, plan_.horizontal_taps, slot);
    return slot;
  }

  const uint8_t* interleave(const uint8_t* row, uint8_t* out) const {
    const int64_t step = plan_.image.pixel_stride, channel = plan_.image.channel_stride;
    for (int64_t x = 0; x < plan_.sizes.width; ++x) {
      out[3 * x] = row[x * step];
      out[3 * x + 1] = row[x * step + channel];
      out[3 * x + 2] = row[x * step + 2 * channel];
    }
    return out;
  }

  const ImagePlan& plan_;
  int64_t pitch_;
  int taps_;
  int next_ = 0;  // the first row that is not made
  std::unique_ptr<uint8_t[]> ring_;  // [taps, pitch]
  std::unique_ptr<uint8_t[]> copy_;
  std::vector<const uint8_t*> of_slot_, window_;
};

// `values` repeated as normalize_row() wants them.
std::vector<float> repeat(const float* values) {
  std::vector<float> result(kPixelGroup + 2);
  for (int i = 0; i < kPixelGroup + 2; ++i) result[i] = values[i % 3];
  return result;
}

template <typename T>
class Normalizer {
 public:
  Normalizer(const NormalizePadInputs& inputs, const Tensor& out)
      : height_(inputs.height),
        row_values_(3 * inputs.width),
        mean_(repeat(inputs.mean)),
        std_(repeat(inputs.std)),
        out_(static_cast<T*>(out.mutable_data_ptr())) {
    const int64_t* sizes = inputs.sizes.const_data_ptr<int64_t>();
    for (size_t b = 0; b < inputs.images.size(); ++b) {
      const ImageView& image = inputs.images[b];
      plans_.push_back(
          make_plan(image, resolve_sizes(image, sizes + 4 * b, inputs.height, inputs.width)));
    }
  }

  void run() const {
    const int64_t rows = static_cast<int64_t>(plans_.size()) * height_;
    const int64_t grain = std::max<int64_t>(1, kValuesPerTask / row_values_);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t b = begin / height_, y = begin % height_;
        const int64_t count = std::min(end - begin, height_ - y);
        write_rows(plans_[b], y, y + count, out_ + begin * row_values_);
        begin += count;
      }
    });
  }

 private:
  void write_rows(const ImagePlan& plan, int64_t begin, int64_t end, T* out) const {
    const int64_t filled = std::clamp<int64_t>(plan.sizes.new_height, begin, end) - begin;
    if (filled > 0) {
      const int64_t values = 3 * int64_t{plan.sizes.new_width};
      const int taps = plan.vertical.taps;
      const auto kernel = SPARSE_RCNN_BEST(normalize_row<T>);
      Rows rows(plan);
      for (int64_t y = begin; y < begin + filled; ++y) {
        T* row = out + (y - begin) * row_values_;
        kernel(rows.window(plan.vertical.begin[y]), plan.vertical.weights.data() + y * taps, taps,
               values, mean_.data(), std_.data(), row);
        std::memset(row + values, 0, (row_values_ - values) * sizeof(T));
      }
    }
    std::memset(out + filled * row_values_, 0, (end - begin - filled) * row_values_ * sizeof(T));
  }

  int64_t height_;
  int64_t row_values_;
  std::vector<float> mean_, std_;
  std::vector<ImagePlan> plans_;
  T* out_;
};

Tensor normalize_pad_cpu(const std::vector<Tensor>& images, const Tensor& sizes, int64_t height,
                         int64_t width, const std::vector<double>& mean,
                         const std::vector<double>& std, ScalarType dtype) {
  const NormalizePadInputs inputs = parse_normalize_pad(images, sizes, height, width, mean, std);
  const int64_t B = static_cast<int64_t>(images.size());
  const Tensor out =
      torch::stable::new_empty(images[0], std::vector<int64_t>{B, height, width, 3}, dtype);
  switch (dtype) {
    case ScalarType::Float: Normalizer<float>(inputs, out).run(); break;
    case ScalarType::BFloat16: Normalizer<BFloat16Bits>(inputs, out).run(); break;
    case ScalarType::Half: Normalizer<HalfBits>(inputs, out).run(); break;
    default: STD_TORCH_CHECK(false, "dtype: expected float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace
}  // namespace sparse_rcnn

STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CPU, m) {
  m.impl("normalize_pad", TORCH_BOX(&sparse_rcnn::normalize_pad_cpu));
}
