"""The training step on a GPU: no wait for the device, and the same in a CUDA graph as without."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from sparse_rcnn.engine.cuda_graph import WARM_UP_STEPS, CudaCapture, GraphedStep, ShapeBuckets, refusal
from sparse_rcnn.engine.optimizer import set_lr
from sparse_rcnn.engine.step import Reports, TrainStep
from tests.training_step import make_step, sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present")

CUDA = torch.device("cuda")
SMALL, LARGE = ((50, 90), (64, 40)), ((190, 120), (170, 160))


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run_without_waiting(step: TrainStep, call, batches) -> list[float]:
    """Train on ``batches``, the host's part included, with an error at any wait; the total losses."""
    reports, totals = Reports(), []

    def train(some, first):
        for number, batch in enumerate(some, start=first):
            set_lr(step.optimizer, 1 / number)
            call(step.model.prepare(*batch))
            reports.add(number, (number,), step)
            totals.extend(sum(report.losses.values()) for report in reports.take(wait=False))

    warm = WARM_UP_STEPS + 1
    train(batches[:warm], 1)  # compiles, tunes and allocates
    with waiting_is_an_error():
        train(batches[warm:], warm + 1)
    totals += [sum(report.losses.values()) for report in reports.take(wait=True)]
    return totals


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_no_step_waits(classification, bfloat16):
    step = make_step(bfloat16, "cuda", classification=classification)
    batches = [sample(seed, counts) for seed, counts in enumerate([(3, 1), (0, 7), (0, 0), (2, 2), (3, 9), (1, 0)])]
    totals = run_without_waiting(step, lambda batch: step(batch.to(CUDA)), batches * 2)
    assert len(totals) == 12 and all(0 < total < float("inf") for total in totals)


@pytest.mark.parametrize("interaction", ["concat", "plain"])
def test_no_step_of_the_other_interactions_waits(interaction):
    step = make_step(False, "cuda", interaction=interaction)
    totals = run_without_waiting(step, lambda batch: step(batch.to(CUDA)), [sample(seed) for seed in range(6)])
    assert len(totals) == 6 and all(0 < total < float("inf") for total in totals)


def test_no_replay_waits():
    step = make_step(True, "cuda")
    graphed = GraphedStep(step, CudaCapture(CUDA), print)
    totals = run_without_waiting(step, graphed, [sample(0)] * 30)
    assert totals[-1] < 0.9 * totals[0], "the replays train"


def moments(step: TrainStep, name: str) -> torch.Tensor:
    return torch.cat([state[name].flatten() for state in step.optimizer.state.values()])


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_the_captured_step_is_the_plain_one(classification, bfloat16):
    """Without updates, so that the order of atomic sums, the only difference, does not grow from step to step."""
    assert refusal(CUDA) is None
    plain, step = (make_step(bfloat16, "cuda", classification=classification) for _ in range(2))
    graphed = GraphedStep(step, CudaCapture(CUDA), print)
    for each in (plain, step):
        set_lr(each.optimizer, 0.0)
    buckets = ShapeBuckets(200)
    counts = [(3, 1), (0, 7), (2, 2), (0, 0), (30, 4), (1, 0)]
    seen = set()
    for seed, (count, sizes) in enumerate((count, sizes) for count in counts for sizes in (SMALL, LARGE)):
        images, targets = sample(seed, count, sizes)
        batch = plain.model.prepare(images, targets, buckets.shape(images, targets))
        plain(batch.to(CUDA))
        graphed(batch)
        torch.testing.assert_close(step.report, plain.report, rtol=2e-2 if bfloat16 else 1e-3, atol=1e-5)
        seen.add(tuple(plain.report.tolist()))
    assert len(seen) == 12, "every batch has its own losses, so that no replay can have read another's"
    assert len(graphed._graphs) == 2
    assert {float(state["step"]) for state in step.optimizer.state.values()} == {12.0}
    expected, actual = moments(plain, "exp_avg"), moments(step, "exp_avg")
    limit = 2e-2 if bfloat16 else 1e-3
    assert (actual - expected).norm() < limit * expected.norm()


def test_learning_rates_reach_the_replays():
    step = make_step(False, "cuda")
    graphed = GraphedStep(step, CudaCapture(CUDA), print)
    for seed in range(WARM_UP_STEPS + 1):
        graphed(step.model.prepare(*sample(seed)))
    before = [parameter.detach().clone() for parameter in step.parameters]
    set_lr(step.optimizer, 0.0)
    graphed(step.model.prepare(*sample(7)))
    assert all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))
    set_lr(step.optimizer, 1.0)
    graphed(step.model.prepare(*sample(8)))
    assert sum(not torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True)) > 0.8 * len(before)


@pytest.mark.parametrize("captured", [False, True], ids=["plain", "captured"])
def test_a_bad_batch_changes_nothing_and_the_next_goes_on(captured):
    step = make_step(False, "cuda")
    graphed = GraphedStep(step, CudaCapture(CUDA), print)
    images, targets = sample(0)
    images = [image / 255 for image in images]
    bad = [images[0], images[1] * float("nan")]
    reports, state = Reports(), []
    for number in range(1, 8):
        batch = step.model.prepare(bad if number == 5 else images, targets)
        graphed(batch) if captured else step(batch.to(CUDA))
        reports.add(number, (10 * number,), step)
        kept = [value for values in step.optimizer.state.values() for value in values.values()]
        state.append([tensor.detach().clone() for tensor in (*step.parameters, *kept)])
    problems = [(report.step, report.image_ids) for report in reports.take(wait=True) if report.problem]
    assert problems == [(5, (50,))]
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(state)]
    assert same == [False, False, False, True, False, False]
    assert step.skipped.tolist() == [0, 1]
