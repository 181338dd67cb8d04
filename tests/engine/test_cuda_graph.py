"""Shape buckets, and the bookkeeping of captured steps; a stand-in for CUDA graphs runs the step on the buffers."""

from __future__ import annotations

import pytest
import torch

from sparse_rcnn.engine import trainer as trainer_module
from sparse_rcnn.engine.checkpoint import load_checkpoint
from sparse_rcnn.engine.cuda_graph import WARM_UP_STEPS, GraphedStep, ShapeBuckets, refusal
from sparse_rcnn.engine.optimizer import set_lr
from sparse_rcnn.engine.step import TrainStep
from sparse_rcnn.engine.trainer import Trainer
from sparse_rcnn.models.batch import PaddedShape
from sparse_rcnn.ops import _library
from tests.host_reads import forbid_host_reads
from tests.training_step import assert_equal, make_step, sample, state_of


class Rerun:
    """What :class:`CudaCapture` is to a device without graphs."""

    def __init__(self, device=None) -> None:
        self.runs, self.captured, self.replays = 0, [], 0

    def run(self, function):
        self.runs += 1
        function()

    def capture(self, function):
        self.captured.append(function)

        def replay():
            self.replays += 1
            function()

        return replay


def graphed(step: TrainStep, **options) -> tuple[GraphedStep, Rerun, list[str]]:
    capture, said = Rerun(), []
    return GraphedStep(step, capture, said.append, **options), capture, said


# ------------------------------------------------------------------------------------------------------------- buckets


