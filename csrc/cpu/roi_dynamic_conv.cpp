// Pooling and the dynamic interaction in one pass on the CPU: a thread pools a RoI into its own
// memory and goes on from there, so that RoI features never leave the cache of its core. The
// backward pools again.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/roi_align_args.h"
#include "cpu/dynamic_conv.h"
#include "cpu/multiscale_roi_align.h"
#include "cpu/roi_taps.h"

#define SPARSE_RCNN_KERNELS "cpu/roi_align_kernels.h"
#include "cpu/for_each_isa.h"

namespace sparse_rcnn {
namespace {

// Pools one RoI after the other into the same memory.
template <typename T, typename BoxType>
class Pooler {
 public:
  explicit Pooler(const RoiAlignInputs& inputs)
      : args_(inputs.args),
        boxes_(static_cast<const BoxType*>(inputs.boxes.const_data_ptr())),
        maker_(args_),
        kernel_(SPARSE_RCNN_BEST(pool_roi<T, T>)),
        pooled_(args_.bins() * args_.channels) {}

  // The features [P, C] of a RoI, until the next is pooled.
  const T* pool(int64_t roi) {
    if (roi != prepared_) prepare(roi);
    kernel_(taps_, map(), args_.channels, pooled_.data());
    return pooled_.data();
  }

  // Takes the taps of the RoI that will be pooled next; adds the cells that it reads to `ahead`.
  void prepare(int64_t roi, Ahead& ahead) {
    prepare(roi);
    const Tap<A>* columns = taps_.columns.taps;
    const Tap<A>* rows = taps_.rows.taps;
    const int column_count = taps_.columns.begin[taps_.columns.count];
    const int row_count = taps_.rows.begin[taps_.rows.count];
    if (column_count == 0) return;
    const auto [left, right] =
        std::minmax_element(columns, columns + column_count,
                            [](const auto& a, const auto& b) { return a.cell < b.cell; });
    for (int k = 0; k < row_count; ++k) {
      const int64_t row = rows[k].cell;
      if (k > 0 && row == rows[k - 1].cell) continue;
      ahead.add(map() + (row * taps_.width + left->cell) * args_.channels,
                (right->cell + 1 - left->cell) * args_.channels);
    }
  }

 private:
  using A = Accumulation<T>;

  void prepare(int64_t roi) {
    taps_ = maker_.by_bin(boxes_, roi);
    prepared_ = roi;
  }

  const T* map() const {
    const RoiAlignLevel& level = args_.levels[taps_.level];
    const int64_t image_start = taps_.image * level.height * level.width * args_.channels;
    return static_cast<const T*>(level.data) + image_start;
  }

