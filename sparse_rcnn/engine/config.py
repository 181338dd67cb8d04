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
    divided among: neither changes what is trained. ``lr`` is for that size and is never scaled by itself. The paper's
    recipe is 2.5e-5 for batches of 16, 270,000 steps, decay at 210,000 and 250,000; for batches of B start from
    2.5e-5 * B / 16 when fine-tuning, and from more for a small model trained from scratch.

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
    batch_size: int = _option(2, "images a step, of all processes and micro-batches together")
    accumulate: int = _option(1, "micro-batches, one after the other, that a process divides its images of a step into")
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
    workers: int = _option(0, "loader processes of each training process")
    cache_mb: int = _option(0, "megabytes of decoded images that each training process keeps, which its workers share")
    strict: bool = _option(False, "decode every image before the first step, and refuse data with any problem")
    log_every: int = _option(20, "steps between log records")
    eval_every: int = _option(1000, "steps between evaluations on val; 0 is at the end only")
    checkpoint_every: int = _option(500, "steps between checkpoints; 0 is at the end only")
    time_limit: float | None = _option(None, "minutes after which to stop with a checkpoint")
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, ...; of several processes each takes a GPU of its own")
    dtype: str = _option("float32", "float32, or bfloat16 for autocast")
    cuda_graph: bool = _option(
        False,
        "replay the step from a CUDA graph for each shape of batch; pads to one of at most 16 lengths a side, and the "
        "network sees that as it does all padding",
    )
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
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size: expected a multiple of accumulate {self.accumulate}, got {self.batch_size}")
        if self.cuda_graph and self.accumulate > 1:
            raise ValueError(f"cuda_graph: expected accumulate 1, got {self.accumulate}")
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
    **{"time_limit": 0, "cache_mb": 0, "accumulate": 1},
}
