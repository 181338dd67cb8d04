// Argument checks of the operators' entry points: the argument, what was wanted, what came.
//
// The Python functions have checked everything already and with better words; these keep a direct
// call through torch.ops from reading outside its tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>

namespace sparse_rcnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    text << (axis ? ", " : "") << tensor.size(axis);
  }
  text << "]";
  return text.str();
}

// A size of -1 stands for any.
inline void check_shape(const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  std::ostringstream wanted;
  int64_t axis = 0;
  for (const int64_t size : shape) {
    fits = fits && (size < 0 || tensor.size(axis) == size);
    wanted << (axis++ ? ", " : "");
    size < 0 ? wanted << "any" : wanted << size;
  }
  STD_TORCH_CHECK(fits, name, ": expected shape [", wanted.str(), "], got ", shape_of(tensor));
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected dtype ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() &&
         a.get_device_index() == b.get_device_index();
}

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& other) {
  STD_TORCH_CHECK(same_device(tensor, other), name, ": expected it on the device of the other arguments");
}

// The type that sums are kept in: double for double, float for all others.
inline ScalarType accumulation_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace sparse_rcnn
