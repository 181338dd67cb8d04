"""The implementations that every operator is tested in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from sparse_rcnn import ops


@dataclass(frozen=True)
class Backend:
    """An implementation: its name for ``ops.backend`` and its namespace in ``torch.ops``."""

    name: str
    namespace: str


@pytest.fixture(params=["native", "emulated"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The CPU kernels, then the CUDA kernels run on the CPU; all operators inside the test use them."""
    if request.param == "emulated":
        request.getfixturevalue("emulator")
    namespace = {"native": "sparse_rcnn", "emulated": "sparse_rcnn_emulated"}[request.param]
    with ops.backend(request.param):
        yield Backend(request.param, namespace)
