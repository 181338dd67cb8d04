// Residual, LayerNorm and ReLU of one row after the other: each row is read from memory once.
//
// Forward only. With a gradient the cost of a call from Python is larger than what fusion saves: at
// 300 rows of 256 float32 values, forward and backward took a third longer than PyTorch's own
// operators, which therefore serve there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "common/add_layer_norm_args.h"

#define SPARSE_RCNN_KERNELS "cpu/add_layer_norm_kernels.h"
#include "cpu/for_each_isa.h"

namespace sparse_rcnn {
namespace {

constexpr int64_t kValuesPerTask = 16384;  // below it a second thread costs more than it saves
constexpr int64_t kWidestVector = 16;      // values; scratch rows are rounded up to it

template <typename Body>
void with_type_of(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(BFloat16Bits{});
    case ScalarType::Half: return body(HalfBits{});
    default: STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
}

template <typename T>
void normalize(const AddLayerNormInputs& inputs, double eps, bool relu, const Tensor& out) {
  using A = Accumulation<T>;
  const auto kernel = SPARSE_RCNN_BEST(add_layer_norm_rows<T>);
  const T* x = static_cast<const T*>(inputs.x.const_data_ptr());
  const T* residual = static_cast<const T*>(inputs.residual_data());
  const A* weight = inputs.weight.const_data_ptr<A>();
  const A* bias = inputs.bias.const_data_ptr<A>();
  T* result = static_cast<T*>(out.mutable_data_ptr());
  const int64_t C = inputs.channels;
  const int64_t grain = std::max<int64_t>(1, kValuesPerTask / C);
  torch::stable::parallel_for(0, inputs.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch((C + kWidestVector - 1) / kWidestVector * kWidestVector);
    kernel(x + begin * C, residual ? residual + begin * C : nullptr, weight, bias,
           static_cast<A>(eps), relu, end - begin, static_cast<int>(C), scratch.data(),
           result + begin * C);
  });
}

Tensor add_layer_norm_cpu(const Tensor& x, const std::optional<Tensor>& residual,
                          const Tensor& weight, const Tensor& bias, double eps, bool relu) {
  const AddLayerNormInputs inputs = parse_add_layer_norm(x, residual, weight, bias);
  STD_TORCH_CHECK(inputs.channels <= std::numeric_limits<int>::max() - kWidestVector,
                  "x: expected fewer than 2^31 channels");
  const Tensor out = torch::stable::new_empty(inputs.x, inputs.x.sizes());
  with_type_of(inputs.x, [&](auto value) { normalize<decltype(value)>(inputs, eps, relu, out); });
  return out;
}

}  // namespace
}  // namespace sparse_rcnn

STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&sparse_rcnn::add_layer_norm_cpu));
}
