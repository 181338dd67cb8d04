// L1 and generalised-IoU loss of all stages' matched boxes with their gradients. A few hundred
// pairs a step: in plain scalars, where a dozen operators and their backwards took half a
// millisecond.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "common/check.h"

namespace sparse_rcnn {
namespace {

constexpr int64_t kPairsPerTask = 512;

// d max(a, b) / da: halves at a tie, as autograd has it.
template <typename A>
A larger_slope(A a, A b) {
  return a > b ? A(1) : a == b ? A(0.5) : A(0);
}

// A side of a box and what a product with it has for a slope: none where it was cut off at 0.
template <typename A>
struct Side {
  A length, slope;
  explicit Side(A difference)
      // In this order NaN stays NaN.
      : length(difference < A(0) ? A(0) : difference), slope(difference < A(0) ? A(0) : A(1)) {}
};

// The loss 1 - GIoU of a box and a target (x1, y1, x2, y2), and its gradient.
template <typename A>
A giou_loss(const A* box, const A* target, A* grad) {
  constexpr A tiny = std::numeric_limits<A>::min();
  Side<A> size[2] = {Side<A>(box[2] - box[0]), Side<A>(box[3] - box[1])};
  Side<A> overlap[2] = {Side<A>(0), Side<A>(0)}, hull[2] = {Side<A>(0), Side<A>(0)};
  A target_area = 1;
  for (int axis = 0; axis < 2; ++axis) {
    const A low = box[axis], high = box[axis + 2], from = target[axis], to = target[axis + 2];
    overlap[axis] = Side<A>((high < to ? high : to) - (low > from ? low : from));
    hull[axis] = Side<A>((high > to ? high : to) - (low < from ? low : from));
    target_area *= Side<A>(to - from).length;
  }
  const A intersection = overlap[0].length * overlap[1].length;
  const A whole = hull[0].length * hull[1].length;
  const A joined = size[0].length * size[1].length + target_area - intersection;
  // Nothing depends on what is no area.
  const A per_union = joined >= tiny ? 1 / joined : A(0);
  const A per_hull = whole >= tiny ? 1 / whole : A(0);
  const A iou = joined >= tiny ? intersection / joined : A(0);
  const A unfilled = whole >= tiny ? (whole - joined) / whole : A(0);

  // GIoU = intersection / union - (hull - union) / hull, with union = area + area' - intersection.
  const A by_union = per_hull - iou * per_union;
  const A by_intersection = per_union - by_union;
  const A by_hull = (unfilled - 1) * per_hull;
  for (int axis = 0; axis < 2; ++axis) {
    const int other = 1 - axis;
    const A low = box[axis], high = box[axis + 2], from = target[axis], to = target[axis + 2];
    const A by_size = by_union * size[axis].slope * size[other].length;
    const A by_overlap = by_intersection * overlap[axis].slope * overlap[other].length;
    const A by_span = by_hull * hull[axis].slope * hull[other].length;
    grad[axis] = by_size + by_overlap * larger_slope(low, from) + by_span * larger_slope(from, low);
    grad[axis + 2] =
        -(by_size + by_overlap * larger_slope(to, high) + by_span * larger_slope(high, to));
  }
  return 1 - (iou - unfilled);
}

template <typename A>
struct BoxLossArguments {
  const A *boxes, *target_boxes, *image_sizes;
  const int64_t* matches;
  int64_t B, N, M;
};

struct BoxLosses {
  double l1, giou;
};

// Of one stage and image.
template <typename A>
BoxLosses box_losses(const BoxLossArguments<A>& given, int64_t problem, A* grad_l1, A* grad_giou) {
  const int64_t image = problem % given.B;
  const A* boxes = given.boxes + problem * given.N * 4;
  const A scale[2] = {given.image_sizes[image * 2 + 1], given.image_sizes[image * 2]};
  BoxLosses losses{0, 0};
  for (int64_t m = 0; m < given.M; ++m) {
    const int64_t match = given.matches[problem * given.M + m];
    if (match < 0 || match >= given.N) continue;
    const A* box = boxes + match * 4;
    const A* target = given.target_boxes + (image * given.M + m) * 4;
    A l1 = 0;
    for (int i = 0; i < 4; ++i) {
      const A difference = box[i] / scale[i % 2] - target[i] / scale[i % 2];
      l1 += difference < 0 ? -difference : difference;
      const A sign = static_cast<A>((box[i] > target[i]) - (box[i] < target[i]));
      grad_l1[match * 4 + i] = sign / scale[i % 2];
    }
    losses.l1 += l1;
    losses.giou += giou_loss(box, target, grad_giou + match * 4);
  }
  A poison = 0;  // NaN where a box is not finite, matched or not
  for (int64_t i = 0; i < given.N * 4; ++i) poison += boxes[i] - boxes[i];
  return {losses.l1 + poison, losses.giou + poison};
}

template <typename A>
std::tuple<Tensor, Tensor, Tensor, Tensor> set_box_loss_of(const Tensor& boxes,
                                                           const Tensor& matches,
                                                           const Tensor& target_boxes,
                                                           const Tensor& image_sizes) {
  const int64_t S = boxes.size(0), B = boxes.size(1), N = boxes.size(2), M = matches.size(2);
  const Tensor l1 = torch::stable::new_empty(boxes, std::vector<int64_t>{S});
  const Tensor giou = torch::stable::new_empty(boxes, std::vector<int64_t>{S});
  const Tensor grad_l1 = torch::stable::new_zeros(boxes, boxes.sizes());
  const Tensor grad_giou = torch::stable::new_zeros(boxes, boxes.sizes());
  const BoxLossArguments<A> given{boxes.const_data_ptr<A>(), target_boxes.const_data_ptr<A>(),
                                  image_sizes.const_data_ptr<A>(),
                                  matches.const_data_ptr<int64_t>(), B, N, M};
  A *by_l1 = grad_l1.mutable_data_ptr<A>(), *by_giou = grad_giou.mutable_data_ptr<A>();
  std::vector<BoxLosses> parts(S * B);
  const int64_t grain = std::max<int64_t>(1, kPairsPerTask / std::max<int64_t>(M, 1));
  torch::stable::parallel_for(0, S * B, grain, [&](int64_t begin, int64_t end) {
    for (int64_t problem = begin; problem < end; ++problem) {
      const int64_t offset = problem * N * 4;
      parts[problem] = box_losses(given, problem, by_l1 + offset, by_giou + offset);
    }
  });
  for (int64_t stage = 0; stage < S; ++stage) {
    BoxLosses sum{0, 0};
    for (int64_t image = 0; image < B; ++image) {
      sum.l1 += parts[stage * B + image].l1;
      sum.giou += parts[stage * B + image].giou;
    }
    l1.mutable_data_ptr<A>()[stage] = static_cast<A>(sum.l1);
    giou.mutable_data_ptr<A>()[stage] = static_cast<A>(sum.giou);
  }
  return {l1, giou, grad_l1, grad_giou};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> set_box_loss_cpu(const Tensor& boxes,
                                                            const Tensor& matches,
                                                            const Tensor& target_boxes,
                                                            const Tensor& image_sizes) {
  check_shape("boxes", boxes, {-1, -1, -1, 4});
  check_shape("matches", matches, {boxes.size(0), boxes.size(1), -1});
  check_shape("target_boxes", target_boxes, {boxes.size(1), matches.size(2), 4});
  check_shape("image_sizes", image_sizes, {boxes.size(1), 2});
  check_dtype("matches", matches, ScalarType::Long);
  check_dtype("target_boxes", target_boxes, boxes.scalar_type());
  check_dtype("image_sizes", image_sizes, boxes.scalar_type());
  const auto dense = [](const Tensor& tensor) { return torch::stable::contiguous(tensor); };
  switch (boxes.scalar_type()) {
    case ScalarType::Float:
      return set_box_loss_of<float>(dense(boxes), dense(matches), dense(target_boxes),
                                    dense(image_sizes));
    case ScalarType::Double:
      return set_box_loss_of<double>(dense(boxes), dense(matches), dense(target_boxes),
                                     dense(image_sizes));
    default: STD_TORCH_CHECK(false, "boxes: expected float32 or float64");
  }
}

}  // namespace
}  // namespace sparse_rcnn

STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CPU, m) {
  m.impl("set_box_loss", TORCH_BOX(&sparse_rcnn::set_box_loss_cpu));
}
