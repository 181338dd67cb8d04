"""multiscale_roi_align against torchvision's RoIAlign and a box-by-box choice of the level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_rcnn.ops import multiscale_roi_align
from sparse_rcnn.ops.multiscale_roi_align import box_levels

STRIDES = (4, 8, 16, 32)
SIDE = 256  # of the image, in pixels

SPECIAL_BOXES = {
    "whole image": [0, 0, 256, 256],
    "partly outside": [-60, -30, 90, 300],
    "wholly outside": [400, 400, 500, 520],
    "around the image": [-500, -500, 900, 900],
    "tiny": [20.3, 30.7, 20.4, 30.8],
    "zero width": [40, 50, 40, 90],
    "a point": [77.7, 33.3, 77.7, 33.3],
    "inverted both ways": [100, 120, 30, 20],
    "inverted in x": [100, 20, 30, 120],
    "inverted in y": [30, 120, 100, 20],
    "on the border": [-4, -4, 0, 0],
    "last pixel": [255, 255, 256, 256],
}


def make_features(batch=2, channels=3, levels=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, channels, SIDE // stride, SIDE // stride, generator=generator, dtype=torch.float64).to(dtype)
        for stride in STRIDES[:levels]
    ]


def make_boxes(batch=2, count=5, dtype=torch.float64, seed=1):
    """Boxes of all sizes, some of which reach out of the image."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(batch, count, 2, generator=generator, dtype=dtype) * SIDE
    halves = 2 ** (torch.rand(batch, count, 2, generator=generator, dtype=dtype) * 7 + 1)
    return torch.cat([centers - halves, centers + halves], dim=-1)


def expected_level(box, levels, rule, finest=2):
    """The level of one box, worked out in the box's own precision."""
    x1, y1, x2, y2 = box.numpy()
    real = x1.dtype.type
    with np.errstate(invalid="ignore", divide="ignore"):
        side = np.sqrt((x2 - x1) * (y2 - y1))
        if rule == "detectron2":
            level = np.floor(real(4) + np.log2(side / real(224) + real(1e-8)))
        else:
            level = real(2) + np.floor(np.log2(side / real(56) + real(1e-6)))
    return None if np.isnan(level) else int(min(max(level, finest), finest + levels - 1)) - finest


def expected_bins(features, boxes, strides, size=7, samples=2, rule="detectron2"):
    """torchvision's RoIAlign, one box at a time."""
    B, N = boxes.shape[:2]
    C = features[0].shape[1]
    out = features[0].new_zeros(B, N, size * size, C)
    for b in range(B):
        for n in range(N):
            level = expected_level(boxes[b, n], len(strides), rule, int(np.log2(strides[0])))
            if level is None:
                continue
            pooled = torchvision.ops.roi_align(
                features[level][b : b + 1].contiguous(), [boxes[b, n : n + 1].to(features[0].dtype)],
                size, 1 / strides[level], samples, aligned=True,
            )  # fmt: skip
            out[b, n] = pooled[0].flatten(1).T
    return out


@pytest.mark.parametrize("count", [0, 1, 3, 17])
@pytest.mark.parametrize(("batch", "channels", "levels"), [(1, 1, 1), (3, 3, 4), (2, 32, 4), (3, 32, 1)])
def test_equals_torchvision(batch, channels, levels, count):
    features, boxes = make_features(batch, channels, levels), make_boxes(batch, count)
    actual = multiscale_roi_align(features, boxes, STRIDES[:levels])
    assert actual.shape == (batch, count, 49, channels)
    torch.testing.assert_close(actual, expected_bins(features, boxes, STRIDES[:levels]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("size", "samples"), [(1, 1), (2, 3), (5, 2), (14, 1)])
def test_output_sizes_and_sampling_ratios(size, samples):
    features, boxes = make_features(), make_boxes()
    actual = multiscale_roi_align(features, boxes, STRIDES, size, samples)
    expected = expected_bins(features, boxes, STRIDES, size, samples)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_float32_within_the_promised_tolerance():
    features, boxes = make_features(channels=32), make_boxes(count=17)
    expected = expected_bins(features, boxes, STRIDES)
    actual = multiscale_roi_align([f.float() for f in features], boxes.float(), STRIDES)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)  # boxes rounded to float32
    expected = expected_bins([f.float() for f in features], boxes.float(), STRIDES)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["detectron2", "mmdet"])
