"""The training step: no host read from the losses to the update, and what a step that is not finite leaves behind."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch

from sparse_rcnn import ops
from sparse_rcnn.engine.optimizer import build_optimizer, in_official_order, load_optimizer, set_lr
from sparse_rcnn.engine.step import Report, Reports, TrainStep
from sparse_rcnn.models.dynamic_head import DynamicConv
from sparse_rcnn.models.recompute import recomputed
from sparse_rcnn.ops import _library
from tests.host_reads import HostRead, forbid_host_reads
from tests.training_step import CONFIG, assert_equal, make_step, sample, state_of

# These references look at values by their nature: SciPy's assignment, and the boxes of each pyramid level.
READING_REFERENCES = ("linear_assignment", "multiscale_roi_align", "roi_dynamic_conv")


def serve(monkeypatch, by_reference) -> None:
    """Let the reference of an operator serve where ``by_reference(name)``, and its kernel where not."""
    # An install without a compiler has none, and SciPy's assignment reads; kernels that do not load are a failure.
    if "was not built" in _library.problems().get("_C", ""):
        pytest.skip("the CPU kernels are not built")
    serving = _library.serving
    monkeypatch.setattr(
        _library, "serving", lambda name, device: "reference" if by_reference(name) else serving(name, device)
    )


@pytest.fixture(params=["native", "reference"])
def operators(request, monkeypatch):
    """The operators' kernels, or every reference but those above."""
    serve(monkeypatch, lambda name: request.param == "reference" and name not in READING_REFERENCES)
    return request.param


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_nothing_is_read_from_the_losses_to_the_update(operators, classification, bfloat16):
    step = make_step(bfloat16, classification=classification)
    batches = [step.model.prepare(*sample(seed)) for seed in range(3)]
    before = state_of(step)
    reports = Reports()
    with forbid_host_reads():
        for number, batch in enumerate(batches, start=1):
            set_lr(step.optimizer, 1 / number)
            step(batch)
            reports.add(number, (), step)
    values = list(reports.take(wait=True))
    assert [report.step for report in values] == [1, 2, 3] and all(report.problem is None for report in values)
    assert all(report.grad_norm > 0 and sum(report.losses.values()) > 1 for report in values[1:])
    moved = sum(not torch.equal(a, b) for a, b in zip(before, state_of(step), strict=False))
    assert moved > 60


VARIANTS = {
    "empty": {},
    "recompute": {},
    "concat": {"interaction": "concat"},
    "plain": {"interaction": "plain"},
    "one class": {"num_classes": 1},
    "last stage": {"deep_supervision": False},
    "clamped": {"delta_clamp": (-4.0, 4.0), "level_rule": "mmdet"},
    "frozen": {"frozen_stages": 2},
    "denoising": {"denoising": 12},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_reads(variant, monkeypatch):
    if variant == "recompute":  # what a GPU does
        calls = []

        def recomputing(self, parameters, x):
            return recomputed(parameters, lambda: calls.append(1) or self._generate(x))

        monkeypatch.setattr(DynamicConv, "_recomputing", recomputing)
    step = make_step(**VARIANTS[variant])
    images, targets = sample(0, counts=(0, 0) if variant == "empty" else (3, 1))
    for target in targets:
        target["labels"] %= step.model.config.num_classes
    batch = step.model.prepare(images, targets)
    with forbid_host_reads():
        step(batch)
        step(batch)
    assert step.report.isfinite().all() and step.report[-3] > 0
    assert variant != "recompute" or len(calls) == 2 * CONFIG.num_stages


def plant_in_losses(step: TrainStep, read) -> None:
    step.model.criterion.register_forward_hook(lambda module, arguments, losses: read(losses["loss_ce"]))


def plant_in_gradient(step: TrainStep, read) -> None:
    step.model.init_proposal_boxes.weight.register_hook(lambda gradient: read(gradient))


def plant_in_update(step: TrainStep, read) -> None:
    step.optimizer.register_step_pre_hook(lambda optimizer, *arguments: read(step.parameters[0].grad))


def read_item(tensor):
    tensor.sum().item()


def read_by_mask(tensor):
    tensor[tensor > 0]


@pytest.mark.parametrize("read", [read_item, read_by_mask])
@pytest.mark.parametrize("plant", [plant_in_losses, plant_in_gradient, plant_in_update])
def test_a_planted_read_is_caught(plant, read):
    step = make_step()
    batch = step.model.prepare(*sample(0))
    plant(step, read)
    with pytest.raises(HostRead), forbid_host_reads():
        step(batch)


@pytest.mark.parametrize("name", READING_REFERENCES)
def test_the_references_left_out_do_read(name, monkeypatch):
    """So that the list of them stays right."""
    step = make_step(interaction="concat" if name == "multiscale_roi_align" else "dynamic")
    batch = step.model.prepare(*sample(0))
    serve(monkeypatch, lambda other: other == name)
    with pytest.raises(HostRead), forbid_host_reads():
        step(batch)


def plain_adamw_step(model, optimizer, batch, clip_norm) -> list[float]:
    """The step as one would write it without a thought of waiting."""
    losses = model(batch)
    sum(losses.values()).backward()
    norm = torch.nn.utils.clip_grad_norm_(in_official_order(model), clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return [*(loss.item() for loss in losses.values()), norm.item()]


def test_the_step_is_that_of_a_plain_loop():
    step = make_step()
    model = copy.deepcopy(step.model)
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1)
    assert not hasattr(optimizer, "found_inf")
    for seed in range(3):
        batch = model.prepare(*sample(seed))
        step(batch)
        assert step.report.tolist() == [*plain_adamw_step(model, optimizer, batch, 1.0), 0, 0]
    for a, b in zip(step.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b) and a.grad is None


def test_whoever_watches_the_parameters_sees_the_update():
    step = make_step()
    before = [parameter._version for parameter in step.parameters]
    step(step.model.prepare(*sample(0)))
    assert all(parameter._version > version for parameter, version in zip(step.parameters, before, strict=True))


BAD_LOSSES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize("value", BAD_LOSSES)
@pytest.mark.parametrize("bad_steps", [{1}, {3, 4}, {1, 3}])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_steps_that_are_not_finite_are_as_if_they_had_not_been(bad_steps, value, backend):
    with ops.backend(backend):
        _check_skipping(bad_steps, value, contextlib.nullcontext if backend == "reference" else forbid_host_reads)


def _check_skipping(bad_steps, value, no_host_reads):
    step, alone = make_step(), make_step()
    assert step.fused == (no_host_reads is forbid_host_reads)
    count = 0

    def poison(module, arguments, losses):
        nonlocal count
        count += 1
        return {**losses, "loss_bbox": losses["loss_bbox"] * BAD_LOSSES[value]} if count in bad_steps else losses

    step.model.criterion.register_forward_hook(poison)
    reports = Reports()
    for number in range(1, 6):
        batch = step.model.prepare(*sample(number))
        with no_host_reads():
            step(batch)
            reports.add(number, (10 * number, 10 * number + 1), step)
        if number not in bad_steps:
            alone(alone.model.prepare(*sample(number)))
    assert_equal(state_of(step), state_of(alone))
    assert {int(state["step"]) for state in step.optimizer.state.values()} == {5 - len(bad_steps)}
    in_a_row = 0
    for number, report in enumerate(reports.take(wait=True), start=1):
        in_a_row = in_a_row + 1 if number in bad_steps else 0
        assert (report.step, report.image_ids) == (number, (10 * number, 10 * number + 1))
        assert report.problem == (f"loss_bbox is {value}" if number in bad_steps else None)
        assert (report.skipped_in_a_row, report.skipped) == (in_a_row, sum(bad <= number for bad in bad_steps))
    assert number == 5 and step.skipped.tolist() == [in_a_row, len(bad_steps)]


@pytest.mark.parametrize(("counts", "too_many"), [((4, 19), False), ((5, 5), True), ((1, 20), True)])
def test_five_in_a_row_or_twenty_in_all_are_too_many(counts, too_many):
    assert Report(1, (), {"loss": math.nan}, 0.0, *counts).too_many is too_many


def test_a_gradient_that_is_not_finite_is_named_where_the_losses_are_finite():
    step = make_step()
    step.model.init_proposal_features.weight.register_hook(lambda gradient: gradient * math.inf)
    before = [parameter.detach().clone() for parameter in step.parameters]
    reports = Reports()
    step(step.model.prepare(*sample(0)))
    reports.add(1, (1, 2), step)
    (report,) = reports.take(wait=True)
    assert report.problem in ("gradient norm is nan", "gradient norm is inf")
    assert all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))


