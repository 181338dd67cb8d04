// The matching cost of all (proposal, target) pairs of all stages and images. Each image's targets
// are laid out in planes once, so that a row of costs is made of whole vectors; the padding of the
// targets costs nothing but its zeros.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/check.h"

namespace sparse_rcnn {

template <typename A>
struct CostTerms {
  int64_t K;
  A class_weight, l1_weight, giou_weight, alpha, gamma, non_finite;
  bool focal;  // or softmax
};

// One stage and image.
template <typename A>
struct CostProblem {
  const A* targets;  // planes x1, y1, x2, y2, area and the corners over `scale`, each [stride]
  int64_t stride;    // M rounded up to whole vectors
  const int64_t* labels;
  int64_t M, count;  // targets, and the real ones among them
  A scale[2];        // width, height
};

}  // namespace sparse_rcnn

#define SPARSE_RCNN_KERNELS "cpu/matching_cost_kernels.h"
#include "cpu/for_each_isa.h"

namespace sparse_rcnn {
namespace {

constexpr int64_t kPlanes = 9;
constexpr int64_t kWidestVector = 16;
constexpr int64_t kPairsPerTask = 4096;

struct CostArguments {
  Tensor logits, boxes, labels, target_boxes, counts, image_sizes;
};

// [B, kPlanes, stride]
template <typename A>
std::vector<A> target_planes(const CostArguments& given, int64_t stride) {
  const int64_t B = given.labels.size(0), M = given.labels.size(1);
  const A* boxes = given.target_boxes.const_data_ptr<A>();
  const A* sizes = given.image_sizes.const_data_ptr<A>();
  std::vector<A> planes(B * kPlanes * stride);
  for (int64_t image = 0; image < B; ++image) {
    const A scale[2] = {sizes[image * 2 + 1], sizes[image * 2]};
    for (int64_t m = 0; m < M; ++m) {
      const A* box = boxes + (image * M + m) * 4;
      A* plane = planes.data() + image * kPlanes * stride + m;
      for (int i = 0; i < 4; ++i) {
        plane[i * stride] = box[i];
        plane[(5 + i) * stride] = box[i] / scale[i % 2];
      }
      plane[4 * stride] = std::max(box[2] - box[0], A(0)) * std::max(box[3] - box[1], A(0));
    }
  }
  return planes;
}

template <typename A>
void matching_costs(const CostArguments& given, const CostTerms<A>& terms, const Tensor& cost) {
  const int64_t S = given.boxes.size(0), B = given.boxes.size(1), N = given.boxes.size(2);
  const int64_t M = given.labels.size(1);
  const int64_t stride = (M + kWidestVector - 1) / kWidestVector * kWidestVector;
  const std::vector<A> planes = target_planes<A>(given, stride);
  const int64_t* labels = given.labels.const_data_ptr<int64_t>();
  const int64_t* counts = given.counts.const_data_ptr<int64_t>();
  const A* sizes = given.image_sizes.const_data_ptr<A>();
  const A* logits = given.logits.const_data_ptr<A>();
  const A* boxes = given.boxes.const_data_ptr<A>();
  A* costs = cost.mutable_data_ptr<A>();
  const auto rows_of = SPARSE_RCNN_BEST(matching_cost_rows<A>);
  const int64_t grain = std::max<int64_t>(1, kPairsPerTask / std::max<int64_t>(M, 1));
  torch::stable::parallel_for(0, S * B * N, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      const int64_t problem = row / N, image = problem % B;
      const int64_t last = std::min(end, (problem + 1) * N);
      const CostProblem<A> of{planes.data() + image * kPlanes * stride, stride,
                              labels + image * M, M,
                              std::clamp<int64_t>(counts[image], 0, M),
                              {sizes[image * 2 + 1], sizes[image * 2]}};
      rows_of(of, terms, logits + row * terms.K, boxes + row * 4, last - row, costs + row * M);
      row = last;
    }
  });
}

template <typename A>
CostTerms<A> cost_terms(int64_t K, const std::vector<double>& weights, double alpha, double gamma,
                        bool focal, double non_finite) {
  return {K, static_cast<A>(weights[0]), static_cast<A>(weights[1]), static_cast<A>(weights[2]),
          static_cast<A>(alpha), static_cast<A>(gamma), static_cast<A>(non_finite), focal};
}

Tensor matching_cost_cpu(const Tensor& logits, const Tensor& boxes, const Tensor& target_labels,
                         const Tensor& target_boxes, const Tensor& target_counts,
                         const Tensor& image_sizes, std::vector<double> weights, double alpha,
                         double gamma, const std::string& classification, double non_finite_cost) {
  check_shape("logits", logits, {-1, -1, -1, -1});
  const int64_t S = logits.size(0), B = logits.size(1), N = logits.size(2), K = logits.size(3);
  check_shape("boxes", boxes, {S, B, N, 4});
  check_shape("target_labels", target_labels, {B, -1});
  check_shape("target_boxes", target_boxes, {B, target_labels.size(1), 4});
  check_shape("target_counts", target_counts, {B});
  check_shape("image_sizes", image_sizes, {B, 2});
  check_dtype("target_labels", target_labels, ScalarType::Long);
  check_dtype("target_counts", target_counts, ScalarType::Long);
  check_dtype("logits", logits, boxes.scalar_type());
  check_dtype("target_boxes", target_boxes, boxes.scalar_type());
  check_dtype("image_sizes", image_sizes, boxes.scalar_type());
  STD_TORCH_CHECK(weights.size() == 3, "weights: expected three numbers");
  const bool focal = classification == "focal";
  STD_TORCH_CHECK(focal || classification == "softmax",
                  "classification: expected focal or softmax");
  STD_TORCH_CHECK(K > 0, "logits: expected at least one class");
  const auto dense = [](const Tensor& tensor) { return torch::stable::contiguous(tensor); };
  const CostArguments given{dense(logits),       dense(boxes),         dense(target_labels),
                            dense(target_boxes), dense(target_counts), dense(image_sizes)};
  const Tensor cost = torch::stable::new_empty(
      given.boxes, std::vector<int64_t>{S, B, N, target_labels.size(1)});
  if (cost.numel() == 0) return cost;
  switch (boxes.scalar_type()) {
    case ScalarType::Float:
      matching_costs(
          given, cost_terms<float>(K, weights, alpha, gamma, focal, non_finite_cost), cost);
      break;
    case ScalarType::Double:
      matching_costs(
          given, cost_terms<double>(K, weights, alpha, gamma, focal, non_finite_cost), cost);
      break;
    default: STD_TORCH_CHECK(false, "boxes: expected float32 or float64");
  }
  return cost;
}

}  // namespace
}  // namespace sparse_rcnn

STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CPU, m) {
  m.impl("matching_cost", TORCH_BOX(&sparse_rcnn::matching_cost_cpu));
}
