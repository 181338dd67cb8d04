// 3x3 convolutions by Winograd's minimal filtering, float32: four times fewer products than there
// are. Threads take one block of tiles after the other; every sum is made in one order whatever the
// block, the batch and the number of threads.
#include "cpu/winograd_conv2d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "common/check.h"
#include "cpu/thread_memory.h"

#define SPARSE_RCNN_KERNELS "cpu/winograd_conv2d_kernels.h"
#include "cpu/for_each_isa.h"

namespace sparse_rcnn {
namespace {

constexpr int64_t kLeastTiles = 7;  // that the weights are read for

Tensor parse_float(const char* name, const Tensor& tensor) {
  check_dtype(name, tensor, ScalarType::Float);
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
  return torch::stable::contiguous(tensor);
}

void run(const WinogradSizes& sizes, int64_t images, const WinogradTensors& tensors) {
  const auto kernel = SPARSE_RCNN_BEST(winograd_block);
  const auto space = SPARSE_RCNN_BEST(winograd_space);
  const int64_t most = *SPARSE_RCNN_BEST(winograd_tiles);
  const int64_t tiles = images * ((sizes.height + 3) / 4) * ((sizes.width + 3) / 4);
  if (tiles == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  // As many blocks for every thread: the last ones would wait for one that has more.
  const int64_t even = threads * ((tiles + most * threads - 1) / (most * threads));
  const int64_t block = std::clamp((tiles + even - 1) / even, kLeastTiles, most);
  const int64_t blocks = (tiles + block - 1) / block;
  std::atomic<int64_t> untaken{0};
  torch::stable::parallel_for(0, std::min(threads, blocks), 1, [&](int64_t, int64_t) {
    const ThreadMemory memory(space(sizes));
    Ahead ahead;  // made here: no inline function of another header in a kernel
    for (int64_t taken = untaken++; taken < blocks; taken = untaken++) {
      const int64_t first = taken * block;
      kernel(sizes, tensors, first, std::min(block, tiles - first), ahead, memory.get());
    }
  });
}

Tensor winograd_conv2d_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& residual, bool relu) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected shape [B, H, W, Ci], got ", shape_of(x));
  STD_TORCH_CHECK(weight.dim() == 4, "weight: expected shape [Co / T, 36, Ci, T], got ",
                  shape_of(weight));
  const int64_t B = x.size(0), H = x.size(1), W = x.size(2), C = x.size(3);
  const int64_t T = weight.size(3), K = weight.size(0) * T;
  STD_TORCH_CHECK(C % kWinogradChannels == 0, "x: expected a multiple of ", kWinogradChannels,
                  " channels, got ", C);
  STD_TORCH_CHECK(T % kWinogradChannels == 0 && T > 0 && T <= kWinogradMostOutputs,
                  "weight: expected 16, 32, 48 or 64 outputs together, got ", T);
  check_shape("weight", weight, {-1, kWinogradPoints, C, T});
  if (bias.has_value()) check_shape("bias", *bias, {K});
  if (residual.has_value()) check_shape("residual", *residual, {B, H, W, K});
  const auto given = [](const char* name, const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? std::optional(parse_float(name, *tensor)) : std::nullopt;
  };
  const Tensor pixels = parse_float("x", x), points = parse_float("weight", weight);
  const auto shift = given("bias", bias), sum = given("residual", residual);
  const Tensor out = torch::stable::new_empty(pixels, {B, H, W, K});
  const std::vector<float> zeros(C);
  const auto data = [](const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
  };
  run({H, W, C, K, T}, B,
      {.x = pixels.const_data_ptr<float>(),
       .weight = points.const_data_ptr<float>(),
       .bias = data(shift),
       .residual = data(sum),
       .zeros = zeros.data(),
       .out = out.mutable_data_ptr<float>(),
       .relu = relu});
  return out;
}

}  // namespace
}  // namespace sparse_rcnn

STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CPU, m) {
  m.impl("winograd_conv2d", TORCH_BOX(&sparse_rcnn::winograd_conv2d_cpu));
}
