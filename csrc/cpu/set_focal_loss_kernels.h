// Focal losses and their gradients; compiled once for each level of cpu/isa.h.
#include "cpu/vector_math.h"

template <typename A>
struct FocalLoss {
  Vec<A> loss, slope;
};

// Of logits without a target. That of a positive is this one of the negated logit with another
// weight, its slope negated. z - z is 0, and NaN for a logit that is not finite: minus infinity
// would else cost nothing.
template <typename A>
static inline FocalLoss<A> focal_loss(Vec<A> z, A weight, A gamma) {
  const Sigmoid<A> p = sigmoid<A>(z);
  const Vec<A> cross_entropy =
      (z > A(0) ? z : Vec<A>{}) + logarithm_of_one_plus(p.small) + (z - z);
  const Vec<A> modulated = weight * power<A>(p.of, gamma);
  return {modulated * cross_entropy,
          modulated * (p.of + gamma * p.of_negated * cross_entropy)};
}

// The losses of `count` logits as negatives, summed, and their slopes.
template <typename A>
static A focal_negatives(const A* logits, int64_t count, A weight, A gamma, A* slopes) {
  constexpr int step = lanes<A>;
  Sums<A> sums;
  int64_t i = 0;
  for (int way = 0; i + step <= count; i += step, way = (way + 1) % Sums<A>::ways) {
    const FocalLoss<A> focal = focal_loss<A>(load(logits + i), weight, gamma);
    sums.parts[way] += focal.loss;
    store(slopes + i, focal.slope);
  }
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    const FocalLoss<A> focal = focal_loss<A>(load_part(logits + i, rest), weight, gamma);
    A losses[step] = {};
    store_part(losses, focal.loss, rest);  // not those of the lanes without a logit
    sums.parts[0] += load(losses);
    store_part(slopes + i, focal.slope, rest);
  }
  return sums.total();
}

// Makes a positive of a logit that was counted as a negative; what the sum of losses grows by.
template <typename A>
static A focal_positive(A logit, A alpha, A gamma, A* slope) {
  const FocalLoss<A> positive = focal_loss<A>(splat(-logit), alpha, gamma);
  *slope = -positive.slope[0];
  return positive.loss[0] - focal_loss<A>(splat(logit), A(1) - alpha, gamma).loss[0];
}