@pytest.mark.parametrize("name", SPECIAL_BOXES)
def test_special_boxes(name, rule):
    features = make_features(1)
    boxes = torch.tensor([[SPECIAL_BOXES[name]]], dtype=torch.float64)
    actual = multiscale_roi_align(features, boxes, STRIDES, level_rule=rule)
    expected = expected_bins(features, boxes, STRIDES, rule=rule)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    empty = name in ("wholly outside", "inverted in x", "inverted in y")
    assert (actual.abs().max() == 0) == empty


def test_boxes_that_are_not_numbers_pool_to_zeros():
    features = make_features(1)
    boxes = torch.full((1, 2, 4), float("nan"), dtype=torch.float64)
    boxes[0, 1] = torch.tensor([-torch.inf, 0, torch.inf, 50])
    assert torch.equal(multiscale_roi_align(features, boxes, STRIDES), torch.zeros(1, 2, 49, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("rule", "side", "level"),
    [
        ("detectron2", 1.0, 0),
        ("detectron2", 111.999, 0),
        ("detectron2", 112.0, 1),
        ("detectron2", 223.99, 1),
        ("detectron2", 223.99999, 2),  # the 1e-8 and float32 rounding together
        ("detectron2", 224.0, 2),
        ("detectron2", 447.9, 2),
        ("detectron2", 448.0, 3),
        ("detectron2", 5000.0, 3),
        ("mmdet", 1.0, 0),
        ("mmdet", 111.99, 0),
        ("mmdet", 111.99997, 1),  # the 1e-6 lifts it
        ("mmdet", 112.0, 1),
        ("mmdet", 223.9, 1),
        ("mmdet", 224.0, 2),
        ("mmdet", 448.0, 3),
        ("mmdet", 5000.0, 3),
    ],
)
def test_level_boundaries_in_float32(rule, side, level):
    box = torch.tensor([0.0, 0.0, side, side])
    assert box_levels(box, STRIDES, rule).item() == level
    # Constant maps, each with a value of its own, tell which one the operator reads.
    features = [torch.full((1, 1, 160, 160), float(index)) for index in range(4)]
    pooled = multiscale_roi_align(features, box.view(1, 1, 4), STRIDES, level_rule=rule)
    torch.testing.assert_close(pooled, torch.full_like(pooled, level))


def test_the_rules_differ_between_them():
    box = torch.tensor([0.0, 0.0, 111.99997, 111.99997])
    assert box_levels(box, STRIDES, "detectron2").item() == 0
    assert box_levels(box, STRIDES, "mmdet").item() == 1


def test_levels_count_from_the_finest_stride():
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 0, 150, 150], [0, 0, 300, 300], [0, 0, 900, 900]])
    assert box_levels(boxes, STRIDES).tolist() == [0, 1, 2, 3]
    assert box_levels(boxes, (8, 16, 32)).tolist() == [0, 0, 1, 2]
    assert box_levels(boxes, (16,)).tolist() == [0, 0, 0, 0]


