"""Traced modules: what of their nodes is a convolution, and the fixed normalisation behind it."""

from __future__ import annotations

from torch import Tensor, fx, nn

_STATISTICS = ("running_mean", "running_var", "weight", "bias", "eps")


class Tracer(fx.Tracer):
    """Looks into everything but convolutions, normalisations of fixed statistics and activations."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or is_norm(m) or super().is_leaf_module(m, module_qualified_name)


def module_of(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules.get(node.target) if node.op == "call_module" else None


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def calls(module: fx.GraphModule, target: str) -> int:
    return sum(node.op == "call_module" and node.target == target for node in module.graph.nodes)


def is_plain_conv(module: nn.Module | None) -> bool:
    """torch's own, or timm's with TensorFlow's padding; not one that does something to its weights first."""
    known = type(module) is nn.Conv2d or type(module).__name__ == "Conv2dSame"
    return known and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def is_norm(module: nn.Module | None) -> bool:
    """A BatchNorm, frozen or in evaluation mode, of torch, torchvision or timm."""
    if not isinstance(module, nn.BatchNorm2d) and "FrozenBatchNorm" not in type(module).__name__:
        return False
    drops = not isinstance(getattr(module, "drop", nn.Identity()), nn.Identity)
    return not drops and all(hasattr(module, name) for name in _STATISTICS) and module.running_mean is not None


def is_frozen_norm(module: nn.Module | None) -> bool:
    """One whose statistics are fixed in training too."""
    return is_norm(module) and not isinstance(module, nn.BatchNorm2d)


def set_module(module: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    """Put ``value`` in the place of ``path`` under ``module``."""
    *parents, name = path.split(".")
    for parent in parents:
        module = getattr(module, parent)
    if isinstance(value, Tensor):
        for table in (module._parameters, module._buffers):
            table.pop(name, None)
        module.register_buffer(name, value)
    else:
        module.add_module(name, value)
