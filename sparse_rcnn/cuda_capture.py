"""Work of a GPU recorded once and done again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CudaCapture:
    """Captures CUDA graphs that share their memory, for only one of them runs at a time.

    Args:
        device: of all work.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Any]) -> None:
        """Run on the stream of the captures, after what is queued and before what will be: plans, workspaces and lazily
        loaded kernels cannot be made in a capture."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Record what the function does, without doing it; the result does it. Tensors that it makes stay where they
        are.

        Raises:
            RuntimeError: something in the function cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            function()
        return graph.replay
