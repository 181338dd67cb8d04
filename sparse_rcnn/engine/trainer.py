"""The training loop."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_rcnn.cuda_capture import CudaCapture
from sparse_rcnn.data.augment import SmallDataTransform
from sparse_rcnn.data.fingerprint import changes, fingerprint
from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.data.health import check_data
from sparse_rcnn.data.loader import lost_workers, train_batches
from sparse_rcnn.data.transforms import TrainTransform
from sparse_rcnn.engine import distributed
from sparse_rcnn.engine.build import build_model
from sparse_rcnn.engine.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from sparse_rcnn.engine.config import TrainConfig
from sparse_rcnn.engine.cuda_graph import GraphedStep, ShapeBuckets, refusal
from sparse_rcnn.engine.ema import build_ema
from sparse_rcnn.engine.evaluator import evaluate
from sparse_rcnn.engine.logging import Meter, NoLog, RunLog
from sparse_rcnn.engine.micro_batches import prepare_step
from sparse_rcnn.engine.optimizer import build_optimizer, load_optimizer, lr_factor, set_lr
from sparse_rcnn.engine.schedule import resolve
from sparse_rcnn.engine.step import MAX_SKIPPED_IN_A_ROW, Report, Reports, TrainStep
from sparse_rcnn.inference.memory import keep_freed_memory
from sparse_rcnn.models import SparseRCNN, SparseRCNNConfig
from sparse_rcnn.ops._library import is_reference
from sparse_rcnn.runtime import pick_device
from sparse_rcnn.weights.atomic import remove_leftovers
from sparse_rcnn.weights.check import check_state_dict

# The paper's multi-scale training and crops are for a test size of 800; other test sizes scale them.
_PAPER_TEST_SIZE = 800
_PAPER_MIN_SIZES = range(480, 801, 32)
_PAPER_CROP = (384, 600)


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is good."""


