"""The implementations that every operator is tested in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from sparse_rcnn import ops


@dataclass(frozen=True)
class Backend:
    """An implementation: its name for ``ops.backend`` and its namespace in ``torch.ops``."""

    name: str
    namespace: str


@pytest.fixture(params=["reference", "native", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The specification, the CPU kernels, then the Triton kernels run by the interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("with a GPU the kernels are compiled: see tests/gpu")
    with ops.backend(request.param):
        yield request.param


@pytest.fixture(params=["native", "emulated"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The CPU kernels, then the CUDA kernels run on the CPU; all operators inside the test use them."""
    if request.param == "emulated":
        request.getfixturevalue("emulator")
    namespace = {"native": "sparse_rcnn", "emulated": "sparse_rcnn_emulated"}[request.param]
    with ops.backend(request.param):
        yield Backend(request.param, namespace)
