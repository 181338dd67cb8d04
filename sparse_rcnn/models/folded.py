"""A backbone's body as it is trained: its fixed normalisation multiplied into the weights."""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn import functional as F

from sparse_rcnn.models.traced import Tracer, calls, is_frozen_norm, is_plain_conv, module_of, only_user, set_module


def folded(body: nn.Module) -> nn.Module:
    """What ``body`` computes in training, with the scales of frozen BatchNorms multiplied into the weights.

    No scaled copies of the larger maps are then made and kept, and under autocast maps stay in the half type, which
    the norms would leave. Gradients are those of ``body``, whose parameters and modules these are, to rounding.

    Args:
        body: traceable, in training mode; one that is not, or that holds tensors of its own, is given back.
    """
    try:
        graph = Tracer().trace(body)
    except Exception:  # whatever tracing raises where control flow depends on the input
        return body
    if any(node.op == "get_attr" for node in graph.nodes):  # a traced module would miss that they move or are replaced
        return body
    module = fx.GraphModule(body, graph, f"Folded{type(body).__name__}")
    modules = dict(module.named_modules())
    for node in list(module.graph.nodes):
        norm_node, conv = only_user(node), module_of(node, modules)
        if norm_node is None or not is_plain_conv(conv) or not is_frozen_norm(module_of(norm_node, modules)):
            continue
        if calls(module, node.target) == calls(module, norm_node.target) == 1:
            set_module(module, node.target, _Normalized(conv, modules[norm_node.target]))
            norm_node.replace_all_uses_with(node)
            module.graph.erase_node(norm_node)
    module.recompile()
    return module


class _Normalized(nn.Module):
    """``norm(conv(x))``, and the activation that timm's norms hold."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm
        self.same = type(conv).__name__ == "Conv2dSame"

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if conv.bias is not None:
            bias = bias + conv.bias * scale
        weight = conv.weight * scale.view(-1, 1, 1, 1)
        if self.same:
            from timm.layers import pad_same

            x = pad_same(x, conv.kernel_size, conv.stride, conv.dilation)
        padding = 0 if self.same else conv.padding
        x = F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
        return norm.act(x) if hasattr(norm, "act") else x
