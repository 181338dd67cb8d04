"""Matching, losses and their gradients on a GPU: the CPU's values, no host wait, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from sparse_rcnn.losses import HungarianMatcher, PackedTargets, SetCriterion

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present")

CUDA = torch.device("cuda")
K = 20
COUNTS = ((9, 2, 0), (1, 9, 5), (0, 0, 0))


def make_arguments(seed, classification, device, M=9):
    """Predictions that want a gradient, and targets; the sizes do not depend on the seed."""
    generator = torch.Generator().manual_seed(seed)

    def boxes(*shape):
        corners = torch.rand(*shape, 2, generator=generator) * 300
        return torch.cat([corners, corners + 5 + torch.rand(*shape, 2, generator=generator) * 200], dim=-1)

    classes = K + (classification == "softmax")
    predictions = [torch.randn(6, 3, 40, classes, generator=generator), boxes(6, 3, 40)]
    labels = torch.randint(K, (3, M), generator=generator)
    targets = [labels, boxes(3, M), torch.tensor(COUNTS[seed % len(COUNTS)])]
    predictions = [tensor.to(device).requires_grad_() for tensor in predictions]
    sizes = torch.tensor([[480.0, 640.0], [500.0, 400.0], [333.0, 500.0]], device=device)
    return *predictions, PackedTargets(*(tensor.to(device) for tensor in targets)), sizes


def step(criterion, logits, boxes, targets, sizes):
    losses = criterion(logits, boxes, targets, sizes)
    total = torch.stack(list(losses.values())).sum()
    return losses, torch.autograd.grad(total, (logits, boxes))


def make_criterion(classification):
    return SetCriterion(HungarianMatcher(classification=classification), K)


def assert_equal(actual, expected):
    losses, grads = actual
    for name, value in expected[0].items():
        torch.testing.assert_close(losses[name].cpu(), value, rtol=1e-5, atol=1e-5)
    for grad, value in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(grad.cpu(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_values_and_gradients_are_the_cpus(classification, seed):
    criterion = make_criterion(classification)
    expected = step(criterion, *make_arguments(seed, classification, "cpu"))
    assert_equal(step(criterion, *make_arguments(seed, classification, CUDA)), expected)


@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_no_host_wait(classification):
    criterion, arguments = make_criterion(classification), make_arguments(0, classification, CUDA)
    step(criterion, *arguments)  # which compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(criterion, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_in_a_cuda_graph(classification):
    """Captured with one batch, replayed with others of other counts."""
    criterion = make_criterion(classification)
    logits, boxes, targets, sizes = make_arguments(0, classification, CUDA)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(criterion, logits, boxes, targets, sizes)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(criterion, logits, boxes, targets, sizes)
    for seed in range(3):
        new_logits, new_boxes, new_targets, _ = make_arguments(seed, classification, "cpu")
        with torch.no_grad():
            logits.copy_(new_logits)
            boxes.copy_(new_boxes)
        for name in ("labels", "boxes", "counts"):
            getattr(targets, name).copy_(getattr(new_targets, name))
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(captured, step(criterion, *make_arguments(seed, classification, "cpu")))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_predictions_that_are_not_finite(bad):
    logits, boxes, targets, sizes = make_arguments(0, "focal", CUDA)
    criterion = make_criterion("focal")
    with torch.no_grad():
        logits[1, 0, 5, 3], boxes[2, 1, 7, 0] = bad, bad
    matches = criterion.matcher(logits, boxes, targets, sizes)
    for image, count in enumerate(COUNTS[0]):
        for row in matches[:, image, :count].tolist():
            assert len(set(row)) == count and min(row, default=0) >= 0
    losses = criterion(logits, boxes, targets, sizes)
    bad_losses = {name for name, value in losses.items() if not value.isfinite()}
    assert bad_losses == {"loss_ce_1", "loss_bbox_2", "loss_giou_2"}
