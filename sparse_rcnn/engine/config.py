"""The configuration of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any


def _option(default: Any, text: str) -> Any:
    if isinstance(default, dict):
        return dataclass_field(default_factory=lambda: dict(default), metadata={"help": text})
    return dataclass_field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines a training run; the flags of ``python -m sparse_rcnn.train`` are these fields.

    ``batch_size`` counts the images of an optimizer step, whatever number of processes and micro-batches they are
    divided among: neither changes what is trained.

    A recipe states ``base_lr`` for a batch of ``base_batch`` images, ``epochs``, and the parts ``decay_at`` of the run
    after which the learning rate falls; :func:`~sparse_rcnn.engine.schedule.resolve` makes ``lr``, ``steps`` and
    ``decay_steps`` of them. Those three are taken as they are where they are given.

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
    epochs: float = _option(36.0, "passes over the data")
    steps: int | None = _option(None, "optimizer steps, instead of epochs")
    batch_size: int = _option(2, "images a step, of all processes and micro-batches together")
    accumulate: int = _option(1, "micro-batches, one after the other, that a process divides its images of a step into")
    base_lr: float | None = _option(
        None,
        "learning rate after warm-up for batches of base_batch images, in proportion for others; default 2.5e-5 "
        "for models as wide as the paper's, 8e-4 for narrower ones",
    )
    base_batch: int = _option(16, "images that base_lr is for")
    lr: float | None = _option(None, "learning rate after warm-up, instead of base_lr, for whatever batch")
    backbone_lr_factor: float = _option(1.0, "multiplies lr for the backbone's body")
    weight_decay: float = _option(1e-4, "decoupled weight decay, on every parameter")
    warmup_steps: int = _option(1000, "steps of linear warm-up")
    warmup_factor: float = _option(0.01, "part of lr that warm-up starts from")
    decay_at: tuple[float, ...] = _option((), "parts of the run, 0 to 1, after which lr falls to a tenth")
    decay_steps: tuple[int, ...] | None = _option(None, "steps at which lr falls to a tenth, instead of decay_at")
    clip_norm: float = _option(1.0, "largest gradient norm of the full model")
    ema_decay: float = _option(0.0, "moving average of the weights to evaluate and keep, as 0.9998; 0 is none")
    flip: float = _option(0.5, "probability of a horizontal flip")
    crop: bool = _option(False, "random crops before resizing in half of the images, as in the 300-proposal recipe")
    min_sizes: tuple[int, ...] | None = _option(None, "shorter sides to draw from; default 0.6 to 1 of the test size")
    max_size: int | None = _option(None, "largest longer side; default that of the test size")
    seed: int = _option(0, "seed of initialisation, data order and augmentation")
    augment: str = _option("paper", "paper (flip, multi-scale, crop if asked for), or for few images small or mosaic")
    group_shapes: bool = _option(False, "batches of wide images and batches of tall ones, which need less padding")
    workers: int = _option(0, "loader processes of each training process")
    cache_mb: int = _option(0, "megabytes of decoded images that each training process keeps, which its workers share")
    strict: bool = _option(False, "decode every image before the first step, and refuse data with any problem")
    log_every: int = _option(20, "steps between log records")
    eval_every: int = _option(1000, "steps between evaluations on val; 0 is at the end only")
    checkpoint_every: int = _option(500, "steps between checkpoints; 0 is at the end only")
    keep_every: int = _option(0, "steps between checkpoints that are kept, as step_00005000.pt; 0 keeps none")
    time_limit: float | None = _option(None, "minutes after which to stop with a checkpoint")
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, ...; of several processes each takes a GPU of its own")
    dtype: str = _option("float32", "float32, or bfloat16 for autocast")
    cuda_graph: bool = _option(
        False,
        "replay the step from a CUDA graph for each shape of batch; pads to one of at most 16 lengths a side, and the "
        "network sees that as it does all padding",
    )
    resume: bool = _option(False, "continue from last.pt in the output folder")
    accept_changed_data: bool = _option(False, "resume although the training data is not what the run was started on")

    def __post_init__(self) -> None:
        for name in ("decay_at", "decay_steps", "min_sizes"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise ValueError(f"{name}: expected at least {minimum}, got {value}")
        for name in ("lr", "base_lr", "clip_norm", "epochs"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not all(0 < part <= 1 for part in self.decay_at):
            raise ValueError(f"decay_at: expected parts of the run, above 0 and at most 1, got {self.decay_at}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected at least 0 and below 1, got {self.ema_decay}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size: expected a multiple of accumulate {self.accumulate}, got {self.batch_size}")
        if self.cuda_graph and self.accumulate > 1:
            raise ValueError(f"cuda_graph: expected accumulate 1, got {self.accumulate}")
        if self.flip > 1:
            raise ValueError(f"flip: expected a probability, got {self.flip}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        if self.augment not in ("paper", "small", "mosaic"):
            raise ValueError(f"augment: expected paper, small or mosaic, got {self.augment!r}")
        if self.augment != "paper" and self.crop:
            raise ValueError(f"crop: expected False with augment {self.augment}, which has crops of its own")
        if self.min_sizes is not None and (not self.min_sizes or min(self.min_sizes) < 1):
            raise ValueError(f"min_sizes: expected positive sizes, got {self.min_sizes}")


_MINIMUM = {
    **{"steps": 1, "batch_size": 1, "max_size": 1, "backbone_lr_factor": 0, "weight_decay": 0, "warmup_steps": 0},
    **{"warmup_factor": 0, "flip": 0, "workers": 0, "log_every": 1, "eval_every": 0, "checkpoint_every": 0},
    **{"time_limit": 0, "cache_mb": 0, "keep_every": 0, "base_batch": 1, "accumulate": 1},
}
