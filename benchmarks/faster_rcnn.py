"""The detector any user would compare with: torchvision's Faster R-CNN-FPN on our backbone, data and evaluation.

Everything outside the detector is this package's own: the ImageNet weights of the backbone and its frozen BatchNorm,
the images, their augmentation and order, resizing, and the evaluator. The detector has torchvision's defaults, but for
what its images, smaller than 800 pixels, ask: anchors smaller in proportion and half as many regions; for a pyramid
of 128 channels, with which it has about the size of ours; and for this package's RoIAlign, without torchvision's shift
of half a pixel, and many times as fast on a CPU.
"""

from __future__ import annotations

import math
import signal
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from sparse_rcnn.data.augment import SmallDataTransform
from sparse_rcnn.data.dataset import DetectionDataset
from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.data.loader import train_batches
from sparse_rcnn.data.transforms import TrainTransform
from sparse_rcnn.engine.evaluator import evaluate
from sparse_rcnn.engine.logging import Meter, RunLog
from sparse_rcnn.inference import keep_freed_memory
from sparse_rcnn.models.backbone import STRIDES, BackboneWithFPN, load_backbone_weights
from sparse_rcnn.models.config import SparseRCNNConfig
from sparse_rcnn.ops import multiscale_roi_align
from sparse_rcnn.weights.atomic import atomic_write

_ANCHORS, _ANCHORS_AT = (32, 64, 128, 256, 512), 800  # pixels, where the shorter side has 800
_SCORE_THRESHOLD = 0.01  # torchvision's 0.05 hides detections that AP counts
_WARMUP_STEPS, _WARMUP_FACTOR, _MOMENTUM, _CLIP_NORM = 500, 0.01, 0.9, 10.0
_LAST, _BEST = "peer.pt", "peer_best.pt"


