// The dynamic interaction on the CPU, as dynamic_conv and roi_dynamic_conv share it: kernels for
// one RoI, implemented in dynamic_conv.cpp, and what it takes to run them over all RoIs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/dynamic_conv_args.h"
#include "cpu/isa.h"
#include "cpu/thread_memory.h"

namespace sparse_rcnn {

// Both LayerNorms, each parameter followed by zeros up to a whole vector of any level.
template <typename A>
struct DynamicConvNorms {
  const A* weight1;  // [D]
  const A* bias1;
  const A* weight2;  // [C]
  const A* bias2;
  A eps;
};

// The kernels of one stored type T for the processor at hand.
//   forward   x [P, C], parameters [2 * C * D] -> out [P, C]
//   backward  also grad [P, C] -> grad_x [P, C] unless it is null, grad_parameters [2 * C * D],
//             grad_norms [2 * (D + C)]
//   narrow    sums as stored values
// `space` is memory of one thread, of as many bytes as forward_space or backward_space say.
template <typename T>
struct DynamicConvKernels {
  using A = Accumulation<T>;
  int64_t (*forward_space)(DynamicConvSizes sizes);
  void (*forward)(DynamicConvSizes sizes, DynamicConvNorms<A> norms, const T* x,
                  const T* parameters, Ahead& ahead, char* space, T* out);
  int64_t (*backward_space)(DynamicConvSizes sizes);
  void (*backward)(DynamicConvSizes sizes, DynamicConvNorms<A> norms, const T* grad, const T* x,
                   const T* parameters, Ahead& ahead, char* space, A* grad_x, T* grad_parameters,
                   A* grad_norms);
  void (*narrow)(const A* values, int64_t count, T* out);
};

template <typename T>
DynamicConvKernels<T> dynamic_conv_kernels();

// The norms as the kernels want them, in memory of its own.
template <typename A>
class PaddedNorms {
 public:
  PaddedNorms(const DynamicConvOperands& operands, double eps) : eps_(static_cast<A>(eps)) {
    constexpr int64_t widest = 16;  // values in a vector
    for (int index = 0; index < 4; ++index) {
      const Tensor& norm = operands.norms[index];
      const A* first = static_cast<const A*>(norm.const_data_ptr());
      values_[index].assign(first, first + norm.numel());
      values_[index].resize((norm.numel() + widest - 1) / widest * widest);
    }
  }

  DynamicConvNorms<A> get() const {
    return {values_[0].data(), values_[1].data(), values_[2].data(), values_[3].data(), eps_};
  }

 private:
  std::vector<A> values_[4];
  A eps_;
};

// make_work(), once a thread, gives work(roi, next), which is called for every RoI by whichever
// thread is free; `next` is the RoI that this thread will be given after it, or -1.
template <typename MakeWork>
void for_each_roi(int64_t rois, const MakeWork& make_work) {
  std::atomic<int64_t> untaken{0};
  const int64_t threads = std::min<int64_t>(rois, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto work = make_work();
    for (int64_t roi = untaken++; roi < rois;) {
      const int64_t next = untaken++;
      work(roi, next < rois ? next : -1);
      roi = next;
    }
  });
}

// body(T{}), T being the stored form of `dtype`, which parse_dynamic_conv has checked.
template <typename Body>
void with_stored_type(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(BFloat16Bits{});
    default:
      return body(HalfBits{});
  }
}

}  // namespace sparse_rcnn