class Trainer:
    """Builds a run from its configuration, and runs it.

    Of several processes (:func:`sparse_rcnn.engine.distributed.start`) each has one, and a part of every batch; the
    first writes and says what there is.

    In ``config.output``: ``last.pt`` (exact resume), ``model/`` (the same weights, or their moving average where there
    is one, for ``from_pretrained``), ``best/`` (those of the best validation AP), ``step_00005000.pt`` (checkpoints
    that are kept) and ``metrics.jsonl``.

    Attributes:
        given: the configuration as it was given, which the checkpoint keeps and a resumed run resolves again.
        config: with numbers for the learning rate and the steps, see :func:`resolve`.

    Raises:
        ValueError: a value of the configuration, the data set or the checkpoint cannot be used.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.given = config
        self.output = Path(config.output)
        self.checkpoint_path = self.output / "last.pt"
        if self.checkpoint_path.exists() and not config.resume:
            raise ValueError(f"output: {self.checkpoint_path} exists; pass --resume, or choose another folder")
        checkpoint = load_checkpoint(self.checkpoint_path) if config.resume else None
        torch.manual_seed(config.seed)
        self.device = pick_device(distributed.own_device(config.device))
        self.processes = distributed.world_size()
        if config.batch_size % (self.processes * config.accumulate):
            raise ValueError(
                f"batch_size: expected a multiple of {self.processes * config.accumulate} ({self.processes} processes "
                f"of {config.accumulate} micro-batches), got {config.batch_size}"
            )
        if config.cuda_graph and (reason := refusal(self.device)):
            raise ValueError(f"cuda_graph: {reason}")
        self.step, self.best_ap = 0, -1.0
        self.notes: list[str] = []

        if checkpoint is None:
            self.dataset = open_dataset(config.data, "train", cache_mb=config.cache_mb)
            model, self.notes = build_model(config, self.dataset.class_names)
        else:
            model = SparseRCNN(SparseRCNNConfig.from_dict(checkpoint["model_config"]))
            self.dataset = open_dataset(config.data, "train", model.config.class_names, config.cache_mb)
        self.val_dataset = None
        if config.val is not None:
            self.val_dataset = open_dataset(config.val, "valid", model.config.class_names)
        network = model.config.min_size, model.config.max_size
        self.data_report = distributed.from_main(
            lambda: check_data(
                self.dataset, model.config.num_proposals, network, self.val_dataset, decode=config.strict
            )
        )
        self.dataset = self.dataset.without(self.data_report.unreadable)
        if len(self.dataset) == 0:
            why = "; ".join(self.data_report.problems[:5])
            raise ValueError(
                f"data: expected at least one image, got none in {self.dataset.source}" + (f": {why}" if why else "")
            )
        config, notes = resolve(config, model.config, len(self.dataset))
        self.config, self.notes = config, self.notes + notes
        self.data_fingerprint = distributed.from_main(lambda: fingerprint(self.dataset))
        if checkpoint is not None:
            self._check_data(checkpoint["data"])
            check_state_dict(model.config, checkpoint["model"], self.checkpoint_path)
        if self.device.type == "cpu":
            keep_freed_memory()
        layout = torch.contiguous_format if is_reference() else torch.channels_last
        self.model = model.to(self.device, memory_format=layout)
        self.optimizer = build_optimizer(self.model, config.lr, config.backbone_lr_factor, config.weight_decay)
        self.plain_step = TrainStep(self.model, self.optimizer, config.clip_norm, config.dtype == "bfloat16")
        if checkpoint is not None:
            self._restore(checkpoint)
        self.ema = build_ema(self.model, config.ema_decay, (checkpoint or {}).get("ema"))
        self.graphed_step, self.buckets = None, None
        if config.cuda_graph:
            self.graphed_step = GraphedStep(self.plain_step, CudaCapture(self.device), RunLog.say)
            self.buckets = ShapeBuckets(config.max_size or self.model.config.max_size)
        self.reports = Reports()
        self.skips: deque[Report] = deque(maxlen=MAX_SKIPPED_IN_A_ROW)  # the last that were not finite
        if distributed.is_main():
            self.output.mkdir(parents=True, exist_ok=True)
            for folder in (self.output, self.output / "model", self.output / "best"):
                remove_leftovers(folder)
            self.data_report.write(self.output / "data_report.txt")
        if config.strict:
            self.data_report.require_clean()

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        self.model.load_state_dict(checkpoint["model"])
        load_optimizer(self.optimizer, checkpoint["optimizer"])
        self.step, self.best_ap = checkpoint["step"], checkpoint["best_ap"]
        self.plain_step.skipped.copy_(torch.tensor(checkpoint["skipped"]))
        set_rng_state(checkpoint["rng"])

    def _check_data(self, then: dict[str, Any]) -> None:
        found = "; ".join(changes(then, self.data_fingerprint))
        if found and not self.config.accept_changed_data:
            raise ValueError(
                f"data: {self.dataset.source} is not what the run was started on: {found}. Put it back, or go on with "
                "it by --accept-changed-data"
            )
        if found:
            self.notes.append(f"the data is not what the run was started on: {found}")

    @property
    def eval_model(self) -> SparseRCNN:
        """What is evaluated and kept: the moving average of the model, or without one the model."""
        return self.model if self.ema is None else self.ema.module

    def run(self) -> int | None:
        """Train until the last step, the time limit, SIGTERM or SIGINT; each ends with a checkpoint.

        Returns:
            The number of the signal that ended it, or None.

        Raises:
            TrainingError: too many steps were not finite (each is skipped), or the model refuses its targets.
            ImageError: a training image cannot be decoded.
            LoaderError: a loader process died.
            OSError: a checkpoint cannot be written; the one before it is complete.
        """
        config = self.config
        log = NoLog()
        if distributed.is_main():
            log = RunLog(self.output, self.step, config.steps)
        with log, _Stop(config.time_limit) as stop, lost_workers():
            for line in self.notes + self.data_report.short(self.output / "data_report.txt"):
                log.say(line)
            if config.resume:  # a kill may have come after last.pt and before this
                self.save_model()
            meter = Meter()
            self.model.train()
            for images, targets in islice(self._batches(), max(config.steps - self.step, 0)):
                self.train_step(images, targets)
                log.advance()
                last, stopping = self.step == config.steps, distributed.any_of(stop.requested)
                logging = last or self.step % config.log_every == 0
                validating = self.val_dataset is not None and (last or _every(config.eval_every, self.step))
                keeping = _every(config.keep_every, self.step)
                saving = last or stopping or keeping or _every(config.checkpoint_every, self.step)
                # The host looks back at what there is, and waits for all of it only before it needs to be sure.
                for report in self.reports.take(wait=logging or validating or saving):
                    if report.problem is not None:
                        self._skipped(report, log)
                    else:
                        meter.add(report.losses, report.grad_norm, config.batch_size)
                if logging and meter.steps:
                    log.training({"step": self.step, "lr": self.lr, **meter.flush()})
                with meter.paused():
                    if validating:
                        self._validate(log)
                    if saving:
                        self.save(keeping)
                if stopping:
                    log.say(f"stopped after step {self.step} ({stop.reason}); continue with --resume")
                    break
        return stop.signal

    def train_step(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> None:
        """Queue one optimizer step, whose losses come to ``reports``.

        Args:
            images: CHW images at network size, this process's of the step.
            targets: a dict of ``boxes`` [M, 4], ``labels`` [M] and ``image_id`` an image.

        Raises:
            TrainingError: images or targets are not what the model takes.
        """
        config = self.config
        image_ids = [int(target["image_id"]) for target in targets]
        shape = None if self.buckets is None else self.buckets.shape(images, targets)
        try:
            batches = prepare_step(self.model, images, targets, config.accumulate, shape)
        except (TypeError, ValueError) as error:
            raise self._error(self.step + 1, image_ids, str(error)) from error
        factor = lr_factor(self.step, config.warmup_steps, config.warmup_factor, config.decay_steps)
        set_lr(self.optimizer, factor)
        self.lr = self.optimizer.param_groups[-1]["base_lr"] * factor
        if self.graphed_step is None:
            self.plain_step(*(batch.to(self.device) for batch in batches))
        else:
            self.graphed_step(*batches)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        self.reports.add(self.step, image_ids, self.plain_step)

    def save(self, keep: bool = False) -> None:
        """Write ``last.pt`` and ``model/``, and with ``keep`` first a checkpoint named by the step, which stays.

        The main process does; the others have nothing to add.
        """
        if not distributed.is_main():
            return
        state = {
            "model": self.model.state_dict(),
            "ema": {} if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best_ap": self.best_ap,
            "skipped": self.plain_step.skipped.tolist(),
            "rng": rng_state(),
            "data": self.data_fingerprint,
            "model_config": self.model.config.to_dict(),
            "train_config": dataclasses.asdict(self.given),
        }
        if keep:  # before last.pt: a run killed in between goes on from before this step, and writes it again
            save_checkpoint(self.output / f"step_{self.step:08d}.pt", state)
        save_checkpoint(self.checkpoint_path, state)
        self.save_model()

    def save_model(self) -> None:
        """Write ``model/``, which :meth:`save` does last."""
        if not distributed.is_main():
            return
        self.eval_model.save_pretrained(self.output / "model")

    def _batches(self) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
        config, test = self.config, self.model.config
        scale = test.min_size / _PAPER_TEST_SIZE
        min_sizes = config.min_sizes or tuple(round(size * scale) for size in _PAPER_MIN_SIZES)
        crop = tuple(round(size * scale) for size in _PAPER_CROP) if config.crop else None
        transform = TrainTransform(min_sizes, config.max_size or test.max_size, flip=config.flip, crop=crop)
        if config.augment != "paper":
            others = self.dataset if config.augment == "mosaic" else None
            transform = SmallDataTransform(min_sizes, config.max_size or test.max_size, config.flip, others)
        batches = train_batches(
            *(self.dataset, transform, config.batch_size, config.seed, self.step, config.workers),
            group_shapes=config.group_shapes,
            share=(distributed.rank(), self.processes),
        )
        while True:
            # A DataLoader draws a seed when it starts: a resumed run would start from another state of the generator.
            with torch.random.fork_rng(devices=[]):
                batch = next(batches)
            yield batch

    def _validate(self, log: RunLog) -> None:
        start = time.monotonic()
        result = evaluate(self.eval_model, self.val_dataset, dtype=self.config.dtype, progress=True)
        log.record(
            {
                "kind": "val",
                "step": self.step,
                **result.metrics,
                "per_class": {name: values["AP"] for name, values in result.per_class.items()},
                "failed": result.failed,
                "seconds": round(time.monotonic() - start, 2),
            }
        )
        best = result.metrics["AP"] > self.best_ap
        log.say(
            f"step {self.step}  validation AP {result.metrics['AP']:.4f}  AP50 {result.metrics['AP50']:.4f}"
            + (f"  (best so far, kept in {self.output / 'best'})" if best else "")
        )
        for line in result.failed + result.notes:
            log.say(f"validation: {line}")
        if best:
            self.best_ap = result.metrics["AP"]
        if best and distributed.is_main():
            self.eval_model.save_pretrained(self.output / "best")

    def _skipped(self, report: Report, log: RunLog) -> None:
        """Say that a step was not finite, and end the run if there were too many."""
        ids = list(report.image_ids)
        log.record({"kind": "skipped", "step": report.step, "image_ids": ids, "problem": report.problem})
        log.say(f"warning: {report}: {report.problem}; the step is skipped")
        self.skips.append(report)
        if report.too_many:
            last = "; ".join(str(skip) for skip in self.skips)
            counts = f"{report.skipped_in_a_row} steps in a row and {report.skipped} in all were not finite"
            advice = f". The last of them: {last}. A lower lr or a longer warm-up may help"
            raise self._error(report.step, report.image_ids, f"{report.problem}; {counts}", advice)

    def _error(self, step: int, image_ids: Sequence[int], what: str, advice: str = "") -> TrainingError:
        ids = ", ".join(str(image_id) for image_id in image_ids)
        kept = f"{self.checkpoint_path} is as it was" if self.checkpoint_path.exists() else "there is no checkpoint yet"
        return TrainingError(f"step {step}, image ids {ids}: {what}; {kept}{advice}")


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


class _Stop:
    """Turns SIGTERM, SIGINT and a time limit into a request to stop after the step; a second SIGINT is not held.

    A second SIGTERM is: what ends a job sends it to all processes, and torchrun passes its own on to them.
    """

    def __init__(self, minutes: float | None) -> None:
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.signal: int | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None or time.monotonic() >= self.deadline

    @property
    def reason(self) -> str:
        return "time limit" if self.signal is None else signal.Signals(self.signal).name

    def __enter__(self) -> _Stop:
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, self.previous[number])