@pytest.mark.parametrize("max_size", [32, 96, 333, 800, 1333, 4000])
def test_a_side_has_at_most_16_lengths(max_size):
    buckets = ShapeBuckets(max_size)
    sides = [buckets._side(size) for size in range(1, max_size + 1)]
    assert len(set(sides)) <= 16
    assert all(side >= size and side % 32 == 0 for size, side in enumerate(sides, start=1))
    assert sides == sorted(sides) and sides[-1] == -(-max_size // 32) * 32
    assert all(buckets._side(side) == side for side in sides)
    assert max(side - size for size, side in enumerate(sides, start=1)) < max_size / 16 + 64


def test_the_papers_sizes():
    buckets = ShapeBuckets(1333)
    expected = [480, 576, 576, 576, 672, 672, 672, 768, 768, 768, 864]
    assert [buckets._side(size) for size in range(480, 801, 32)] == expected
    assert buckets._side(1333) == 1344
    assert buckets._side(1345) == 1440, "a side beyond the limit has a bucket too"


def test_the_shape_of_a_batch_holds_all_of_it():
    images, targets = sample(0, counts=(3, 0, 33), sizes=((50, 90), (161, 40), (20, 30)))
    assert ShapeBuckets(1333).shape(images, targets) == PaddedShape(height=192, width=96, boxes=64)


@pytest.mark.parametrize(("boxes", "columns"), [(0, 32), (1, 32), (32, 32), (33, 64), (64, 64), (65, 128), (300, 512)])
def test_columns_are_powers_of_two(boxes, columns):
    images, targets = sample(0, counts=(boxes,), sizes=((50, 90),))
    assert ShapeBuckets(1333).shape(images, targets).boxes == columns


def test_a_batch_is_padded_with_nothing():
    model = make_step().model
    images, targets = sample(0)
    plain, padded = model.prepare(images, targets), model.prepare(images, targets, PaddedShape(96, 160, 32))
    assert plain.pixels.shape == (2, 3, 64, 96) and plain.targets.boxes.shape == (2, 3, 4)
    assert padded.pixels.shape == (2, 3, 96, 160) and padded.pixels.dtype == torch.uint8
    assert torch.equal(padded.pixels[:, :, :64, :96], plain.pixels)
    assert not padded.pixels[:, :, 64:].any() and not padded.pixels[..., 96:].any()
    assert torch.equal(padded.sizes, plain.sizes) and torch.equal(padded.targets.counts, plain.targets.counts)
    for name, shape in (("labels", (2, 32)), ("boxes", (2, 32, 4))):
        full, part = getattr(padded.targets, name), getattr(plain.targets, name)
        assert full.shape == shape and torch.equal(full[:, :3], part) and not full[:, 3:].any()
    # What the network gets is 0 beyond each image, not a black that has been normalised.
    normalised = model._scale(padded.pixels, padded.sizes)
    assert torch.equal(normalised[:, :, :64, :96], model._normalize(images)[0])
    assert not normalised[0, :, 50:].any() and not normalised[1, ..., 40:].any() and normalised[0, :, :50, :90].any()


def test_columns_of_padding_change_no_loss():
    step = make_step()
    images, targets = sample(0)
    losses = [step.model(step.model.prepare(images, targets, PaddedShape(64, 96, m))) for m in (3, 32, 512)]
    assert losses[0] == step.model(images, targets)
    for others in losses[1:]:
        for name, value in losses[0].items():
            torch.testing.assert_close(others[name], value, rtol=1e-6, atol=0.0)


# ---------------------------------------------------------------------------------------------------------- bookkeeping

SMALL, LARGE, TALL = ((50, 90), (64, 40)), ((90, 120), (70, 60)), ((120, 50), (100, 60))


def batches_of(model, plan):
    """Padded batches: one of ``sizes`` with ``counts`` boxes for each entry of the plan."""
    buckets = ShapeBuckets(160)
    for seed, (sizes, counts) in enumerate(plan):
        images, targets = sample(seed, counts, sizes)
        yield model.prepare(images, targets, buckets.shape(images, targets))


def assert_steps_equal(plan, bfloat16=False, config=None, **options) -> tuple[Rerun, list[str]]:
    """The graphed step on every batch of the plan against the plain one on the same padded batch, bit for bit."""
    plain, captured = (make_step(bfloat16, **(config or {})) for _ in range(2))
    step, capture, said = graphed(captured, **options)
    for number, batch in enumerate(batches_of(plain.model, plan)):
        for each in (plain, step.step):
            set_lr(each.optimizer, 1 / (number + 1))
        given = [tensor.clone() for tensor in batch.tensors()]
        plain(batch)
        step(batch)
        assert torch.equal(plain.report, step.step.report), number
        assert all(torch.equal(a, b) for a, b in zip(given, batch.tensors(), strict=True))
    assert_equal(state_of(plain), state_of(step.step))
    counts = {int(state["step"]) for state in step.step.optimizer.state.values()}
    assert counts == {len(plan)}, "every batch is one update"
    return capture, said


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_replays_equal_the_plain_step(bfloat16):
    counts = [(3, 1), (0, 7), (2, 2), (0, 0), (30, 4), (1, 0)]
    capture, said = assert_steps_equal([(SMALL, count) for count in counts], bfloat16)
    assert (capture.runs, len(capture.captured), capture.replays) == (WARM_UP_STEPS, 1, len(counts) - WARM_UP_STEPS)
    assert said == []


def test_noisy_proposals_are_of_the_batch_that_is_replayed():
    plan = [(SMALL, count) for count in [(3, 1), (0, 7), (2, 2), (0, 0), (30, 4)]]
    capture, _ = assert_steps_equal(plan, config={"denoising": 12})
    assert capture.replays == 3


def test_every_shape_has_a_graph_of_its_own():
    plan = [(SMALL, (3, 1)), (LARGE, (1, 1)), (SMALL, (1, 33)), (TALL, (1, 0))] * (WARM_UP_STEPS + 2)
    capture, said = assert_steps_equal(plan)
    assert (capture.runs, len(capture.captured), capture.replays) == (4 * WARM_UP_STEPS, 4, 8)
    assert said == []


def test_shapes_beyond_the_limit_stay_without_a_graph_and_that_is_said_once():
    plan = [(SMALL, (3, 1)), (LARGE, (1, 1)), (TALL, (1, 0))] * (WARM_UP_STEPS + 2)
    capture, said = assert_steps_equal(plan, max_graphs=1)
    assert len(capture.captured) == 1 and capture.replays == 2
    assert capture.runs == len(plan) - 2
    assert said == ["cuda_graph: 1 shapes of batch have a graph, the others run without"]


def test_floating_images_are_another_shape():
    plain = make_step()
    step, capture, _ = graphed(make_step())
    images, targets = sample(0)
    for number in range(2 * (WARM_UP_STEPS + 1)):
        given = [image / 255 for image in images] if number % 2 else images
        batch = plain.model.prepare(given, targets)
        plain(batch)
        step(batch)
    assert_equal(state_of(plain), state_of(step.step))
    assert len(capture.captured) == 2


def test_a_replay_reads_the_buffers_and_nothing_on_the_host():
    step, capture, _ = graphed(make_step())
    batches = list(batches_of(step.step.model, [(SMALL, (3, 1))] * (WARM_UP_STEPS + 3)))
    for batch in batches[: WARM_UP_STEPS + 1]:
        step(batch)
    (captured,) = step._graphs.values()
    places = [tensor.data_ptr() for tensor in captured.inputs.tensors()]
    assert not set(places) & {tensor.data_ptr() for batch in batches for tensor in batch.tensors()}
    with forbid_host_reads():
        for batch in batches[WARM_UP_STEPS + 1 :]:
            step(batch)
    assert [tensor.data_ptr() for tensor in captured.inputs.tensors()] == places
    assert all(torch.equal(a, b) for a, b in zip(captured.inputs.tensors(), batches[-1].tensors(), strict=True))
    assert capture.replays == 3


def test_a_learning_rate_that_is_a_tensor_reaches_the_replays():
    step, _, _ = graphed(make_step())
    for group in step.step.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    batches = list(batches_of(step.step.model, [(SMALL, (3, 1))] * (WARM_UP_STEPS + 3)))
    for batch in batches[: WARM_UP_STEPS + 1]:
        step(batch)
    before = [parameter.detach().clone() for parameter in step.step.parameters]
    set_lr(step.step.optimizer, 0.0)
    step(batches[-2])
    assert all(torch.equal(a, b) for a, b in zip(before, step.step.parameters, strict=True))
    set_lr(step.step.optimizer, 1.0)
    step(batches[-1])
    moved = sum(not torch.equal(a, b) for a, b in zip(before, step.step.parameters, strict=True))
    assert moved > 0.8 * len(before), "all but a few biases that no gradient reaches"


def test_whoever_watches_the_parameters_sees_a_replay():
    """Of which Python knows nothing."""
    step, _, _ = graphed(make_step())
    first, second = batches_of(step.step.model, [(SMALL, (3, 1))] * 2)
    for _ in range(WARM_UP_STEPS + 1):
        step(first)
    (captured,) = step._graphs.values()
    captured.replay = lambda: None
    before = [parameter._version for parameter in step.step.parameters]
    step(second)
    assert all(parameter._version > version for parameter, version in zip(step.step.parameters, before, strict=True))


def test_a_bad_batch_is_skipped_in_the_replays_too():
    plain = make_step()
    step, capture, _ = graphed(make_step())
    images, targets = sample(0)
    images = [image / 255 for image in images]
    good = plain.model.prepare(images, targets)
    bad = plain.model.prepare([images[0], images[1] * float("nan")], targets)
    for _ in range(WARM_UP_STEPS + 1):
        step(good)
        plain(good)
    for counts in ([1, 1], [2, 2]):
        step(bad)
        assert not step.step.report.isfinite().all() and step.step.report[-2:].tolist() == counts
        assert_equal(state_of(plain), state_of(step.step))
    step(good)
    plain(good)
    assert step.step.report.isfinite().all() and step.step.report[-2:].tolist() == [0, 2]
    assert_equal(state_of(plain), state_of(step.step))
    assert capture.replays == 4


def test_torchs_flag_is_set_for_the_capture_alone():
    class Seen(Rerun):
        flags = []

        def run(self, function):
            self.flags += [group["capturable"] for group in optimizer.param_groups]
            function()

        def capture(self, function):
            self.flags += [group["capturable"] for group in optimizer.param_groups]
            raise RuntimeError("no capture")

    step = make_step()
    optimizer = step.optimizer
    capture = Seen()
    graph = GraphedStep(step, capture, print)
    batches = list(batches_of(step.model, [(SMALL, (3, 1))] * (WARM_UP_STEPS + 1)))
    for batch in batches[:-1]:
        graph(batch)
    with pytest.raises(RuntimeError, match="no capture"):
        graph(batches[-1])
    assert capture.flags == [*[False] * 2 * WARM_UP_STEPS, True, True]
    assert not any(group["capturable"] for group in optimizer.param_groups)


# -------------------------------------------------------------------------------------------------------------- trainer


@pytest.fixture
def stand_in(monkeypatch):
    """The trainer takes ``cuda_graph`` on the CPU, with :class:`Rerun`; gives the captures that were made."""
    made = []
    monkeypatch.setattr(trainer_module, "CudaCapture", lambda device: made.append(Rerun()) or made[-1])
    monkeypatch.setattr(trainer_module, "refusal", lambda device: None)
    return made


def assert_same_run(first, second) -> None:
    first, second = (load_checkpoint(f"{run}/last.pt") for run in (first, second))
    assert first["step"] == second["step"]
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())
    assert all(torch.equal(value, second["ema"][name]) for name, value in first["ema"].items())
    for place, state in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][place][name]) for name, value in state.items())


