"""The linear layer of the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_rcnn import onednn
from sparse_rcnn.ops._library import is_reference


class Linear(nn.Linear):
    """``nn.Linear``, in float32 on the CPU by the faster library of :func:`sparse_rcnn.onednn.linear`, in training too.

    Half types, whether of autocast or of the parameters, PyTorch computes by that library itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., Ci]: [..., Co]."""
        plain = (
            x.dtype != torch.float32
            or torch.is_autocast_enabled(x.device.type)
            or is_reference()
            or torch.compiler.is_compiling()
        )
        return super().forward(x) if plain else onednn.linear(x, self.weight, self.bias)
