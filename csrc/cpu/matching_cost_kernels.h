// Rows of the matching cost, a vector of targets at a time; compiled once for each level of
// cpu/isa.h.
#include "cpu/vector_math.h"

// The logits of up to a vector of targets' classes; NaN for a class that does not exist.
template <typename A>
static inline Vec<A> logits_of_classes(const A* row, const int64_t* labels, int64_t K, int count) {
  A values[lanes<A>] = {};
  for (int i = 0; i < count; ++i) {
    const bool exists = labels[i] >= 0 && labels[i] < K;
    values[i] = exists ? row[labels[i]] : static_cast<A>(__builtin_nan(""));
  }
  return load(values);
}

// Focal loss as a positive minus focal loss as a negative; the 1e-8 is the official code's.
template <typename A>
static inline Vec<A> focal_cost(Vec<A> logit, A alpha, A gamma) {
  const Sigmoid<A> p = sigmoid<A>(logit);
  const Vec<A> positive = -alpha * power<A>(p.of_negated, gamma) * logarithm(p.of + A(1e-8));
  const Vec<A> negative =
      (alpha - A(1)) * power<A>(p.of, gamma) * logarithm(p.of_negated + A(1e-8));
  return positive - negative;
}

// The greatest of a row of logits, and the sum of exp(logit - greatest).
template <typename A>
struct Normalizer {
  A greatest, total;
};

template <typename A>
static inline Normalizer<A> normalizer(const A* row, int64_t K) {
  A greatest = row[0];
  for (int64_t k = 1; k < K; ++k) greatest = row[k] > greatest ? row[k] : greatest;
  Vec<A> sums = {};
  int64_t k = 0;
  for (; k + lanes<A> <= K; k += lanes<A>) sums += exponential(load(row + k) - greatest);
  A total = sum_of<A>(sums);
  if (k < K) {
    A rest[lanes<A>] = {};
    store_part(rest, exponential(load_part(row + k, K - k) - greatest), static_cast<int>(K - k));
    total += sum_of<A>(load(rest));
  }
  return {greatest, total};
}

template <typename A>
static inline Vec<A> larger(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}
template <typename A>
static inline Vec<A> smaller(Vec<A> a, Vec<A> b) {
  return a < b ? a : b;
}
template <typename A>
static inline Vec<A> area_of(Vec<A> width, Vec<A> height) {
  return larger<A>(width, Vec<A>{}) * larger<A>(height, Vec<A>{});
}

// Of one box with a vector of targets, whose planes x1, y1, x2, y2 and area lie `stride` apart.
template <typename A>
static inline Vec<A> generalized_iou(const A* box, const A* target, int64_t stride) {
  constexpr A tiny = sizeof(A) == 4 ? A(__FLT_MIN__) : A(__DBL_MIN__);
  const Vec<A> x1 = load(target), y1 = load(target + stride);
  const Vec<A> x2 = load(target + 2 * stride), y2 = load(target + 3 * stride);
  const Vec<A> ax1 = splat(box[0]), ay1 = splat(box[1]), ax2 = splat(box[2]), ay2 = splat(box[3]);
  const Vec<A> overlap = area_of<A>(smaller<A>(ax2, x2) - larger<A>(ax1, x1),
                                    smaller<A>(ay2, y2) - larger<A>(ay1, y1));
  const Vec<A> joined =
      area_of<A>(ax2 - ax1, ay2 - ay1) + load(target + 4 * stride) - overlap;
  const Vec<A> hull = area_of<A>(larger<A>(ax2, x2) - smaller<A>(ax1, x1),
                                 larger<A>(ay2, y2) - smaller<A>(ay1, y1));
  return overlap / larger<A>(joined, splat(tiny)) - (hull - joined) / larger<A>(hull, splat(tiny));
}

// The distance of the corners, each divided by the size of the image: planes 5 to 8 of the targets.
template <typename A>
static inline Vec<A> l1_distance(const A* box, const A* scale, const A* target, int64_t stride) {
  Vec<A> sum = {};
  for (int i = 0; i < 4; ++i) {
    sum += absolute<A>(box[i] / scale[i % 2] - load(target + (5 + i) * stride));
  }
  return sum;
}

// The costs [rows, M] of proposals of one stage and image; columns from `problem.count` on are 0.
template <typename A>
static void matching_cost_rows(const CostProblem<A>& problem, const CostTerms<A>& terms,
                               const A* logits, const A* boxes, int64_t rows, A* costs) {
  constexpr int step = lanes<A>;
  for (int64_t row = 0; row < rows; ++row, logits += terms.K, boxes += 4, costs += problem.M) {
    Normalizer<A> softmax{};
    if (!terms.focal) softmax = normalizer(logits, terms.K);
    for (int64_t m = 0; m < problem.count; m += step) {
      const int64_t left = problem.count - m;
      const int count = left < step ? static_cast<int>(left) : step;
      const Vec<A> logit = logits_of_classes(logits, problem.labels + m, terms.K, count);
      const Vec<A> classes =
          terms.focal ? focal_cost<A>(logit, terms.alpha, terms.gamma)
                      : -exponential(logit - softmax.greatest) / softmax.total;
      const A* target = problem.targets + m;
      const Vec<A> cost = terms.class_weight * classes +
                          terms.l1_weight *
                              l1_distance(boxes, problem.scale, target, problem.stride) -
                          terms.giou_weight * generalized_iou(boxes, target, problem.stride);
      // Not 0 of what is not finite. A box is in the L1 distance, which hides nothing.
      const Vec<A> zero = (cost - cost) + (logit - logit);
      store_part(costs + m, zero == A(0) ? cost : splat(terms.non_finite), count);
    }
    for (int64_t m = problem.count; m < problem.M; ++m) costs[m] = 0;
  }
}
