"""Box arithmetic that several Triton kernels share."""

import triton
import triton.language as tl


@triton.jit
def box_area(x1, y1, x2, y2):
    """Area, 0 for a box that is turned inside out."""
    return tl.maximum(x2 - x1, 0.0) * tl.maximum(y2 - y1, 0.0)


@triton.jit
def generalized_iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, TINY: tl.constexpr):
    """GIoU of two boxes (Rezatofighi et al., CVPR 2019); TINY keeps boxes without area from dividing by 0."""
    overlap = box_area(tl.maximum(ax1, bx1), tl.maximum(ay1, by1), tl.minimum(ax2, bx2), tl.minimum(ay2, by2))
    union = box_area(ax1, ay1, ax2, ay2) + box_area(bx1, by1, bx2, by2) - overlap
    hull = box_area(tl.minimum(ax1, bx1), tl.minimum(ay1, by1), tl.maximum(ax2, bx2), tl.maximum(ay2, by2))
    return overlap / tl.maximum(union, TINY) - (hull - union) / tl.maximum(hull, TINY)


@triton.jit
def power(base, EXPONENT: tl.constexpr):
    """base ** EXPONENT of a number in [0, 1], for a constant exponent >= 0."""
    if EXPONENT == 0.0:
        result = base * 0.0 + 1.0
    elif EXPONENT == 1.0:
        result = base
    elif EXPONENT == 2.0:
        result = base * base
    else:
        result = tl.where(base > 0.0, tl.exp(EXPONENT * tl.log(tl.maximum(base, 1e-37))), 0.0)
    return result
