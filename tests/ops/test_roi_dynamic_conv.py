"""roi_dynamic_conv is dynamic_conv of multiscale_roi_align, in value and in gradient."""

from __future__ import annotations

import pytest
import torch

from sparse_rcnn.ops import dynamic_conv, multiscale_roi_align, roi_dynamic_conv

STRIDES = (8, 16)


def make_arguments(B=2, N=3, C=4, D=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    features = [draw(B, C, 8, 8), draw(B, C, 4, 4)]
    corners = torch.rand(B, N, 2, generator=generator, dtype=torch.float64) * 40
    sizes = torch.rand(B, N, 2, generator=generator, dtype=torch.float64) * 300
    boxes = torch.cat([corners, corners + sizes], dim=-1).to(dtype)
    return features, boxes, draw(B * N, 2 * C * D), draw(D), draw(D), draw(C), draw(C)


@pytest.mark.parametrize(("B", "N"), [(1, 1), (2, 3), (3, 17), (2, 0)])
@pytest.mark.parametrize("options", [(), (3, 1), (2, 2, "mmdet"), (2, 2, "detectron2", 0.1)])
def test_is_the_composition(B, N, options):
    features, boxes, *rest = make_arguments(B, N)
    actual = roi_dynamic_conv(features, boxes, *rest, STRIDES, *options)
    roi = multiscale_roi_align(features, boxes, STRIDES, *options[:3])
    parameters = rest[0].view(B, N, 2 * 4 * 3)
    expected = torch.cat([dynamic_conv(roi[b], parameters[b], *rest[1:], *options[3:]) for b in range(B)])
    assert actual.shape == roi.shape
    torch.testing.assert_close(actual.flatten(0, 1), expected, rtol=1e-10, atol=1e-10)


def test_gradcheck_and_no_gradient_to_boxes():
    (fine, coarse), boxes, *rest = make_arguments(1, 2, 3, 2)
    boxes.requires_grad_()
    leaves = [t.requires_grad_() for t in (fine[:, :, :4, :4].clone(), coarse[:, :, :2, :2].clone(), *rest)]

    def run(fine, coarse, *others):
        return roi_dynamic_conv((fine, coarse), boxes, *others, STRIDES, 2)

    assert torch.autograd.gradcheck(run, leaves)
    run(*leaves).sum().backward()
    assert boxes.grad is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": torch.zeros(2, 3, 5)}, ValueError, r"boxes: expected shape \[B, N, 4\]"),
        ({"strides": (8,)}, ValueError, "strides: expected one a level"),
        ({"parameters": torch.zeros(2, 3, 24)}, ValueError, r"parameters: expected shape \[6, 24\], got \[2, 3, 24\]"),
        ({"parameters": torch.zeros(6, 24).long()}, TypeError, "parameters: expected a floating-point tensor"),
        ({"norm1_bias": torch.zeros(4)}, ValueError, r"norm1_bias: expected shape \[3\], got \[4\]"),
        ({"norm2_weight": torch.zeros(3)}, ValueError, r"norm2_weight: expected shape \[4\], got \[3\]"),
        ({"level_rule": "other"}, ValueError, "level_rule: expected one of"),
    ],
)
def test_argument_errors(change, error, message):
    names = ("features", "boxes", "parameters", "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")
    arguments = dict(zip(names, make_arguments(dtype=torch.float32), strict=True), strides=STRIDES)
    with pytest.raises(error, match=message):
        roi_dynamic_conv(**{**arguments, **change})
