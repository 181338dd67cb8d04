"""The training loop."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_rcnn.data.augment import SmallDataTransform
from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.data.health import check_data
from sparse_rcnn.data.loader import train_batches
from sparse_rcnn.data.transforms import TrainTransform
from sparse_rcnn.engine.build import build_model
from sparse_rcnn.engine.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from sparse_rcnn.engine.evaluator import evaluate
from sparse_rcnn.engine.logging import Meter, RunLog
from sparse_rcnn.engine.optimizer import build_optimizer, lr_factor, set_lr
from sparse_rcnn.models import SparseRCNN, SparseRCNNConfig
from sparse_rcnn.runtime import pick_device

# The paper's multi-scale training and crops are for a test size of 800; other test sizes scale them.
_PAPER_TEST_SIZE = 800
_PAPER_MIN_SIZES = range(480, 801, 32)
_PAPER_CROP = (384, 600)


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is good."""


def _option(default: Any, text: str) -> Any:
    if isinstance(default, dict):
        return dataclass_field(default_factory=lambda: dict(default), metadata={"help": text})
    return dataclass_field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines a training run; the flags of ``python -m sparse_rcnn.train`` are these fields.

    ``lr`` is for the given ``batch_size`` and is never scaled by itself. The paper's recipe is 2.5e-5 for batches of
    16, 270,000 steps, decay at 210,000 and 250,000; for batches of B start from 2.5e-5 * B / 16 when fine-tuning, and
    from more for a small model trained from scratch.

    Raises:
        ValueError: a field has a value that no run can be made from.
    """

    data: str = dataclass_field(metadata={"help": "folder or file to train on: COCO, YOLO or Pascal VOC"})
    output: str = dataclass_field(metadata={"help": "folder for checkpoints, models and the log"})
    val: str | None = _option(None, "folder or file to evaluate on")
    preset: str = _option("small", "model configuration (see SparseRCNNConfig.preset)")
    weights: str | None = _option(None, "model to fine-tune instead of a preset; other classes get a new class layer")
    backbone: str | None = _option(None, "resnet18/34/50/101 or a timm name, instead of the preset's")
    backbone_weights: str = _option("auto", "auto (ImageNet weights, if a package has them), none, or a file")
    set: dict[str, Any] = _option({}, "fields of SparseRCNNConfig, as in num_proposals=50 min_size=256")
    steps: int = _option(10_000, "optimizer steps")
    batch_size: int = _option(2, "images a step")
    lr: float = _option(1e-4, "learning rate after warm-up; not scaled with the batch size")
    backbone_lr_factor: float = _option(1.0, "multiplies lr for the backbone's body")
    weight_decay: float = _option(1e-4, "decoupled weight decay, on every parameter")
    warmup_steps: int = _option(1000, "steps of linear warm-up")
    warmup_factor: float = _option(0.01, "part of lr that warm-up starts from")
    decay_steps: tuple[int, ...] = _option((), "steps at which lr falls to a tenth")
    clip_norm: float = _option(1.0, "largest gradient norm of the full model")
    flip: float = _option(0.5, "probability of a horizontal flip")
    crop: bool = _option(False, "random crops before resizing in half of the images, as in the 300-proposal recipe")
    min_sizes: tuple[int, ...] | None = _option(None, "shorter sides to draw from; default 0.6 to 1 of the test size")
    max_size: int | None = _option(None, "largest longer side; default that of the test size")
    seed: int = _option(0, "seed of initialisation, data order and augmentation")
    augment: str = _option("paper", "paper (flip, multi-scale, and crop if asked for) or small, for few images")
    group_shapes: bool = _option(False, "batches of wide images and batches of tall ones, which need less padding")
    workers: int = _option(0, "loader processes")
    cache_mb: int = _option(0, "megabytes of decoded images to keep in memory, which the workers share")
    strict: bool = _option(False, "decode every image before the first step, and refuse data with any problem")
    log_every: int = _option(20, "steps between log records")
    eval_every: int = _option(1000, "steps between evaluations on val; 0 is at the end only")
    checkpoint_every: int = _option(500, "steps between checkpoints; 0 is at the end only")
    time_limit: float | None = _option(None, "minutes after which to stop with a checkpoint")
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = _option("float32", "float32, or bfloat16 for autocast")
    resume: bool = _option(False, "continue from last.pt in the output folder")

    def __post_init__(self) -> None:
        for name in ("decay_steps", "min_sizes"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise ValueError(f"{name}: expected at least {minimum}, got {value}")
        for name in ("lr", "clip_norm"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.flip > 1:
            raise ValueError(f"flip: expected a probability, got {self.flip}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        if self.augment not in ("paper", "small"):
            raise ValueError(f"augment: expected paper or small, got {self.augment!r}")
        if self.augment == "small" and self.crop:
            raise ValueError("crop: expected False with augment small, which has crops of its own")
        if self.min_sizes is not None and (not self.min_sizes or min(self.min_sizes) < 1):
            raise ValueError(f"min_sizes: expected positive sizes, got {self.min_sizes}")


_MINIMUM = {
    **{"steps": 1, "batch_size": 1, "max_size": 1, "backbone_lr_factor": 0, "weight_decay": 0, "warmup_steps": 0},
    **{"warmup_factor": 0, "flip": 0, "workers": 0, "log_every": 1, "eval_every": 0, "checkpoint_every": 0},
    **{"time_limit": 0, "cache_mb": 0},
}


class Trainer:
    """Builds a run from its configuration, and runs it.

    In ``config.output``: ``last.pt`` (exact resume), ``model/`` (the same weights for ``from_pretrained``), ``best/``
    (the weights of the best validation AP) and ``log.jsonl``.

    Raises:
        ValueError: a value of the configuration, the data set or the checkpoint cannot be used.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        self.checkpoint_path = self.output / "last.pt"
        if self.checkpoint_path.exists() and not config.resume:
            raise ValueError(f"output: {self.checkpoint_path} exists; pass --resume, or choose another folder")
        checkpoint = load_checkpoint(self.checkpoint_path) if config.resume else None
        torch.manual_seed(config.seed)
        self.device = pick_device(config.device)
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
        self.data_report = check_data(
            self.dataset, model.config.num_proposals, network, self.val_dataset, decode=config.strict
        )
        self.dataset = self.dataset.without(self.data_report.unreadable)
        if len(self.dataset) == 0:
            why = "; ".join(self.data_report.problems[:5])
            raise ValueError(
                f"data: expected at least one image, got none in {self.dataset.source}" + (f": {why}" if why else "")
            )
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.model, config.lr, config.backbone_lr_factor, config.weight_decay)
        if checkpoint is not None:
            self._restore(checkpoint)
        self.output.mkdir(parents=True, exist_ok=True)
        self.data_report.write(self.output / "data_report.txt")
        if config.strict:
            self.data_report.require_clean()

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        base_lrs = [group["base_lr"] for group in self.optimizer.param_groups]
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group, base_lr in zip(self.optimizer.param_groups, base_lrs, strict=True):
            group["base_lr"], group["weight_decay"] = base_lr, self.config.weight_decay
        self.step, self.best_ap = checkpoint["step"], checkpoint["best_ap"]
        set_rng_state(checkpoint["rng"])

    def run(self) -> int | None:
        """Train until the last step, the time limit, SIGTERM or SIGINT; each ends with a checkpoint.

        Returns:
            The number of the signal that ended it, or None.

        Raises:
            TrainingError: a loss or the gradient is not finite. Nothing is written.
            ImageError: a training image cannot be decoded.
            OSError: a checkpoint cannot be written; the one before it is complete.
        """
        config = self.config
        with RunLog(self.output / "log.jsonl", self.step, config.steps) as log, _Stop(config.time_limit) as stop:
            for line in self.notes + self.data_report.short(self.output / "data_report.txt"):
                log.say(line)
            meter = Meter()
            self.model.train()
            for images, targets in islice(self._batches(), max(config.steps - self.step, 0)):
                losses, grad_norm = self.train_step(images, targets)
                meter.add(losses, grad_norm, len(images))
                log.advance()
                last, stopping = self.step == config.steps, stop.requested
                if last or self.step % config.log_every == 0:
                    log.training({"step": self.step, "lr": self.optimizer.param_groups[-1]["lr"], **meter.flush()})
                with meter.paused():
                    if self.val_dataset is not None and (last or _every(config.eval_every, self.step)):
                        self._validate(log)
                    if last or stopping or _every(config.checkpoint_every, self.step):
                        self.save()
                if stopping:
                    log.say(f"stopped after step {self.step} ({stop.reason}); continue with --resume")
                    break
        return stop.signal

    def train_step(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> tuple[dict[str, float], float]:
        """One optimizer step.

        Args:
            images: CHW images at network size.
            targets: a dict of ``boxes`` [M, 4], ``labels`` [M] and ``image_id`` an image.

        Returns:
            The weighted losses, and the gradient norm before clipping.
        """
        config = self.config
        set_lr(self.optimizer, lr_factor(self.step, config.warmup_steps, config.warmup_factor, config.decay_steps))
        images = [image.to(self.device, non_blocking=True) for image in images]
        inputs = [{key: target[key] for key in ("boxes", "labels")} for target in targets]  # packed, then moved
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            losses = self._forward(images, inputs, targets)
        values = dict(zip(losses, torch.stack([loss.detach() for loss in losses.values()]).tolist(), strict=True))
        self._check_finite(values, targets)
        sum(losses.values()).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm))
        self._check_finite({"gradient norm": norm}, targets)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return values, norm

    def save(self) -> None:
        """Write ``last.pt`` and ``model/``."""
        save_checkpoint(
            self.checkpoint_path,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "best_ap": self.best_ap,
                "rng": rng_state(),
                "model_config": self.model.config.to_dict(),
                "train_config": dataclasses.asdict(self.config),
            },
        )
        self.model.save_pretrained(self.output / "model")

    def _batches(self) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
        config, test = self.config, self.model.config
        scale = test.min_size / _PAPER_TEST_SIZE
        min_sizes = config.min_sizes or tuple(round(size * scale) for size in _PAPER_MIN_SIZES)
        crop = tuple(round(size * scale) for size in _PAPER_CROP) if config.crop else None
        transform = TrainTransform(min_sizes, config.max_size or test.max_size, flip=config.flip, crop=crop)
        if config.augment == "small":
            transform = SmallDataTransform(min_sizes, config.max_size or test.max_size, flip=config.flip)
        batches = train_batches(
            *(self.dataset, transform, config.batch_size, config.seed, self.step, config.workers),
            group_shapes=config.group_shapes,
        )
        while True:
            # A DataLoader draws a seed when it starts: a resumed run would start from another state of the generator.
            with torch.random.fork_rng(devices=[]):
                batch = next(batches)
            yield batch

    def _validate(self, log: RunLog) -> None:
        start = time.monotonic()
        result = evaluate(self.model, self.val_dataset, dtype=self.config.dtype, progress=True)
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
            self.model.save_pretrained(self.output / "best")

    def _forward(self, images: list[Tensor], inputs: list[dict[str, Tensor]], targets: Any) -> dict[str, Tensor]:
        try:
            return self.model(images, inputs)
        except ValueError as error:  # predictions that are not finite cannot be matched, so there is no loss to see
            raise self._error(f"the losses cannot be computed ({error})", targets) from error

    def _check_finite(self, values: dict[str, float], targets: Sequence[dict[str, Any]]) -> None:
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise self._error(", ".join(bad), targets)

    def _error(self, what: str, targets: Sequence[dict[str, Any]]) -> TrainingError:
        ids = ", ".join(str(int(target["image_id"])) for target in targets)
        kept = f"{self.checkpoint_path} is as it was" if self.checkpoint_path.exists() else "there is no checkpoint yet"
        return TrainingError(
            f"step {self.step + 1}, image ids {ids}: {what}; {kept}. A lower lr or a longer warm-up may help"
        )


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


class _Stop:
    """Turns SIGTERM, SIGINT and a time limit into a request to stop after the step; the second signal is not held."""

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
        signal.signal(number, self.previous[number])