def test_reports_that_are_not_there_are_left_until_they_are_waited_for(monkeypatch):
    here = {0: True, 1: False, 2: True, 3: False}
    waited = []

    class Event:
        def __init__(self, number):
            self.number = number

        def query(self):
            return here[self.number]

        def synchronize(self):
            waited.append(self.number)

    monkeypatch.setattr("sparse_rcnn.engine.step.to_host", lambda values: (values.clone(), Event(int(values[0]))))
    reports = Reports()
    source = make_step()
    source.names, source.report = ("a", "b"), torch.zeros(5)
    for number in range(4):
        source.report.copy_(torch.tensor([number, 0.5, 2.0, 0, 0]))
        reports.add(number, [number], source)
    assert [report.step for report in reports.take(wait=False)] == [0], "in order: 2 is behind 1"
    here[1] = True
    assert [report.step for report in reports.take(wait=False)] == [1, 2]
    (last,) = reports.take(wait=True)
    assert (last.losses, last.grad_norm, last.image_ids) == ({"a": 3.0, "b": 0.5}, 2.0, (3,))
    assert list(reports.take(wait=True)) == [] and waited == [0, 1, 2, 3]


def test_learning_rates_that_are_tensors_are_filled_where_they_are():
    step = make_step()
    groups = step.optimizer.param_groups
    for group in groups:
        group["lr"] = torch.tensor(group["lr"])
    places = [group["lr"] for group in groups]
    with forbid_host_reads():
        set_lr(step.optimizer, 0.25)
    assert all(group["lr"] is place for group, place in zip(groups, places, strict=True))
    torch.testing.assert_close(torch.stack(places), torch.full((len(groups),), 0.25 * 1e-3))


def test_an_optimizer_keeps_its_own_options_and_takes_the_moments():
    source, target = make_step(), make_step()
    for seed in range(2):
        source(source.model.prepare(*sample(seed)))
    state = source.optimizer.state_dict()
    for group in state["param_groups"]:  # of a run on a GPU, before the fused kernels
        group.update(lr=torch.tensor(5.0), base_lr=5.0, fused=None, capturable=True, weight_decay=0.0)
    load_optimizer(target.optimizer, state)
    for group in target.optimizer.param_groups:
        assert (group["lr"], group["base_lr"], group["weight_decay"]) == (1e-3, 1e-3, 0.1)
        assert group["fused"] is True and group["capturable"] is False
    moments = [value for values in source.optimizer.state.values() for value in values.values()]
    loaded = [value for values in target.optimizer.state.values() for value in values.values()]
    assert_equal(moments, loaded)


def test_moments_of_other_parameters_are_refused():
    state = make_step().optimizer.state_dict()
    with pytest.raises(ValueError, match="another set of parameters"):
        load_optimizer(make_step(num_stages=1).optimizer, state)
