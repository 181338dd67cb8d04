"""Backbone and FPN as one graph of fused convolutions: whatever torchvision or timm backbone it is."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn import functional as F

from sparse_rcnn.inference.convolution import Activation, FusedConv2d
from sparse_rcnn.models.traced import Tracer, calls, is_norm, is_plain_conv, module_of, only_user, set_module

_ADDITIONS = (operator.add, operator.iadd, torch.add)


def fuse(backbone: nn.Module, device: torch.device, dtype: torch.dtype, winograd: bool = True) -> nn.Module:
    """What ``backbone`` computes in evaluation mode, with BatchNorm folded into convolutions, and activations and
    residual sums fused to them.

    Args:
        backbone: images [B, 3, H, W] -> a list of maps. It is left as it is; what is not folded is copied.
        device, dtype: of the result.
        winograd: let :func:`~sparse_rcnn.ops.winograd_conv2d` serve where it does.

    Raises:
        Exception: whatever tracing raises for a backbone whose control flow depends on its input.
    """
    with evaluating(backbone):
        graph = Tracer().trace(backbone)
    module = fx.GraphModule(backbone, graph, "FusedBackbone")
    _drop_identities(module)
    _fold_norms(module, device, dtype)
    _read_sizes_before(module)
    _fuse_activations(module)
    _fuse_sums(module)
    _convert(module, device, dtype, winograd)
    module.delete_all_unused_submodules()  # those that were folded are still the detector's
    module.graph.lint()
    module.recompile()
    return module.eval()


def compiled(backbone: nn.Module) -> nn.Module:
    """``backbone`` by ``torch.compile``, which does its own fusing: a convolution is to it one without all else."""
    for module in backbone.modules():
        if isinstance(module, FusedConv2d):
            module.onednn = module.cudnn = False
    on_gpu = next(backbone.buffers()).is_cuda
    # A CUDA graph is made around it; on a CPU constant weights get the layouts that its convolutions want.
    options = {"mode": "max-autotune-no-cudagraphs"} if on_gpu else {"options": {"freezing": True}}
    return torch.compile(backbone, dynamic=False, **options)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation mode, and afterwards each part of it as it was."""
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


def _drop_identities(module: fx.GraphModule) -> None:
    """Take out what does nothing in evaluation mode."""
    modules = dict(module.named_modules())
    for node in list(module.graph.nodes):
        if isinstance(module_of(node, modules), (nn.Identity, nn.Dropout)):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _read_sizes_before(module: fx.GraphModule) -> None:
    """Let who asks for height and width of a 1x1 convolution's result (the FPN does) ask its input, which has the same:
    the result can then be fused to the one that computes with it."""
    modules = dict(module.named_modules())
    for node in list(module.graph.nodes):
        conv = module_of(node, modules)
        if not isinstance(conv, FusedConv2d) or conv.kernel != [1, 1] or conv.stride != [1, 1] or any(conv.padding):
            continue
        for user in list(node.users):
            is_shape = user.op == "call_function" and user.target is getattr and user.args[1] == "shape"
            last_two = (operator.getitem, slice(-2, None, None))
            if is_shape and all((reader.target, reader.args[1]) == last_two for reader in user.users):
                user.args = (node.args[0], "shape")


def _fold_norms(module: fx.GraphModule, device: torch.device, dtype: torch.dtype) -> None:
    """Put a :class:`FusedConv2d` in place of every convolution, with the BatchNorm behind it folded in."""
    modules = dict(module.named_modules())
    for node in list(module.graph.nodes):
        conv = module_of(node, modules)
        if not is_plain_conv(conv) or calls(module, node.target) != 1:
            continue
        norm_node = only_user(node)
        norm = None if norm_node is None else module_of(norm_node, modules)
        folds = is_norm(norm) and calls(module, norm_node.target) == 1
        set_module(module, node.target, FusedConv2d(conv, norm if folds else None, device, dtype))
        if folds:
            _activate(module, norm_node, getattr(norm, "act", None))
            norm_node.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: True)
            module.graph.erase_node(norm_node)