def test_a_run_with_graphs_is_the_run_without_on_the_same_padding(tiny_config, tmp_path, stand_in, monkeypatch):
    options = {"cuda_graph": True, "steps": 10, "min_sizes": (48, 64), "ema_decay": 0.9}
    graphs, plain = str(tmp_path / "graphs"), str(tmp_path / "plain")
    Trainer(tiny_config(output=graphs, **options)).run()
    assert stand_in[0].replays >= 3
    assert stand_in[0].replays + stand_in[0].runs == 10
    monkeypatch.setattr(trainer_module, "GraphedStep", lambda step, capture, say: step)
    Trainer(tiny_config(output=plain, **options)).run()
    assert_same_run(graphs, plain)


def test_a_resumed_run_with_graphs_is_the_uninterrupted_one(tiny_config, tmp_path, stand_in):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    Trainer(tiny_config(output=whole, cuda_graph=True, steps=8)).run()
    Trainer(tiny_config(output=parts, cuda_graph=True, steps=5)).run()
    Trainer(tiny_config(output=parts, cuda_graph=True, steps=8, resume=True)).run()
    assert_same_run(whole, parts)
    assert len({capture.replays for capture in stand_in}) > 1, "what was captured differs, the runs do not"


def test_without_a_gpu_it_is_refused(tiny_config):
    with pytest.raises(ValueError, match="^cuda_graph: expected a CUDA device, got cpu$"):
        Trainer(tiny_config(cuda_graph=True, device="cpu"))


def test_an_operator_without_a_kernel_is_named(monkeypatch):
    monkeypatch.setattr(
        _library, "serving", lambda name, device: "reference" if name == "linear_assignment" else "native"
    )
    monkeypatch.setattr(_library, "why_not", lambda name, device: "_C_cuda.so was not built")
    message = "linear_assignment waits for the device without its kernel, and _C_cuda.so was not built"
    assert refusal(torch.device("cuda")) == message
    monkeypatch.setattr(_library, "serving", lambda name, device: "native")
    assert refusal(torch.device("cuda")) is None