  const RoiAlignArgs& args_;
  const BoxType* boxes_;
  RoiTapMaker<A> maker_;
  RoiTaps<A> taps_ = {};
  int64_t prepared_ = -1;
  decltype(SPARSE_RCNN_BEST(pool_roi<T, T>)) kernel_;
  std::vector<T> pooled_;
};

// The arguments of one call, checked.
struct RoiDynamicConvInputs {
  RoiAlignInputs roi_align;
  DynamicConvOperands conv;
  double eps;
};

// body(T{}, BoxType{}).
template <typename Body>
void with_types(const RoiDynamicConvInputs& inputs, const Body& body) {
  with_stored_type(inputs.conv.dtype, [&](auto value) {
    if (inputs.roi_align.boxes.scalar_type() == ScalarType::Double) {
      body(value, double{});
    } else {
      body(value, float{});
    }
  });
}

template <typename T, typename BoxType>
void run_forward(const RoiDynamicConvInputs& inputs, const Tensor& result) {
  const DynamicConvKernels<T> kernels = dynamic_conv_kernels<T>();
  const PaddedNorms<Accumulation<T>> norms(inputs.conv, inputs.eps);
  const DynamicConvSizes sizes = inputs.conv.sizes;
  const T* parameters = static_cast<const T*>(inputs.conv.parameters.const_data_ptr());
  T* out = static_cast<T*>(result.mutable_data_ptr());
  for_each_roi(inputs.conv.rois, [&] {
    return [&, pooler = Pooler<T, BoxType>(inputs.roi_align),
            space = ThreadMemory(kernels.forward_space(sizes))](int64_t roi, int64_t next) mutable {
      const T* x = pooler.pool(roi);
      Ahead ahead;
      if (next >= 0) {
        ahead.add(parameters + next * sizes.parameters(), sizes.parameters());
        ahead.add(out + next * sizes.features(), sizes.features());
        pooler.prepare(next, ahead);
      }
      kernels.forward(sizes, norms.get(), x, parameters + roi * sizes.parameters(), ahead,
                      space.get(), out + roi * sizes.features());
    };
  });
}

// Some consecutive RoIs of one image.
struct RoiRange {
  int64_t first;
  int64_t count;
};

struct RoiDynamicConvGrads {
  Tensor grad;        // of the result, [B, N, P, C]
  Tensor parameters;  // [R, 2 * C * D]
  Tensor norms;       // [R, 2 * (D + C)], of the accumulation type
};

// The gradients of a range of RoIs; those of their features, [count, P, C], unless it is null.
template <typename T, typename BoxType, typename A = Accumulation<T>>
void backward_of_range(const RoiDynamicConvInputs& inputs, const RoiDynamicConvGrads& grads,
                       const DynamicConvNorms<A>& norms, RoiRange range,
                       std::type_identity_t<A>* grad_features) {
  const DynamicConvKernels<T> kernels = dynamic_conv_kernels<T>();
  const DynamicConvSizes sizes = inputs.conv.sizes;
  const int64_t features = sizes.features(), weights = sizes.parameters();
  const T* grad = static_cast<const T*>(grads.grad.const_data_ptr());
  const T* parameters = static_cast<const T*>(inputs.conv.parameters.const_data_ptr());
  T* grad_parameters = static_cast<T*>(grads.parameters.mutable_data_ptr());
  A* grad_norms = static_cast<A*>(grads.norms.mutable_data_ptr());
  for_each_roi(range.count, [&] {
    return [&, pooler = Pooler<T, BoxType>(inputs.roi_align),
            space = ThreadMemory(kernels.backward_space(sizes))](int64_t index,
                                                                 int64_t next_index) mutable {
      const int64_t roi = range.first + index, next = range.first + next_index;
      const T* x = pooler.pool(roi);
      Ahead ahead;
      if (next_index >= 0) {
        ahead.add(parameters + next * weights, weights);
        ahead.add(grad + next * features, features);
        ahead.add(grad_parameters + next * weights, weights);
        if (grad_features) ahead.add(grad_features + next_index * features, features);
        pooler.prepare(next, ahead);
      }
      kernels.backward(sizes, norms, grad + roi * features, x,
                       parameters + roi * weights, ahead, space.get(),
                       grad_features ? grad_features + index * features : nullptr,
                       grad_parameters + roi * weights, grad_norms + roi * sizes.norms());
    };
  });
}

// The inputs of RoIAlign for a range of RoIs alone.
RoiAlignInputs select(const RoiAlignInputs& inputs, RoiRange range) {
  RoiAlignInputs selected = inputs;
  RoiAlignArgs& args = selected.args;
  const int64_t image = range.first / args.proposals;
  selected.boxes = torch::stable::narrow(selected.boxes, 0, image, 1);
  selected.boxes =
      torch::stable::narrow(selected.boxes, 1, range.first % args.proposals, range.count);
  args.images = 1;
  args.proposals = range.count;
  for (int level = 0; level < args.level_count; ++level) {
    const int64_t cells = int64_t{args.levels[level].height} * args.levels[level].width;
    args.levels[level].row_offset += image * cells;
  }
  return selected;
}

// Range after range: the gradients of its features wait in a bounded buffer, for all threads, until
// they are added to the cells in the order of RoIAlign's own backward.
template <typename T, typename BoxType>
void run_backward(const RoiDynamicConvInputs& inputs, const RoiDynamicConvGrads& grads,
                  const Tensor* grad_cells) {
  using A = Accumulation<T>;
  constexpr int64_t buffer_bytes = int64_t{16} << 20;
  const RoiAlignArgs& args = inputs.roi_align.args;
  const DynamicConvSizes sizes = inputs.conv.sizes;
  const PaddedNorms<A> norms(inputs.conv, inputs.eps);
  if (!grad_cells) {
    const RoiRange all{0, inputs.conv.rois};
    return backward_of_range<T, BoxType>(inputs, grads, norms.get(), all, nullptr);
  }
  const int64_t fits = std::max<int64_t>(1, buffer_bytes / (sizes.features() * sizeof(A)));
  const int64_t most = std::min(fits, args.proposals);
  Tensor buffer = torch::stable::new_empty(grads.norms, {1, most, sizes.bins, sizes.channels});
  for (int64_t image = 0; image < args.images; ++image) {
    for (int64_t first = 0; first < args.proposals; first += most) {
      const RoiRange range{image * args.proposals + first, std::min(most, args.proposals - first)};
      backward_of_range<T, BoxType>(inputs, grads, norms.get(), range,
                                    static_cast<A*>(buffer.mutable_data_ptr()));
      scatter_roi_grads(select(inputs.roi_align, range),
                        torch::stable::narrow(buffer, 1, 0, range.count), *grad_cells);
    }
  }
}

RoiDynamicConvInputs parse_roi_dynamic_conv(
    const std::vector<Tensor>& features, const Tensor& boxes, const Tensor& parameters,
    const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& norm2_weight,
    const Tensor& norm2_bias, const std::vector<int64_t>& strides, int64_t output_size,
    int64_t sampling_ratio, const std::string& level_rule, double eps) {
  RoiAlignInputs roi_align =
      parse_roi_align(features, boxes, strides, output_size, sampling_ratio, level_rule);
  const RoiAlignArgs& args = roi_align.args;
  DynamicConvOperands conv =
      parse_dynamic_conv(features[0], args.rois(), args.bins(), args.channels, parameters,
                         norm1_weight, norm1_bias, norm2_weight, norm2_bias);
  return {std::move(roi_align), std::move(conv), eps};
}

Tensor roi_dynamic_conv_cpu(const std::vector<Tensor>& features, const Tensor& boxes,
                            const Tensor& parameters, const Tensor& norm1_weight,
                            const Tensor& norm1_bias, const Tensor& norm2_weight,
                            const Tensor& norm2_bias, const std::vector<int64_t>& strides,
                            int64_t output_size, int64_t sampling_ratio,
                            const std::string& level_rule, double eps, bool /*allow_tf32*/) {
  const RoiDynamicConvInputs inputs = parse_roi_dynamic_conv(
      features, boxes, parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias, strides,
      output_size, sampling_ratio, level_rule, eps);
  const RoiAlignArgs& args = inputs.roi_align.args;
  const Tensor out = torch::stable::new_empty(
      inputs.conv.parameters, {args.images, args.proposals, args.bins(), args.channels});
  with_types(inputs, [&](auto value, auto box) {
    run_forward<decltype(value), decltype(box)>(inputs, out);
  });
  return out;
}

std::tuple<Tensor, Tensor> roi_dynamic_conv_backward_cpu(
    const Tensor& grad, const std::vector<Tensor>& features, const Tensor& boxes,
    const Tensor& parameters, const Tensor& norm1_weight, const Tensor& norm1_bias,
    const Tensor& norm2_weight, const Tensor& norm2_bias, const std::vector<int64_t>& strides,
    int64_t output_size, int64_t sampling_ratio, const std::string& level_rule, double eps,
    bool /*allow_tf32*/, bool /*deterministic: always*/, Tensor grad_cells) {
  const RoiDynamicConvInputs inputs = parse_roi_dynamic_conv(
      features, boxes, parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias, strides,
      output_size, sampling_ratio, level_rule, eps);
  const RoiDynamicConvGrads grads{
      .grad = parse_roi_align_grad(grad, inputs.roi_align),
      .parameters =
          torch::stable::new_empty(inputs.conv.parameters, inputs.conv.parameters.sizes()),
      .norms = inputs.conv.new_grad_norms()};
  const Tensor* cells = wants_grad_cells(grad_cells, inputs.roi_align) ? &grad_cells : nullptr;
  with_types(inputs, [&](auto value, auto box) {
    run_backward<decltype(value), decltype(box)>(inputs, grads, cells);
  });
  return {grads.parameters, grads.norms};
}

}  // namespace
}  // namespace sparse_rcnn

STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CPU, m) {
  m.impl("roi_dynamic_conv", TORCH_BOX(&sparse_rcnn::roi_dynamic_conv_cpu));
  m.impl("roi_dynamic_conv_backward", TORCH_BOX(&sparse_rcnn::roi_dynamic_conv_backward_cpu));
}