def _activate(module: fx.GraphModule, norm_node: fx.Node, act: nn.Module | None) -> None:
    """Put the activation that timm's norms hold behind this one, as a node of its own."""
    if act is None or isinstance(act, nn.Identity):
        return
    set_module(module, f"{norm_node.target}.act", act)
    with module.graph.inserting_after(norm_node):
        act_node = module.graph.call_module(f"{norm_node.target}.act", (norm_node,))
    norm_node.replace_all_uses_with(act_node, delete_user_cb=lambda user: user is not act_node)


def _fuse_activations(module: fx.GraphModule) -> None:
    """Let convolutions apply the activation that alone reads their result."""
    modules = dict(module.named_modules())
    for node in list(module.graph.nodes):
        _fuse_activation(module, node, modules)


def _fuse_activation(module: fx.GraphModule, node: fx.Node, modules: dict[str, nn.Module]) -> None:
    conv, act_node = module_of(node, modules), only_user(node)
    if not isinstance(conv, FusedConv2d) or conv.activation is not None or act_node is None:
        return
    activation = _activation_of(act_node, modules)
    has_residual = len(node.args) == 2
    if activation is None or has_residual and activation.name != "relu":
        return
    conv.activation = activation
    act_node.replace_all_uses_with(node)
    module.graph.erase_node(act_node)


def _fuse_sums(module: fx.GraphModule) -> None:
    """Let a convolution add the other term of a sum to its result, in the other's place where nothing else reads it."""
    modules = dict(module.named_modules())
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        if not _is_sum(node):
            continue
        terms = sorted(node.args, key=order.get, reverse=True)  # the later one adds the earlier one
        conv_node = next((term for term in terms if _can_add(term, modules)), None)
        if conv_node is None or terms[0] is terms[1]:
            continue
        conv, residual = modules[conv_node.target], terms[terms[0] is conv_node]
        fresh = isinstance(module_of(residual, modules), FusedConv2d) or residual.target is F.interpolate
        conv.overwrite = fresh and all(order[user] <= order[node] for user in residual.users)
        with module.graph.inserting_before(node):
            fused = module.graph.call_module(conv_node.target, (conv_node.args[0], residual))
        order[fused] = order[node]
        node.replace_all_uses_with(fused)
        module.graph.erase_node(node)
        module.graph.erase_node(conv_node)
        _fuse_activation(module, fused, modules)  # now, so that the next sum sees whose result this is


def _convert(module: fx.GraphModule, device: torch.device, dtype: torch.dtype, winograd: bool) -> None:
    """Give everything in the graph its device, type and form; what is shared with the detector is copied."""
    modules = dict(module.named_modules())
    for target in {node.target for node in module.graph.nodes if node.op == "call_module"}:
        layer = modules[target]
        if isinstance(layer, FusedConv2d):
            if winograd:
                layer.use_winograd()
        else:
            set_module(module, target, copy.deepcopy(layer).to(device, dtype, memory_format=torch.channels_last))
    for target in {node.target for node in module.graph.nodes if node.op == "get_attr"}:
        tensor = operator.attrgetter(target)(module).detach()
        set_module(module, target, tensor.to(device, dtype if tensor.is_floating_point() else None))


def _is_sum(node: fx.Node) -> bool:
    is_sum = node.op == "call_function" and node.target in _ADDITIONS
    return is_sum and len(node.args) == 2 and not node.kwargs and all(isinstance(term, fx.Node) for term in node.args)


def _can_add(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether this is a convolution that nothing was fused to and that only one reads."""
    conv = module_of(node, modules)
    return isinstance(conv, FusedConv2d) and conv.activation is None and len(node.args) == 1 and len(node.users) == 1


def _activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    module = module_of(node, modules)
    if module is not None:
        return Activation.of(module)
    relu = node.op == "call_function" and node.target in (F.relu, torch.relu, torch.relu_)
    return Activation.of(nn.ReLU()) if relu or node.op == "call_method" and node.target in ("relu", "relu_") else None
