// The backward of RoIAlign on the CPU, for all operators that end in it.
#pragma once

#include "common/roi_align_args.h"

namespace sparse_rcnn {

// Adds to grad_cells [cells, C] the gradient of the maps, given that of their bins, grad [B, N, P,
// C] (contiguous, of the maps' dtype or of the accumulation type). The sums are the same bits on
// any number of threads.
void scatter_roi_grads(const RoiAlignInputs& inputs, const Tensor& grad, const Tensor& grad_cells);

}  // namespace sparse_rcnn