def test_memory_layout_does_not_matter():
    features, boxes = make_features(), make_boxes()
    expected = multiscale_roi_align(features, boxes, STRIDES)
    channels_last = [f.to(memory_format=torch.channels_last) for f in features]
    strided = [torch.stack([f, -f], dim=-1)[..., 0] for f in features]
    wide_boxes = torch.cat([boxes, boxes], dim=-1)[..., :4]
    transposed_boxes = boxes.transpose(0, 1).contiguous().transpose(0, 1)
    for maps in (features, channels_last, strided):
        for some_boxes in (boxes, wide_boxes, transposed_boxes):
            torch.testing.assert_close(multiscale_roi_align(maps, some_boxes, STRIDES), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_no_worse_than_twice_eager(dtype):
    halves = make_features(channels=32, dtype=dtype)
    boxes = make_boxes(count=17, dtype=torch.float32)
    exact = expected_bins([f.double() for f in halves], boxes.double(), STRIDES)
    # Eager: torchvision's float32 kernel on these maps, its result rounded once for each of the four corners' share.
    eager = sum(
        expected_bins([f.float() * share for f in halves], boxes, STRIDES).to(dtype) for share in (0.1, 0.2, 0.3, 0.4)
    )
    actual = multiscale_roi_align(halves, boxes, STRIDES)
    assert actual.dtype == dtype
    error, allowed = (actual.double() - exact).abs().max(), 2 * (eager.double() - exact).abs().max()
    assert error <= allowed
    assert error > 0


def test_gradient_flows_to_the_features_only():
    features, boxes = make_features(1), make_boxes(1).requires_grad_()
    features = [f.requires_grad_() for f in features]
    out = multiscale_roi_align(features, boxes, STRIDES)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    (out * weight).sum().backward()
    assert boxes.grad is None
    expected = make_features(1)
    expected = [f.requires_grad_() for f in expected]
    (expected_bins(expected, boxes.detach(), STRIDES) * weight).sum().backward()
    for ours, theirs in zip(features, expected, strict=True):
        theirs_grad = torch.zeros_like(ours) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(ours.grad, theirs_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", ["detectron2", "mmdet"])
def test_training_in_float32_is_inference(rule):
    """The reference takes torchvision's operator where there is a gradient, which reads anywhere for strange boxes."""
    largest = torch.finfo(torch.float32).max
    strange = [[torch.nan] * 4, [0, 0, torch.inf, 50], [-torch.inf, 0, 9, 9], [-largest, -largest, largest, largest]]
    strange += [[0, 0, largest, 8], [1e30, 1e30, 2e30, 2e30], [torch.nan, 1, 30, 40]]
    boxes = torch.cat([torch.tensor([*SPECIAL_BOXES.values(), *strange]), make_boxes(1, 40, torch.float32)[0]])
    boxes = boxes.expand(2, -1, -1)
    features = make_features(channels=5, dtype=torch.float32)
    expected = multiscale_roi_align(features, boxes, STRIDES, level_rule=rule)
    maps = [f.clone().requires_grad_() for f in features]
    pooled = multiscale_roi_align(maps, boxes, STRIDES, level_rule=rule)
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(3))
    (pooled * weight).sum().backward()
    exact = [f.double().requires_grad_() for f in features]
    (multiscale_roi_align(exact, boxes, STRIDES, level_rule=rule) * weight).sum().backward()
    for ours, theirs in zip(maps, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-4)


def test_a_level_that_no_box_reads_gets_a_zero_gradient():
    features = [f.requires_grad_() for f in make_features(1)]
    boxes = torch.tensor([[[10.0, 10, 40, 40]]], dtype=torch.float64)  # P2 only
    multiscale_roi_align(features, boxes, STRIDES).sum().backward()
    assert features[0].grad.abs().sum() > 0
    assert all(torch.equal(f.grad, torch.zeros_like(f)) for f in features[1:])


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 2, s, s, generator=generator, dtype=torch.float64, requires_grad=True) for s in (4, 2)]
    boxes = torch.tensor([[[1.0, 2, 25, 30]], [[-90, -70, 100, 80]]], dtype=torch.float64)
    assert box_levels(boxes, (8, 16)).flatten().tolist() == [0, 0]
    big = torch.tensor([[[-300.0, -200, 20, 24]], [[0, 0, 300, 300]]], dtype=torch.float64)
    boxes = torch.cat([boxes, big], dim=1)
    assert box_levels(boxes, (8, 16)).tolist() == [[0, 1], [0, 1]]
    assert torch.autograd.gradcheck(lambda *f: multiscale_roi_align(f, boxes, (8, 16), 2, 2), maps)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(order=st.permutations(range(7)), seed=st.integers(0, 1000))
