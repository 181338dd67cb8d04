// Which instruction set the CPU kernels use on this processor.
#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace sparse_rcnn {

std::string cpu_capability() { return isa_name(current_isa()); }

}  // namespace sparse_rcnn

STABLE_TORCH_LIBRARY_IMPL(sparse_rcnn, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&sparse_rcnn::cpu_capability));
}
