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
from sparse_rcnn.models.batch import Batch


class TrainStep:
    """Forward, losses, backward, clipping and update, all queued on the device without waiting for any of it.

    A step can be of several micro-batches, and of several processes. Where the targets of each know the counts of the
    whole step (``PackedTargets.step_counts``), its losses and gradient are those of all its images together.

    A step whose losses or gradient are not finite changes neither parameters nor optimizer, and nor does any step
    after it: when the host finds out, some steps later, they are what the last good step made of them.

    Args:
        model: gives the weighted losses of a :class:`Batch` in training mode.
        optimizer: of :func:`~sparse_rcnn.engine.optimizer.build_optimizer`, over the model's parameters.
        clip_norm: largest gradient norm of the full model.
        bfloat16: compute the losses under autocast.

    Attributes:
        names: of the losses.
        report: [len(names) + 1], the losses of the last step and its gradient norm before clipping, in all processes
            the same. One tensor for all steps, as a captured one needs it; None before the first.
        own_losses: [len(names)], what this process had of the losses; None where there is no other.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float, bfloat16: bool = False
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.clip_norm, self.bfloat16 = clip_norm, bfloat16
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        self.names: tuple[str, ...] = ()
        self.report: Tensor | None = None
        self.own_losses: Tensor | None = None
        # With the loss of the last stage alone, the other stages' predictions learn nothing.
        self.replica = distributed.replicate(model, unused_parameters=not model.criterion.deep_supervision)
        self.stopped = torch.zeros((), device=self.device)  # 1 from the first step on that was not finite
        optimizer.found_inf = self.stopped  # read by the fused kernels, as they read that of torch.amp

    def __call__(self, *batches: Batch) -> None:
        """Queue one step on ``batches``, which are on the device."""
        losses = self._backward(batches)
        if self.replica is not self.model:
            self.own_losses = losses.clone()
            losses = distributed.mean_(losses)  # so that all processes skip what one must
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        report = torch.cat([losses, norm.unsqueeze(0)])
        self.stopped.logical_or_(report.isfinite().all().logical_not())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.count_update()
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
    """

    step: int
    image_ids: tuple[int, ...]
    losses: dict[str, float]
    grad_norm: float

    @property
    def problem(self) -> str | None:
        """What is not finite, in words: the losses, or the gradient that finite losses gave."""
        bad = [f"{name} is {value}" for name, value in self.losses.items() if not math.isfinite(value)]
        if not bad and not math.isfinite(self.grad_norm):
            bad = [f"gradient norm is {self.grad_norm}"]
        return ", ".join(bad) or None


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
            losses, norm, own = values[: len(names)], values[len(names)], values[len(names) + 1 :]
            report = Report(step, image_ids, dict(zip(names, losses, strict=True)), norm)
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
