// Focal loss of all stages and its gradient in one pass over the logits: every logit as a negative,
// then again the one of each matched proposal that is a positive.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/check.h"

#define SPARSE_RCNN_KERNELS "cpu/set_focal_loss_kernels.h"
#include "cpu/for_each_isa.h"

namespace sparse_rcnn {
namespace {

constexpr int64_t kLogitsPerBlock = 4096;  // summed in the logits' type, the blocks in double
constexpr int64_t kBlocksPerTask = 4;

template <typename A>
void focal_losses(const Tensor& logits, const Tensor& classes, A alpha, A gamma,
                  const Tensor& losses, const Tensor& grad) {
  const int64_t stages = logits.size(0), K = logits.size(3);
  const int64_t proposals = logits.size(1) * logits.size(2);
  const int64_t rows = std::max<int64_t>(1, kLogitsPerBlock / std::max<int64_t>(K, 1));
  const int64_t blocks = (proposals + rows - 1) / rows;  // of a stage, whatever the threads are
  const A* values = logits.const_data_ptr<A>();
  const int64_t* wanted = classes.const_data_ptr<int64_t>();
  A* slopes = grad.mutable_data_ptr<A>();
  const auto negatives = SPARSE_RCNN_BEST(focal_negatives<A>);
  const auto positive = SPARSE_RCNN_BEST(focal_positive<A>);
  std::vector<double> parts(stages * blocks);
  torch::stable::parallel_for(0, stages * blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block / blocks * proposals + block % blocks * rows;
      const int64_t last = std::min(first + rows, (block / blocks + 1) * proposals);
      double sum = negatives(values + first * K, (last - first) * K, A(1) - alpha, gamma,
                             slopes + first * K);
      for (int64_t row = first; row < last; ++row) {
        const int64_t place = row * K + wanted[row];
        if (wanted[row] < 0 || wanted[row] >= K) continue;
        sum += positive(values[place], alpha, gamma, slopes + place);
      }
      parts[block] = sum;
    }
  });
  for (int64_t stage = 0; stage < stages; ++stage) {
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += parts[stage * blocks + block];
    losses.mutable_data_ptr<A>()[stage] = static_cast<A>(sum);
  }
}

std::tuple<Tensor, Tensor> set_focal_loss_cpu(const Tensor& logits, const Tensor& classes,
                                              double alpha, double gamma) {
  check_shape("logits", logits, {-1, -1, -1, -1});
  check_shape("classes", classes, {logits.size(0), logits.size(1), logits.size(2)});
  check_dtype("classes", classes, ScalarType::Long);
  const Tensor x = torch::stable::contiguous(logits);
  const Tensor wanted = torch::stable::contiguous(classes);
  const Tensor losses = torch::stable::new_empty(x, std::vector<int64_t>{x.size(0)});
  const Tensor grad = torch::stable::new_empty(x, x.sizes());
  switch (x.scalar_type()) {
    case ScalarType::Float:
      focal_losses<float>(x, wanted, static_cast<float>(alpha), static_cast<float>(gamma), losses,
                          grad);
      break;
    case ScalarType::Double: focal_losses<double>(x, wanted, alpha, gamma, losses, grad); break;
    default: STD_TORCH_CHECK(false, "logits: expected float32 or float64");
  }
  return {losses, grad};
}

}  // namespace
}  // namespace sparse_rcnn

STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CPU, m) {
  m.impl("set_focal_loss", TORCH_BOX(&sparse_rcnn::set_focal_loss_cpu));
}