def test_permuting_proposals_permutes_the_result(order, seed):
    features, boxes = make_features(2, 2), make_boxes(2, 7, seed=seed)
    actual = multiscale_roi_align(features, boxes[:, order], STRIDES, 3)
    expected = multiscale_roi_align(features, boxes, STRIDES, 3)[:, order]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_an_image_of_a_batch_is_the_image_alone():
    features, boxes = make_features(3), make_boxes(3)
    batch = multiscale_roi_align(features, boxes, STRIDES)
    for i in range(3):
        alone = multiscale_roi_align([f[i : i + 1] for f in features], boxes[i : i + 1], STRIDES)
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": []}, ValueError, "strides: expected one a level"),
        ({"strides": (4, 8)}, ValueError, r"strides: expected one a level, got 2 for 4 features"),
        ({"strides": (4, 8, 16, 64)}, ValueError, "strides: expected powers of two"),
        ({"strides": (3, 6, 12, 24)}, ValueError, "strides: expected powers of two"),
        ({"strides": (32, 16, 8, 4)}, ValueError, "strides: expected powers of two"),
        ({"boxes": torch.zeros(2, 5, 5)}, ValueError, r"boxes: expected shape \[B, N, 4\], got \[2, 5, 5\]"),
        ({"boxes": torch.zeros(5, 4)}, ValueError, r"boxes: expected shape \[B, N, 4\], got \[5, 4\]"),
        ({"boxes": torch.zeros(3, 5, 4)}, ValueError, r"features\[0\]: expected shape \[3, C, H, W\]"),
        ({"boxes": torch.zeros(2, 5, 4, dtype=torch.int64)}, TypeError, "boxes: expected a floating-point tensor"),
        ({"output_size": 0}, ValueError, "output_size, sampling_ratio: expected >= 1, got 0, 2"),
        ({"sampling_ratio": 0}, ValueError, "output_size, sampling_ratio: expected >= 1, got 7, 0"),
        ({"level_rule": "caffe"}, ValueError, "level_rule: expected one of detectron2, mmdet, got 'caffe'"),
    ],
)
def test_argument_errors(change, error, message):
    arguments = {"features": make_features(dtype=torch.float32), "boxes": torch.zeros(2, 5, 4), "strides": STRIDES}
    with pytest.raises(error, match=message):
        multiscale_roi_align(**{**arguments, **change})


@pytest.mark.parametrize(
    ("level", "feature", "error", "message"),
    [
        (0, torch.zeros(2, 3, 0, 8), ValueError, r"features\[0\]: expected at least one cell"),
        (1, torch.zeros(2, 3, 8), ValueError, r"features\[1\]: expected shape \[2, 3, H, W\], got \[2, 3, 8\]"),
        (2, torch.zeros(2, 4, 8, 8), ValueError, r"features\[2\]: expected shape \[2, 3, H, W\], got \[2, 4, 8, 8\]"),
        (3, torch.zeros(2, 3, 8, 8).double(), TypeError, r"features\[3\]: expected torch.float32 like features\[0\]"),
        (1, torch.zeros(2, 3, 8, 8).long(), TypeError, r"features\[1\]: expected a floating-point tensor"),
        (1, [[0.0]], TypeError, r"features\[1\]: expected a tensor, got list"),
        (1, torch.zeros(2, 3, 8, 8, device="meta"), ValueError, r"features\[1\]: expected it on cpu like boxes"),
    ],
)
def test_feature_errors(level, feature, error, message):
    features = make_features(dtype=torch.float32)
    features[level] = feature
    with pytest.raises(error, match=message):
        multiscale_roi_align(features, torch.zeros(2, 5, 4), STRIDES)
