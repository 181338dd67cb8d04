"""One training step that reads nothing on the host, and the host's late look at what it reported."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_rcnn.engine import distributed
from sparse_rcnn.engine.optimizer import in_official_order
from sparse_rcnn.models.batch import Batch

# Steps that are not finite before a run is given up. One that has diverged has them in a row; a bad image or an
# overflow now and then should not end a long run, but many of them are a fault that somebody should look at.
MAX_SKIPPED_IN_A_ROW = 5
MAX_SKIPPED = 20


class TrainStep:
    """Forward, losses, backward, clipping and update, all queued on the device without waiting for any of it.

    A step can be of several micro-batches, and of several processes. Where the targets of each know the counts of the
    whole step (``PackedTargets.step_counts``), its losses and gradient are those of all its images together.

    A step whose losses or gradient are not finite changes neither parameters nor optimizer, its step count included,
    and is counted. The host finds out some steps later.

    Args:
        model: gives the weighted losses of a :class:`Batch` in training mode.
        optimizer: of :func:`~sparse_rcnn.engine.optimizer.build_optimizer`, over the model's parameters.
        clip_norm: largest gradient norm of the full model.
        bfloat16: compute the losses under autocast.

    Attributes:
        names: of the losses.
        report: [len(names) + 3], the losses of the last step, its gradient norm before clipping, and ``skipped``, in
            all processes the same. One tensor for all steps, as a captured one needs it; None before the first.
        own_losses: [len(names)], what this process had of the losses; None where there is no other.
        bad: scalar, 1 if the last step was not finite, else 0.
        skipped: [2], steps skipped in a row, up to the last one, and altogether.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float, bfloat16: bool = False
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.clip_norm, self.bfloat16 = clip_norm, bfloat16
        self.parameters = in_official_order(model)
        self.device = self.parameters[0].device
        self.names: tuple[str, ...] = ()
        self.report: Tensor | None = None
        self.own_losses: Tensor | None = None
        # With the loss of the last stage alone, the other stages' predictions learn nothing.
        self.replica = distributed.replicate(model, unused_parameters=not model.criterion.deep_supervision)
        self.bad = torch.zeros((), device=self.device)
        self.skipped = torch.zeros(2, device=self.device)
        self.fused = optimizer.defaults["fused"]
        if self.fused:
            optimizer.found_inf = self.bad  # read by the fused kernels, as they read that of torch.amp

    def __call__(self, *batches: Batch) -> None:
        """Queue one step on ``batches``, which are on the device."""
        losses = self._backward(batches)
        if self.replica is not self.model:
            self.own_losses = losses.clone()
            losses = distributed.mean_(losses)  # so that all processes skip what one must
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        report = torch.cat([losses, norm.unsqueeze(0)])
        self.bad.copy_(report.isfinite().all().logical_not())
        self.skipped.add_(self.bad)
        self.skipped[0].mul_(self.bad)
        if self.fused or not self.bad:  # the plain optimizer, of the reference backend, waits for the device
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.count_update()
        report = torch.cat([report, self.skipped])
        if self.report is None:
            self.report = torch.empty_like(report)
        self.report.copy_(report)

    def _backward(self, batches: Sequence[Batch]) -> Tensor:
        """Leave the gradient of all micro-batches, and processes, in the parameters; this process's losses, summed."""
        total = None
        for batch in batches:
            # The processes add up their gradients in the last backward.
            adding = self.replica is self.model or batch is batches[-1]
            with contextlib.nullcontext() if adding else self.replica.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                    losses = self.replica(batch)
                sum(losses.values()).backward()
            values = torch.stack([loss.detach() for loss in losses.values()])
            total = values if total is None else total + values
        self.names = tuple(losses)
        return total

    def count_update(self) -> None:
        """Raise the parameters' versions, by which others see that they were written to: the fused kernels do not."""
        torch.autograd.graph.increment_version(self.parameters)


@dataclass(frozen=True)
class Report:
    """What one step said.

    Attributes:
        step: its number, from 1.
        image_ids: of its batch; of several processes those of this one, but where something is not finite, of the ones
            whose losses are not (or of all, where all losses are finite and the gradient is not).
        losses: the weighted losses by name.
        grad_norm: the gradient norm before clipping.
        skipped_in_a_row: steps that were not finite in a row, up to this one; 0 if this one was.
        skipped: those of the whole run so far.
    """

    step: int
    image_ids: tuple[int, ...]
    losses: dict[str, float]
    grad_norm: float
    skipped_in_a_row: int = 0
    skipped: int = 0

    @property
    def problem(self) -> str | None:
        """What is not finite, in words: the losses, or the gradient that finite losses gave."""
        bad = [f"{name} is {value}" for name, value in self.losses.items() if not math.isfinite(value)]
        if not bad and not math.isfinite(self.grad_norm):
            bad = [f"gradient norm is {self.grad_norm}"]
        return ", ".join(bad) or None

    @property
    def too_many(self) -> bool:
        """Whether so many steps were skipped that the run should end."""
        return self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW or self.skipped >= MAX_SKIPPED

    def __str__(self) -> str:
        ids = ", ".join(str(image_id) for image_id in self.image_ids)
        return f"step {self.step}, image ids {ids}"


class Reports:
    """The reports of the last steps, on their way to the host.

    Of several processes all must take them at the same steps: what is found there is agreed upon.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, tuple[int, ...], tuple[str, ...], Tensor, Any]] = deque()

    def add(self, step: int, image_ids: Sequence[int], source: TrainStep) -> None:
        """Send what ``source`` last reported to the host, behind the work that makes it."""
        values = source.report if source.own_losses is None else torch.cat([source.report, source.own_losses])
        host, arrival = to_host(values)
        self._waiting.append((step, tuple(image_ids), source.names, host, arrival))

    def take(self, wait: bool) -> Iterator[Report]:
        """Those that have arrived, in order (of several processes none: it may differ); with ``wait``, all."""
        while self._waiting and (wait or distributed.world_size() == 1 and self._waiting[0][-1].query()):
            step, image_ids, names, host, arrival = self._waiting.popleft()
            arrival.synchronize()
            values = host.tolist()
            (norm, in_a_row, skipped, *own), losses = values[len(names) :], values[: len(names)]
            losses = dict(zip(names, losses, strict=True))
            report = Report(step, image_ids, losses, norm, int(in_a_row), int(skipped))
            yield report if report.problem is None else _of_the_culprits(report, all(map(math.isfinite, own)))


def _of_the_culprits(report: Report, innocent: bool) -> Report:
    """``report`` with the images of the processes that are not innocent, or of all if all say that they are."""
    everyone = distributed.gather((innocent, report.image_ids))
    culprits = [image_ids for innocent, image_ids in everyone if not innocent]
    image_ids = [image_id for ids in culprits or [ids for _, ids in everyone] for image_id in ids]
    return dataclasses.replace(report, image_ids=tuple(image_ids))


def to_host(values: Tensor) -> tuple[Tensor, Any]:
    """Queue a copy of ``values`` to the host; its ``Event`` tells when the copy may be read."""
    if values.is_cuda:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(values.device))
        return host, event
    return values.clone(), _Arrived()


class _Arrived:
    """What a CUDA event is to a copy that is not queued."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass
