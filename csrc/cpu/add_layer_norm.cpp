// Residual, LayerNorm and ReLU of one row after the other: each row is read from memory once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>
#include <vector>

#include "common/add_layer_norm_args.h"

namespace sparse_rcnn {

// What the rows of one part of the gradient have in common.
template <typename A>
struct NormGradient {
  static constexpr int rows_at_once = 4;

  const A* weight;
  const A* bias;
  bool relu;
  int channels;
  int pitch;       // C rounded up to whole vectors
  A* rows;         // scratch: rows_at_once rows of x + residual
  A* grad_weight;  // added to
  A* grad_bias;    // added to
};

}  // namespace sparse_rcnn

#define SPARSE_RCNN_KERNELS "cpu/add_layer_norm_kernels.h"
#include "cpu/for_each_isa.h"

namespace sparse_rcnn {
namespace {

constexpr int64_t kValuesPerTask = 16384;  // below it a second thread costs more than it saves
constexpr int64_t kWidestVector = 16;      // values; scratch rows are rounded up to it

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

int64_t scratch_size(int64_t channels) {
  return (channels + kWidestVector - 1) / kWidestVector * kWidestVector;
}

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

AddLayerNormInputs parse(const Tensor& x, const std::optional<Tensor>& residual,
                         const Tensor& weight, const Tensor& bias) {
  AddLayerNormInputs inputs = parse_add_layer_norm(x, residual, weight, bias);
  STD_TORCH_CHECK(inputs.channels <= std::numeric_limits<int>::max() - kWidestVector,
                  "x: expected fewer than 2^31 channels");
  return inputs;
}

template <typename T>
void normalize(const AddLayerNormInputs& inputs, double eps, bool relu, const Tensor& out) {
  using A = Accumulation<T>;
  const auto kernel = SPARSE_RCNN_BEST(add_layer_norm_rows<T>);
  const T* x = data_of<T>(inputs.x);
  const T* residual = static_cast<const T*>(inputs.residual_data());
  const A* weight = data_of<A>(inputs.weight);
  const A* bias = data_of<A>(inputs.bias);
  T* result = mutable_data_of<T>(out);
  const int64_t C = inputs.channels;
  const int64_t grain = std::max<int64_t>(1, kValuesPerTask / C);
  torch::stable::parallel_for(0, inputs.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(scratch_size(C));
    kernel(x + begin * C, residual ? residual + begin * C : nullptr, weight, bias,
           static_cast<A>(eps), relu, end - begin, static_cast<int>(C), scratch.data(),
           result + begin * C);
  });
}

template <typename T>
void normalize_backward(const Tensor& grad, const AddLayerNormInputs& inputs, double eps, bool relu,
                        const Tensor& grad_x, const Tensor& grad_norm) {
  using A = Accumulation<T>;
  const auto kernel = SPARSE_RCNN_BEST(add_layer_norm_backward_rows<T>);
  const T* grads = data_of<T>(grad);
  const T* x = data_of<T>(inputs.x);
  const T* residual = static_cast<const T*>(inputs.residual_data());
  const A* weight = data_of<A>(inputs.weight);
  const A* bias = data_of<A>(inputs.bias);
  T* result = mutable_data_of<T>(grad_x);
  A* parts = mutable_data_of<A>(grad_norm);
  const int64_t C = inputs.channels;
  const int64_t part_rows = rows_of_part(inputs.rows);
  const int64_t grain = std::max<int64_t>(1, kValuesPerTask / (C * part_rows));
  torch::stable::parallel_for(0, grad_norm.size(0), grain, [&](int64_t first, int64_t last) {
    const int pitch = static_cast<int>(scratch_size(C));
    std::vector<A> scratch(int64_t{NormGradient<A>::rows_at_once} * pitch);
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part * part_rows, end = std::min(inputs.rows, begin + part_rows);
      A* grad_weight = parts + part * 2 * C;
      std::fill_n(grad_weight, 2 * C, A(0));
      kernel(grads + begin * C, x + begin * C, residual ? residual + begin * C : nullptr,
             static_cast<A>(eps), end - begin,
             {.weight = weight,
              .bias = bias,
              .relu = relu,
              .channels = static_cast<int>(C),
              .pitch = pitch,
              .rows = scratch.data(),
              .grad_weight = grad_weight,
              .grad_bias = grad_weight + C},
             result + begin * C);
    }
  });
}

Tensor add_layer_norm_cpu(const Tensor& x, const std::optional<Tensor>& residual,
                          const Tensor& weight, const Tensor& bias, double eps, bool relu) {
  const AddLayerNormInputs inputs = parse(x, residual, weight, bias);
  const Tensor out = torch::stable::new_empty(inputs.x, inputs.x.sizes());
  with_type_of(inputs.x, [&](auto value) { normalize<decltype(value)>(inputs, eps, relu, out); });
  return out;
}

std::tuple<Tensor, Tensor> add_layer_norm_backward_cpu(const Tensor& grad, const Tensor& x,
                                                       const std::optional<Tensor>& residual,
                                                       const Tensor& weight, const Tensor& bias,
                                                       double eps, bool relu) {
  const AddLayerNormInputs inputs = parse(x, residual, weight, bias);
  const Tensor dense_grad = parse_like_x("grad", grad, inputs.x);
  const Tensor grad_x = torch::stable::new_empty(inputs.x, inputs.x.sizes());
  const Tensor grad_norm =
      torch::stable::new_empty(inputs.weight, {part_count(inputs.rows), 2, inputs.channels});
  with_type_of(inputs.x, [&](auto value) {
    normalize_backward<decltype(value)>(dense_grad, inputs, eps, relu, grad_x, grad_norm);
  });
  return {grad_x, grad_norm};
}

}  // namespace
}  // namespace sparse_rcnn

STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&sparse_rcnn::add_layer_norm_cpu));
  m.impl("add_layer_norm_backward", TORCH_BOX(&sparse_rcnn::add_layer_norm_backward_cpu));
}
