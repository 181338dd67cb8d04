"""The operators of set-prediction detectors. Each ``<op>`` has its specification beside it, ``<op>_reference``.

Needs torch and scipy only, so that other detectors can use it alone. Native kernels serve where they were built,
the references elsewhere; :func:`backend` chooses.
"""

from sparse_rcnn.ops import _library
from sparse_rcnn.ops._library import backend
from sparse_rcnn.ops.add_layer_norm import add_layer_norm, add_layer_norm_reference
from sparse_rcnn.ops.apply_deltas import apply_deltas, apply_deltas_reference
from sparse_rcnn.ops.box_iou import generalized_iou, pairwise_generalized_iou, pairwise_iou
from sparse_rcnn.ops.dynamic_conv import dynamic_conv, dynamic_conv_reference
from sparse_rcnn.ops.linear_assignment import linear_assignment, linear_assignment_reference
from sparse_rcnn.ops.matching_cost import matching_cost, matching_cost_reference
from sparse_rcnn.ops.multiscale_roi_align import multiscale_roi_align, multiscale_roi_align_reference
from sparse_rcnn.ops.normalize_pad import normalize_pad, normalize_pad_reference
from sparse_rcnn.ops.refine_boxes import refine_boxes, refine_boxes_reference
from sparse_rcnn.ops.roi_dynamic_conv import roi_dynamic_conv, roi_dynamic_conv_reference
from sparse_rcnn.ops.set_box_loss import set_box_loss, set_box_loss_reference
from sparse_rcnn.ops.set_focal_loss import set_focal_loss, set_focal_loss_reference
from sparse_rcnn.ops.shared_gradients import share_gradients
from sparse_rcnn.ops.winograd_conv2d import winograd_conv2d, winograd_conv2d_reference, winograd_weight

__all__ = [
    "add_layer_norm",
    "add_layer_norm_reference",
    "apply_deltas",
    "apply_deltas_reference",
    "backend",
    "dynamic_conv",
    "dynamic_conv_reference",
    "generalized_iou",
    "linear_assignment",
    "linear_assignment_reference",
    "matching_cost",
    "matching_cost_reference",
    "multiscale_roi_align",
    "multiscale_roi_align_reference",
    "normalize_pad",
    "normalize_pad_reference",
    "pairwise_generalized_iou",
    "pairwise_iou",
    "refine_boxes",
    "refine_boxes_reference",
    "roi_dynamic_conv",
    "roi_dynamic_conv_reference",
    "set_box_loss",
    "set_box_loss_reference",
    "set_focal_loss",
    "set_focal_loss_reference",
    "share_gradients",
    "winograd_conv2d",
    "winograd_conv2d_reference",
    "winograd_weight",
]

_library.load()
