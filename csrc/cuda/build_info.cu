// What the CUDA library was compiled for.
#include "common/check.h"
#include "common/cuda.cuh"

#include <string>

namespace sparse_rcnn {

// The architectures of the machine code, as in "800,860,900"; the last one's PTX is there too.
std::string cuda_architectures() {
#ifdef SPARSE_RCNN_EMULATED
  return "emulated";
#else
#define SPARSE_RCNN_TEXT(...) #__VA_ARGS__
#define SPARSE_RCNN_EXPANDED_TEXT(...) SPARSE_RCNN_TEXT(__VA_ARGS__)
  return SPARSE_RCNN_EXPANDED_TEXT(__CUDA_ARCH_LIST__);
#endif
}

}  // namespace sparse_rcnn

#ifdef SPARSE_RCNN_EMULATED
STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn_emulated, CompositeExplicitAutograd, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CompositeExplicitAutograd, m) {
#endif
  m.impl("cuda_architectures", TORCH_BOX(&sparse_rcnn::cuda_architectures));
}
