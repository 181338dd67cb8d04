"""The configuration of a detector: everything the paper and its ablations vary, in one frozen dataclass."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from sparse_rcnn.suggestions import did_you_mean

# dw and dh are clamped before exp(): the official code only from above, at log(100000 / 16); mmdetection on both
# sides, at log(1000 / 16).
OFFICIAL_DELTA_CLAMP = (None, math.log(100000.0 / 16))
MMDET_DELTA_CLAMP = (-math.log(1000.0 / 16), math.log(1000.0 / 16))

_CHOICES = {
    "proposal_init": ("image", "center", "grid", "random", "tiles"),
    "interaction": ("dynamic", "concat", "plain"),
    "classification": ("focal", "softmax"),
    "level_rule": ("detectron2", "mmdet"),
}
_NUMBERS = ("class_weight", "l1_weight", "giou_weight", "focal_alpha", "focal_gamma", "no_object_weight")
_POSITIVE_INTEGERS = (
    *("num_classes", "num_proposals", "num_stages", "hidden_dim", "dim_dynamic", "dim_feedforward", "num_heads"),
    *("pooler_resolution", "sampling_ratio", "min_size", "max_size"),
)


@dataclass(frozen=True, kw_only=True)
class SparseRCNNConfig:
    """Configuration of :class:`~sparse_rcnn.models.SparseRCNN`; the defaults are the paper's R50-100 (section 4.1).

    Args:
        num_classes: number of foreground classes K.
        class_names: K names in label order, or None.
        num_proposals: learned proposals N of an image.
        num_stages: stages of the iterative head.
        hidden_dim: channels C of the FPN, of the proposal features and of the head.
        dim_dynamic: inner width D of the dynamic interaction.
        dim_feedforward: inner width of each stage's FFN.
        num_heads: heads of the self-attention among proposals; divides ``hidden_dim``.
        num_cls_layers, num_reg_layers: hidden layers of the class and the box tower.
        pooler_resolution, sampling_ratio: RoIAlign bins a side, and samples a side of each bin.
        proposal_init: initial proposal boxes (table 6 of the paper): ``image`` (whole image), ``center``
            (0.1 of the image, in its middle), ``grid``, ``random`` (centre and size from a normal distribution); or
            ``tiles`` of several sizes (see :func:`~sparse_rcnn.models.proposals.initial_boxes`), for few images.
        self_attention: attention among the proposals of an image before the interaction (table 3).
        interaction: ``dynamic`` (section 3.2), ``concat`` (proposal feature concatenated to the RoI feature) or
            ``plain`` (boxes refined by RoI features alone, as in a cascade), the rows of table 3.
        classification: ``focal`` (K sigmoids) or ``softmax`` (K + 1, the last is "no object").
        deep_supervision: losses at every stage, or at the last one only.
        backbone: ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101`` or the name of a timm model.
        frozen_stages: of a ResNet: 0 trains everything, 1 freezes the stem, 2 the stem and the first stage, and so on;
            None is the paper's 2. Of a timm model 2 freezes all up to the map of stride 4, 3 up to that of stride 8,
            and so on; None is 0.
        level_rule: how a box chooses its FPN level, ``detectron2`` or ``mmdet``.
        delta_clamp: (lower, upper) bound of dw and dh before exp(); None is no bound.
        pixel_mean, pixel_std: of RGB values in 0..255.
        min_size, max_size: the shorter side and the largest longer side of an image at test time, in pixels.
        nms: IoU of the class-wise suppression that ``Predictor`` applies where it is told no other, above 0 to 1. None,
            the paper's way, is none; it is for a model that has seen too few images to leave out duplicates itself.
        votes: what that suppresses has a say in the score of what stays, see :meth:`Detections.nms`; for a model that
            was trained with ``match_iou``.
        class_weight, l1_weight, giou_weight: weights of the losses, and of the same terms of the matching cost.
        focal_alpha, focal_gamma: of the focal loss and the focal matching cost.
        no_object_weight: weight of the "no object" class in the softmax loss (as in DETR).
        match_iou: in training a proposal that is nobody's match, and overlaps a box with at least this IoU, is a
            further match of that box, above 0 to 1. None, the paper's way, is one match a box; it is for few images,
            with ``nms`` and focal classification.
        denoising: proposals an image that training adds, noisy copies of the targets for the head to mend or to refuse
            (see :func:`~sparse_rcnn.losses.denoising.noisy_proposals`); 0, the paper's way, is none. The trained
            detector has no trace of them.

    Raises:
        ValueError: a field has a value that no detector can be built from.
    """

    num_classes: int = 80
    class_names: tuple[str, ...] | None = None
    num_proposals: int = 100
    num_stages: int = 6
    hidden_dim: int = 256
    dim_dynamic: int = 64
    dim_feedforward: int = 2048
    num_heads: int = 8
    num_cls_layers: int = 1
    num_reg_layers: int = 3
    pooler_resolution: int = 7
    sampling_ratio: int = 2
    proposal_init: str = "image"
    self_attention: bool = True
    interaction: str = "dynamic"
    classification: str = "focal"
    deep_supervision: bool = True
    backbone: str = "resnet50"
    frozen_stages: int | None = None
    level_rule: str = "detectron2"
    delta_clamp: tuple[float | None, float | None] = OFFICIAL_DELTA_CLAMP
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    min_size: int = 800
    max_size: int = 1333
    nms: float | None = None
    votes: bool = False
    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    no_object_weight: float = 0.1
    match_iou: float | None = None
    denoising: int = 0

    def __post_init__(self) -> None:
        for field in ("class_names", "delta_clamp", "pixel_mean", "pixel_std"):  # JSON has lists only
            value = getattr(self, field)
            if isinstance(value, list):
                object.__setattr__(self, field, tuple(value))
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}: expected one of {', '.join(choices)}, got {getattr(self, field)!r}")
        for field in _POSITIVE_INTEGERS:
            _check_integer(field, getattr(self, field), minimum=1)
        for field in ("num_cls_layers", "num_reg_layers"):
            _check_integer(field, getattr(self, field), minimum=0)
        _check_integer("denoising", self.denoising, minimum=0)
        if self.denoising == 1:
            raise ValueError("denoising: expected 0, or at least 2 proposals, got 1")
        for field in ("nms", "match_iou"):
            value = getattr(self, field)
            if value is not None:
                _check_number(field, value)
                if not 0 < value <= 1:
                    raise ValueError(f"{field}: expected above 0 and at most 1, got {value}")
        if self.frozen_stages is not None:
            _check_integer("frozen_stages", self.frozen_stages, minimum=0)
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_dim {self.hidden_dim}, got {self.num_heads}")
        for field in ("self_attention", "deep_supervision", "votes"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}: expected true or false, got {getattr(self, field)!r}")
        for field in _NUMBERS:
            _check_number(field, getattr(self, field))
        if not isinstance(self.backbone, str):
            raise ValueError(f"backbone: expected a name, got {self.backbone!r}")
        self._check_lists()

    def _check_lists(self) -> None:
        for field, length in (("delta_clamp", 2), ("pixel_mean", 3), ("pixel_std", 3)):
            values = getattr(self, field)
            if not isinstance(values, tuple) or len(values) != length:
                raise ValueError(f"{field}: expected {length} numbers, got {values!r}")
            for value in values:
                if not (field == "delta_clamp" and value is None):
                    _check_number(field, value)
        if min(self.pixel_std) <= 0:
            raise ValueError(f"pixel_std: expected positive numbers, got {self.pixel_std}")
        names = self.class_names
        if names is None:
            return
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names: expected a list of names, got {names!r:.80}")
        if len(names) != self.num_classes:
            raise ValueError(f"class_names: expected {self.num_classes} names, got {len(names)}")

    def replace(self, **changes: Any) -> SparseRCNNConfig:
        """A copy with some fields changed; validated like a new one."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SparseRCNNConfig:
        """The inverse of :meth:`to_dict`; absent fields take their defaults, unknown ones raise ``ValueError``."""
        if not isinstance(values, dict):
            raise ValueError(f"config: expected a JSON object, got {type(values).__name__}")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [f"{name}{did_you_mean(name, names)}" for name in sorted(set(values) - set(names))]
        if unknown:
            raise ValueError(f"config: unknown fields {', '.join(unknown)}")
        try:
            return cls(**values)
        except TypeError as error:  # a value of a type that the checks cannot even compare
            raise ValueError(f"config: {error}") from error

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SparseRCNNConfig:
        """A named configuration (see ``PRESETS``), with ``overrides`` on top of it."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}{did_you_mean(name, PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


def _check_number(field: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{field}: expected a number, got {value!r}")


def _check_integer(field: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{field}: expected an integer >= {minimum}, got {value!r}")


# The paper's four COCO models, the released CrowdHuman one, and one that trains on a CPU in an hour.
PRESETS: dict[str, dict[str, Any]] = {
    "r50_100": {},
    "r50_300": {"num_proposals": 300},
    "r101_100": {"backbone": "resnet101"},
    "r101_300": {"backbone": "resnet101", "num_proposals": 300},
    "crowdhuman_r50_500": {"num_proposals": 500, "num_classes": 1, "class_names": ("person",)},
    "small": {
        **{"backbone": "efficientnet_lite0", "num_proposals": 50, "hidden_dim": 96, "dim_dynamic": 16},
        **{"dim_feedforward": 384, "min_size": 256, "max_size": 448},
    },
}
