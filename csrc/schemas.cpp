// Every operator's schema: the table of contents of the native code. <op> has its kernels in
// csrc/cpu/<op>.cpp and csrc/cuda/<op>.cu, its contract and its reference in
// sparse_rcnn/ops/<op>.py.
//
// Dimensions: B images, N proposals, C channels, L levels, P bins, D inner channels, R = B * N.
// Norm parameters and partial sums are of the accumulation type: float32, or float64 for float64.
#include <torch/csrc/stable/library.h>

#ifdef SPARSE_RCNN_EMULATED
#define SPARSE_RCNN_NAMESPACE sparse_rcnn_emulated  // the CUDA kernels run on the CPU, for tests
#else
#define SPARSE_RCNN_NAMESPACE sparse_rcnn
#endif
#define SPARSE_RCNN_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)  // expands the name first

SPARSE_RCNN_LIBRARY(SPARSE_RCNN_NAMESPACE, m) {
  // features L x [B, C, Hl, Wl], boxes [B, N, 4] -> [B, N, P, C]
  m.def(
      "multiscale_roi_align(Tensor[] features, Tensor boxes, int[] strides, int output_size, "
      "int sampling_ratio, str level_rule) -> Tensor");
  // grad [B, N, P, C]; adds into grad_cells [B * sum(Hl * Wl), C], level after level.
  m.def(
      "multiscale_roi_align_backward(Tensor grad, Tensor[] features, Tensor boxes, int[] strides, "
      "int output_size, int sampling_ratio, str level_rule, bool deterministic, "
      "Tensor(a!) grad_cells) -> ()");

  // roi_features [R, P, C], parameters [R, 2 * C * D], norm1 [D], norm2 [C] -> [R, P, C]
  // allow_tf32: CUDA kernels may round the operands of float32 products to TF32; others ignore it.
  m.def(
      "dynamic_conv(Tensor roi_features, Tensor parameters, Tensor norm1_weight, "
      "Tensor norm1_bias, Tensor norm2_weight, Tensor norm2_bias, float eps, bool allow_tf32) "
      "-> Tensor");
  // -> grad_roi_features [R, P, C], grad_parameters [R, 2 * C * D], and the four norm gradients of
  // each RoI, [R, D + D + C + C].
  m.def(
      "dynamic_conv_backward(Tensor grad, Tensor roi_features, Tensor parameters, "
      "Tensor norm1_weight, Tensor norm1_bias, Tensor norm2_weight, Tensor norm2_bias, float eps, "
      "bool allow_tf32) -> (Tensor, Tensor, Tensor)");

  // dynamic_conv(multiscale_roi_align(features, boxes), parameters) -> [B, N, P, C]
  m.def(
      "roi_dynamic_conv(Tensor[] features, Tensor boxes, Tensor parameters, Tensor norm1_weight, "
      "Tensor norm1_bias, Tensor norm2_weight, Tensor norm2_bias, int[] strides, int output_size, "
      "int sampling_ratio, str level_rule, float eps, bool allow_tf32) -> Tensor");
  // -> grad_parameters and the norm gradients as above; adds into grad_cells unless it has no rows.
  m.def(
      "roi_dynamic_conv_backward(Tensor grad, Tensor[] features, Tensor boxes, Tensor parameters, "
      "Tensor norm1_weight, Tensor norm1_bias, Tensor norm2_weight, Tensor norm2_bias, "
      "int[] strides, int output_size, int sampling_ratio, str level_rule, float eps, "
      "bool allow_tf32, bool deterministic, Tensor(a!) grad_cells) -> (Tensor, Tensor)");

  // deltas [..., 4], boxes [..., 4] -> [..., 4]
  m.def(
      "apply_deltas(Tensor deltas, Tensor boxes, float[] weights, float? lower, float? upper) "
      "-> Tensor");
  m.def(
      "apply_deltas_backward(Tensor grad, Tensor deltas, Tensor boxes, float[] weights, "
      "float? lower, float? upper) -> (Tensor, Tensor)");

  // LayerNorm(x + residual), x [..., C], then ReLU if relu
  m.def(
      "add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, bool relu) "
      "-> Tensor");
  // -> grad_x, which is the residual's too, and the gradients of weight and bias in G parts, [G, 2, C].
  m.def(
      "add_layer_norm_backward(Tensor grad, Tensor x, Tensor? residual, Tensor weight, Tensor bias, "
      "float eps, bool relu) -> (Tensor, Tensor)");

  // The box tower, its prediction and the decoding: x [R, C], boxes [R, 4] -> [R, 4]
  m.def(
      "refine_boxes(Tensor x, Tensor boxes, Tensor[] tower_weights, Tensor[] norm_weights, "
      "Tensor[] norm_biases, Tensor delta_weight, Tensor delta_bias, float[] weights, "
      "float? lower, float? upper, float eps) -> Tensor");

  // cost [Q, N, M], counts [Q] -> the proposal of each target, [Q, M] int64
  m.def("linear_assignment(Tensor cost, Tensor counts) -> Tensor");

  // The losses of set prediction: S stages, M targets, K classes. On CUDA devices kernels/<op>.py
  // serves, in Triton.
  // logits [S, B, N, K], boxes [S, B, N, 4], targets [B, M] -> [S, B, N, M]
  m.def(
      "matching_cost(Tensor logits, Tensor boxes, Tensor target_labels, Tensor target_boxes, "
      "Tensor target_counts, Tensor image_sizes, float[] weights, float alpha, float gamma, "
      "str classification, float non_finite_cost) -> Tensor");
  // classes [S, B, N] -> [S] and the gradient of each of them, [S, B, N, K]
  m.def(
      "set_focal_loss(Tensor logits, Tensor classes, float alpha, float gamma) "
      "-> (Tensor, Tensor)");
  // matches [S, B, M] -> L1 [S], 1 - GIoU [S], and the gradients of each, [S, B, N, 4]
  m.def(
      "set_box_loss(Tensor boxes, Tensor matches, Tensor target_boxes, Tensor image_sizes) "
      "-> (Tensor, Tensor, Tensor, Tensor)");

  // uint8 images B x [3, h, w] or [bytes], sizes [B, 4] (height, width, and those after the resize)
  // -> [B, height, width, 3] of `dtype`
  m.def(
      "normalize_pad(Tensor[] images, Tensor sizes, int height, int width, float[] mean, "
      "float[] std, ScalarType dtype) -> Tensor");

  // x [B, H, W, Ci], weight [Co / T, 36, Ci, T] of points, T <= 64, bias [Co], residual [B, H, W, Co]
  // -> relu(conv3x3(x) + bias + residual), [B, H, W, Co]; relu if asked for
  m.def(
      "winograd_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu) -> Tensor");

  // What was built, for doctor.
  m.def("cpu_capability() -> str");
  m.def("cuda_architectures() -> str");
}
