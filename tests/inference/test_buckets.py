"""One program a shape, captured by a stand-in for CUDA graphs; and the program itself reads nothing on the host."""

from __future__ import annotations

import importlib

import pytest
import torch

from sparse_rcnn.inference.buckets import Buckets, Captured, Inputs, Key
from sparse_rcnn.inference.program import Found
from tests.host_reads import forbid_host_reads
from tests.inference.test_optimized import assert_equal_detections, make_images, make_model

CPU = torch.device("cpu")


class StandIn:
    """Captures by keeping the call: a replay computes anew into the tensors of the first result, as a graph does."""

    def __init__(self, too_many: int = 10**9):
        self.captured: list[int] = []
        self.too_many = too_many

    def __call__(self, run, inputs):
        batch = len(inputs.images)
        if batch >= self.too_many:
            raise torch.OutOfMemoryError("CUDA out of memory (the stand-in's)")
        self.captured.append(batch)
        outputs = run()
        for values in outputs:
            values.fill_(7)

        def replay():
            for static, values in zip(outputs, run(), strict=True):
                static.copy_(values)

        return Captured(inputs, outputs, replay)


@pytest.fixture(scope="module")
def model():
    return make_model()


def keys(optimized):
    return [(b["batch"], b["height"], b["width"], b["replays"]) for b in optimized.report()["buckets"]]


@pytest.mark.parametrize(("batch_size", "expected"), [(1, [1] * 4), (4, [1, 2, 4, 4]), (6, [1, 2, 4, 4, 6, 6])])
def test_batches_are_filled_up_to_powers_of_two(batch_size, expected):
    buckets = Buckets(None, None, CPU, batch_size)
    assert [buckets.key(min(n, batch_size), 64, 96).batch for n in range(1, len(expected) + 1)] == expected
    assert buckets.key(1, 64, 96) == Key(1, 64, 96)
    assert Key(1, 64, 96).capacity == 4 * 3 * 64 * 96


@torch.inference_mode()
def test_one_program_a_shape_and_the_same_results(model):
    optimized, plain = model.optimize(batch_size=4, capture=StandIn()), model.optimize()
    batches = [
        *([(40, 60)] * 3, [(40, 60)] * 4, [(40, 60)], [(60, 40)] * 2),
        *([(40, 60), (64, 33)], [(33, 64), (10, 10), (64, 64)], [(40, 60)]),
    ]
    for sizes in batches:
        images = make_images(*sizes)
        assert_equal_detections(optimized(images), plain(images))
    # Three images are filled up to four: the same program; what the fourth left in its place does not show.
    assert keys(optimized) == [(4, 64, 64, 3), (1, 64, 64, 2), (2, 64, 64, 2)]
    assert optimized.report()["batches_without_bucket"] == 0


@torch.inference_mode()
def test_results_are_the_callers(model):
    optimized, (first, second) = model.optimize(capture=StandIn()), make_images((40, 60), (64, 64))
    found = optimized([first])
    before = {name: values.clone() for name, values in found[0].items()}
    optimized([second])
    assert all(torch.equal(found[0][name], before[name]) for name in before)


@torch.inference_mode()
def test_more_images_than_a_batch_are_padded_as_one(model):
    optimized, plain = model.optimize(batch_size=2, capture=StandIn()), model.optimize()
    images = make_images((40, 60), (40, 60), (96, 60), (33, 30), (32, 128))
    assert_equal_detections(optimized(images), plain(images))
    assert keys(optimized) == [(2, 96, 128, 2), (1, 96, 128, 1)]


@torch.inference_mode()
def test_images_larger_than_their_place_are_resized_before(model):
    optimized, plain = model.optimize(batch_size=2, capture=StandIn()), model.optimize()
    images, sizes = make_images((150, 190), (64, 90)), [(50, 64), (40, 56)]
    assert images[0].numel() > Key(1, 64, 64).capacity
    found = optimized.detect(images, sizes)
    assert_equal_detections(found, plain.detect(images, sizes), atol=5e-3)
    assert found[0]["boxes"].max() > 64


@torch.inference_mode()
def test_programs_are_bounded(model):
    optimized, plain = model.optimize(capture=StandIn()), model.optimize()
    optimized._buckets.limit = 2
    for width in (32, 64, 96, 128, 64):
        images = make_images((32, width))
        assert_equal_detections(optimized(images), plain(images))
    assert keys(optimized) == [(1, 32, 32, 1), (1, 32, 64, 2)]
    assert optimized.report()["batches_without_bucket"] == 2


def test_warm_up_captures(model):
    capture = StandIn()
    optimized = model.optimize(batch_size=3, image_sizes=[(40, 60), (60, 100)], capture=capture)
    assert [key[:3] for key in keys(optimized)] == [(3, 64, 64), (3, 64, 128)]
    with torch.inference_mode():
        optimized(make_images(*[(64, 64)] * 3))
    assert capture.captured == [3, 3]


