// One operator from C++ without Python: load the library, call through the dispatcher, print the
// boxes. Its output is compared with Python's by tests/packaging.
//
//   run_operator path/to/_C.so
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <optional>
#include <vector>

using torch::stable::Tensor;

namespace {

Tensor boxes_of(std::vector<float>& values) {
  const std::vector<int64_t> sizes{static_cast<int64_t>(values.size()) / 4, 4};
  Tensor boxes = torch::stable::empty(sizes, torch::headeronly::ScalarType::Float);
  float* data = static_cast<float*>(boxes.mutable_data_ptr());
  for (size_t index = 0; index < values.size(); ++index) {
    data[index] = values[index];
  }
  return boxes;
}

Tensor apply_deltas(const Tensor& deltas, const Tensor& boxes) {
  std::array<StableIValue, 5> stack{
      torch::stable::detail::from(deltas), torch::stable::detail::from(boxes),
      torch::stable::detail::from(std::vector<double>{2, 2, 1, 1}),
      torch::stable::detail::from(std::optional<double>()),
      torch::stable::detail::from(std::optional<double>(8.74))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("sparse_rcnn::apply_deltas", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: run_operator path/to/_C.so\n");
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  std::vector<float> deltas{0.5f, -0.25f, 0.1f, 0.2f, 0.f, 0.f, 20.f, -1.f};
  std::vector<float> boxes{10.f, 20.f, 50.f, 100.f, 0.f, 0.f, 8.f, 4.f};
  const Tensor result = apply_deltas(boxes_of(deltas), boxes_of(boxes));
  const float* decoded = static_cast<const float*>(result.const_data_ptr());
  for (int row = 0; row < 2; ++row) {
    for (int edge = 0; edge < 4; ++edge) {
      std::printf("%.9g%c", decoded[4 * row + edge], edge == 3 ? '\n' : ' ');
    }
  }
  return 0;
}