class FasterRCNNPeer(nn.Module):
    """torchvision's Faster R-CNN-FPN behind the contract that the evaluator knows ``SparseRCNN`` by.

    Args:
        config: classes, test size, pixel statistics, backbone and its frozen stages are taken from it.
        channels: of the FPN.
    """

    def __init__(self, config: SparseRCNNConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        std = [value / 255 for value in config.pixel_std]
        mean = [value / 255 for value in config.pixel_mean]
        anchors = tuple((round(size * config.min_size / _ANCHORS_AT),) for size in _ANCHORS)
        self.detector = FasterRCNN(
            _Pyramid(config, channels),
            config.num_classes + 1,  # the first is the background
            rpn_anchor_generator=_Anchors(anchors, ((0.5, 1.0, 2.0),) * len(anchors)),
            rpn_pre_nms_top_n_train=1000,
            rpn_post_nms_top_n_train=1000,
            rpn_pre_nms_top_n_test=1000,
            rpn_post_nms_top_n_test=500,
            box_score_thresh=_SCORE_THRESHOLD,
            box_batch_size_per_image=256,
        )
        self.detector.roi_heads.box_roi_pool = _RoIAlign()
        for predictor in (self.detector.rpn.head, self.detector.roi_heads.box_predictor):
            predictor.register_forward_hook(_in_float32)
        self.detector.transform = _Normalize(config.min_size, config.max_size, mean, std)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None, return_stages: bool = False
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """uint8 images [3, H, W] at network size: the losses in training mode, else detections with labels from 0."""
        images = [image.float() / 255 for image in images]
        if self.training:
            return self.detector(images, [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets])
        return [{**found, "labels": found["labels"] - 1} for found in self.detector(images)]


class _Anchors(AnchorGenerator):
    """torchvision's, in float32 also where the maps are not: it gives them the maps' type."""

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        return super().forward(images, [torch.empty_like(each, dtype=torch.float32) for each in maps])


def _in_float32(_: nn.Module, __: Any, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Predictions under autocast: torchvision gives all boxes their type, and bfloat16 has steps of two pixels."""
    return tuple([each.float() for each in one] if isinstance(one, list) else one.float() for one in outputs)


class _Pyramid(nn.Module):
    """Our backbone with the coarser fifth level that torchvision's RPN has."""

    def __init__(self, config: SparseRCNNConfig, channels: int) -> None:
        super().__init__()
        self.levels = BackboneWithFPN(config.backbone, channels, config.frozen_stages)
        self.out_channels = channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.levels(images.contiguous(memory_format=torch.channels_last))
        named = OrderedDict((str(level), each) for level, each in enumerate(maps))
        named["pool"] = F.max_pool2d(maps[-1], 1, 2)
        return named


class _RoIAlign(nn.Module):
    """The features of each image's regions [Ni, 4], of all images one after the other: [sum of Ni, 49 * channels]."""

    def forward(self, maps: dict[str, Tensor], regions: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> Tensor:
        levels = [maps[str(level)] for level in range(len(STRIDES))]
        padded = nn.utils.rnn.pad_sequence(list(regions), batch_first=True)
        pooled = multiscale_roi_align(levels, padded, STRIDES)
        return torch.cat([each[: len(boxes)] for each, boxes in zip(pooled, regions, strict=True)]).flatten(1)


class _Normalize(GeneralizedRCNNTransform):
    """torchvision's preprocessing without its resize: images come at network size."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, Any]:
        return image, target


class PeerTrainer:
    """Trains the peer on a number of images, in as many sittings as it takes.

    In ``output``: ``peer.pt`` (to continue from), ``peer_best.pt`` (weights of the best validation AP) and
    ``metrics.jsonl``. A run that is started again in the same folder continues, with the settings it began with.

    Args:
        data, val: data sets as ``sparse_rcnn.train`` takes them.
        output: folder.
        settings: ``images``, ``batch_size``, ``lr``, ``optimizer``, ``channels``, ``augment``, ``group_shapes``,
            ``frozen_stages``, ``min_size``, ``max_size``, ``train_min_sizes``, ``train_max_size``, ``seed``, ``dtype``
            (float32, or bfloat16 for autocast); of a run that continues, those of its checkpoint.
        cache_mb: as of ``sparse_rcnn.train``.
    """

    def __init__(self, data: str, val: str, output: str | Path, settings: dict[str, Any], cache_mb: int = 0) -> None:
        self.output = Path(output)
        checkpoint = None
        if (self.output / _LAST).exists():
            checkpoint = torch.load(self.output / _LAST, map_location="cpu", weights_only=True)
            settings = checkpoint["settings"]
        self.settings, self.step, self.best_ap = settings, 0, -1.0
        torch.manual_seed(settings["seed"])
        self.dataset = open_dataset(data, "train", cache_mb=cache_mb)
        self.val: DetectionDataset = open_dataset(val, "valid", self.dataset.class_names)
        self.model = build_peer(settings, self.dataset.class_names)
        if checkpoint is None:
            load_backbone_weights(self.model.detector.backbone.levels)
        self.optimizer = _optimizer(self.model, settings)
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.step, self.best_ap = checkpoint["step"], checkpoint["best_ap"]
            torch.set_rng_state(checkpoint["rng"])
        self.steps = math.ceil(settings["images"] / settings["batch_size"])
        self.output.mkdir(parents=True, exist_ok=True)

    def run(self, minutes: float | None, eval_every: int, checkpoint_every: int, log_every: int) -> bool:
        """Train until all images were seen (True), or the time is over or SIGTERM came (False); ends with a save."""
        deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        stop: list[int] = []
        previous = {n: signal.signal(n, lambda number, _: stop.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
        keep_freed_memory()
        try:
            with RunLog(self.output, self.step, self.steps) as log:
                meter = Meter()
                for images, targets in islice(self._batches(), self.steps - self.step):
                    losses, norm = self.train_step(images, targets)
                    meter.add(losses, norm, len(images))
                    log.advance()
                    last = self.step == self.steps
                    ending = last or bool(stop) or time.monotonic() >= deadline
                    if last or self.step % log_every == 0:
                        log.training({"step": self.step, "lr": self.optimizer.param_groups[0]["lr"], **meter.flush()})
                    with meter.paused():
                        if last or self.step % eval_every == 0:
                            self._validate(log)
                        if ending or self.step % checkpoint_every == 0:
                            self._save()
                    if ending:
                        break
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.step == self.steps

    def train_step(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> tuple[dict[str, float], float]:
        """One update; returns the losses and the norm of the gradient before clipping."""
        factor = lr_factor(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["lr"] * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings["dtype"] == "bfloat16"):
            losses = self.model.train()(images, targets)
        sum(losses.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)
        if not norm.isfinite():
            raise RuntimeError(f"step {self.step + 1}: the gradient is not finite; {_LAST} is as it was")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {name: value.item() for name, value in losses.items()}, norm.item()

    def _batches(self) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
        settings = self.settings
        sizes = settings["train_min_sizes"], settings["train_max_size"]
        transform = TrainTransform(*sizes, flip=0.5)
        if settings["augment"] != "paper":
            transform = SmallDataTransform(*sizes, 0.5, self.dataset if settings["augment"] == "mosaic" else None)
        batches = train_batches(
            *(self.dataset, transform, settings["batch_size"], settings["seed"], self.step),
            group_shapes=settings["group_shapes"],
        )
        while True:
            with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed when it starts
                batch = next(batches)
            yield batch

    def _validate(self, log: RunLog) -> None:
        start = time.monotonic()
        result = evaluate(self.model, self.val, progress=True)
        per_class = {name: values["AP"] for name, values in result.per_class.items()}
        seconds = round(time.monotonic() - start, 2)
        record = {"kind": "val", "step": self.step, **result.metrics, "per_class": per_class, "seconds": seconds}
        log.record(record)
        log.say(f"step {self.step}  validation AP {result.metrics['AP']:.4f}  AP50 {result.metrics['AP50']:.4f}")
        if result.metrics["AP"] > self.best_ap:
            self.best_ap = result.metrics["AP"]
            _write(self.output / _BEST, {"settings": self.settings, "model": self.model.state_dict()})

    def _save(self) -> None:
        state = {"settings": self.settings, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        progress = {"step": self.step, "best_ap": self.best_ap, "rng": torch.get_rng_state()}
        _write(self.output / _LAST, {**state, **progress})


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to 0 at the last of ``steps``."""
    warmup = min(_WARMUP_STEPS, steps // 4)
    if step < warmup:
        return _WARMUP_FACTOR + (1 - _WARMUP_FACTOR) * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def build_peer(settings: dict[str, Any], class_names: Sequence[str]) -> FasterRCNNPeer:
    """The model of a run's settings, with random weights."""
    taken = {name: settings[name] for name in ("min_size", "max_size", "frozen_stages")}
    classes = {"num_classes": len(class_names), "class_names": tuple(class_names)}
    peer = FasterRCNNPeer(SparseRCNNConfig.preset("small", **taken, **classes), settings["channels"])
    return peer.to(memory_format=torch.channels_last)


def load_peer(output: str | Path, class_names: Sequence[str]) -> FasterRCNNPeer:
    """The best model of a run of :class:`PeerTrainer`."""
    saved = torch.load(Path(output) / _BEST, map_location="cpu", weights_only=True)
    peer = build_peer(saved["settings"], class_names)
    peer.load_state_dict(saved["model"])
    return peer


def peer_batch_size(output: str | Path) -> int:
    """Images a step of a run of :class:`PeerTrainer`."""
    return torch.load(Path(output) / _BEST, map_location="cpu", weights_only=True, mmap=True)["settings"]["batch_size"]


def _optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings["optimizer"] == "adamw":
        return torch.optim.AdamW(parameters, settings["lr"], weight_decay=1e-4, fused=True)
    return torch.optim.SGD(parameters, settings["lr"], momentum=_MOMENTUM, weight_decay=1e-4, fused=True)


def _write(path: Path, state: dict[str, Any]) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)
