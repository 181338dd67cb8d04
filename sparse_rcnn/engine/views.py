"""Detections of an image as it is seen at some size, mirrored or not, after one stage or after each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sparse_rcnn.data.transforms import flip_boxes, network_size, resize
from sparse_rcnn.detections import Detections
from sparse_rcnn.runtime import to_original

_TTA_SCALES = (0.8, 1.0, 1.25)
_TTA_IOU = 0.65


@dataclass(frozen=True)
class View:
    """How the network sees an image: its shortest side, the limit of its longest one, and whether it is mirrored."""

    min_size: int
    max_size: int
    flip: bool = False


def usual_view(model: nn.Module) -> View:
    """The view that the model is made for."""
    return View(model.config.min_size, model.config.max_size)


def tta_views(model: nn.Module) -> list[View]:
    """0.8, 1 and 1.25 times the test size, plain and mirrored: six views."""
    sizes = [(round(model.config.min_size * s), round(model.config.max_size * s)) for s in _TTA_SCALES]
    return [View(*size, flip) for size in sizes for flip in (False, True)]


@torch.inference_mode()
def detect(
    model: nn.Module, images: Sequence[Tensor], view: View, dtype: str = "float32", every_stage: bool = False
) -> list[list[Detections]]:
    """Detect in images.

    Args:
        model: a ``SparseRCNN`` in evaluation mode.
        images: uint8 [3, H, W], RGB, at their original sizes.
        view: how to show them to the network.
        dtype: ``float32``, or ``bfloat16`` for autocast.
        every_stage: what each stage would answer if it were the last one, instead of the last one alone.

    Returns:
        For each stage asked for, the detections of each image; boxes in its own pixels.
    """
    device = next(model.parameters()).device
    shown = [resize(image, network_size(*image.shape[1:], view.min_size, view.max_size)) for image in images]
    shown = [(image.flip(2) if view.flip else image).contiguous().to(device) for image in shown]
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        if every_stage:
            outputs = model(shown, return_stages=True)
            pairs = zip(outputs.logits, outputs.boxes, strict=True)
            results = [model.detections(logits, boxes, shown) for logits, boxes in pairs]
        else:
            results = [model(shown)]
    names = model.config.class_names or tuple(map(str, range(model.config.num_classes)))
    return [
        [
            _to_detections(result, network, image, view.flip, names)
            for result, network, image in zip(stage, shown, images, strict=True)
        ]
        for stage in results
    ]


def _to_detections(
    result: dict[str, Tensor], network: Tensor, image: Tensor, flip: bool, names: Sequence[str]
) -> Detections:
    boxes, size = result["boxes"].float().cpu(), tuple(image.shape[1:])
    boxes = flip_boxes(boxes, network.shape[2]) if flip else boxes
    boxes = to_original(boxes, network.shape[1:], size).clamp(min=0)
    boxes = boxes.minimum(boxes.new_tensor([size[1], size[0]] * 2))
    full = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).numpy()
    scores, labels = result["scores"].float().cpu().numpy(), result["labels"].cpu().numpy()
    return Detections(boxes.numpy(), scores, labels, tuple(names), size)[full]


def detect_augmented(model: nn.Module, image: Tensor, dtype: str = "float32") -> Detections:
    """Test-time augmentation: the detections of all :func:`tta_views`, merged.

    They are merged as detectron2 does it: put together, and of those of one class that overlap by more than an IoU of
    0.65 the best stays, with the votes of the others where the model has them (``config.votes``). A proposal detector
    needs no suppression within a view; between views there is no other way to tell that two detections are of one
    object.
    """
    found = [detect(model, [image], view, dtype)[0][0] for view in tta_views(model)]
    merged = Detections(
        boxes=np.concatenate([f.boxes for f in found]),
        scores=np.concatenate([f.scores for f in found]),
        labels=np.concatenate([f.labels for f in found]),
        class_names=found[0].class_names,
        image_size=found[0].image_size,
    )
    return merged.nms(_TTA_IOU, model.config.votes).filter(top_k=model.config.num_proposals)