@torch.inference_mode()
def test_out_of_memory_halves_the_batch_and_loses_nothing(model):
    capture = StandIn(too_many=3)
    optimized, plain = model.optimize(batch_size=8, capture=capture), model.optimize()
    images = make_images((40, 60), (96, 30), *[(33, 64)] * 5)
    with pytest.warns(UserWarning) as told:
        found = optimized(images)
    assert [str(warning.message) for warning in told] == [
        "out of memory with 7 images at a time: going on with 3",
        "out of memory with 3 images at a time: going on with 1",
    ]
    assert_equal_detections(found, plain(images))
    assert_equal_detections(optimized(images), plain(images))  # and no warning again
    assert optimized.batch_size == 1 and set(capture.captured) == {1}


@torch.inference_mode()
def test_a_single_image_too_large_is_an_error(model):
    optimized = model.optimize(batch_size=2, capture=StandIn(too_many=1))
    with pytest.warns(UserWarning, match="going on with 1"), pytest.raises(torch.OutOfMemoryError):
        optimized(make_images((40, 60), (40, 60)))


@torch.inference_mode()
def test_changed_weights_show_after_a_replay_too():
    model, images = make_model(), make_images((40, 60))
    optimized = model.optimize(capture=StandIn())
    optimized(images)
    model.backbone.body.conv1.weight = torch.nn.Parameter(model.backbone.body.conv1.weight * 2)
    with pytest.raises(RuntimeError, match="changed since"):
        optimized(images)


PROGRAMS = {
    "published": {},
    "concat": {"interaction": "concat"},
    "plain": {"interaction": "plain"},
    "no attention": {"self_attention": False},
    "softmax": {"classification": "softmax"},
    "mobilenet": {"backbone": "mobilenetv3_small_050"},
    "lite": {"backbone": "efficientnet_lite0"},
}


@pytest.mark.parametrize("changes", PROGRAMS.values(), ids=PROGRAMS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_the_program_reads_nothing_on_the_host(changes, dtype, monkeypatch):
    # On a GPU, where the sizes are, this check is left out.
    monkeypatch.setattr(importlib.import_module("sparse_rcnn.ops.normalize_pad"), "_check_sizes", lambda *a: None)
    model = make_model(**changes)
    program = model.optimize(dtype=dtype)._program
    inputs = Inputs.blank(Key(3, 64, 96), CPU)
    images = make_images((50, 70), (64, 96))
    inputs.fill(images, [(50, 70, 50, 70), (64, 96, 32, 48)])
    with forbid_host_reads():
        found = program(*inputs, (64, 96))
    assert isinstance(found, Found)
    N = model.config.num_proposals
    assert [tuple(values.shape) for values in found] == [(3, N, 4), (3, N), (3, N), (3, N), (3,)]
    expected = model.optimize(dtype=dtype).detect(images, [(50, 70), (32, 48)])
    for index, want in enumerate([*expected, {"scores": [], "boxes": torch.zeros(0, 4)}]):
        count = len(want["scores"])
        assert found.counts[index] == count
        assert not found.boxes[index, count:].any() and not found.scores[index, count:].any()
        assert not found.labels[index, count:].any() and not found.proposals[index, count:].any()
    if dtype == torch.float32:
        torch.testing.assert_close(found.boxes[0, : found.counts[0]], expected[0]["boxes"], rtol=1e-4, atol=2e-2)


@torch.inference_mode()
def test_empty_boxes_leave_no_gap():
    """Those outside of the image and those of no area are left out; the others keep their order."""
    program = make_model(num_proposals=5, num_classes=2).optimize()._program
    logits = torch.tensor([[0.0, -9], [1, -9], [2, -9], [3, -9], [-9, 4]])[None]
    boxes = torch.tensor(
        [[1.0, 1, 5, 5], [9, 9, 9, 20], [-5, 2, 30, 8], [40, 1, 50, 9], [float("nan"), 0, 3, 3]],
    )[None]
    found = program._select(logits, boxes, torch.tensor([[10.0, 20]]), torch.tensor([[20.0, 60]]))
    assert found.counts.tolist() == [2]
    assert found.proposals.tolist() == [[2, 0, 0, 0, 0]]
    assert found.labels.tolist() == [[0, 0, 0, 0, 0]]
    torch.testing.assert_close(found.scores[0, :2], torch.tensor([2.0, 0.0]).sigmoid())
    assert not found.scores[0, 2:].any()
    expected = [[0.0, 4, 60, 16], [3, 2, 15, 10], *[[0.0] * 4] * 3]
    torch.testing.assert_close(found.boxes[0], torch.tensor(expected))
