"""The Triton kernels, run on the CPU by Triton's interpreter, against the references."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparse_rcnn import ops

pytest.importorskip("triton")


if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("with a GPU the kernels are compiled: see tests/gpu", allow_module_level=True)


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """All operators by Triton, which tests/conftest.py has set to interpret."""
    with ops.backend("triton"):
        yield


def _boxes(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    corner = torch.rand(*shape, 2, dtype=dtype) * 100
    return torch.cat([corner, corner + torch.rand(*shape, 2, dtype=dtype) * 60], dim=-1)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("classification", ["focal", "softmax"])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 2.0])
@pytest.mark.parametrize(("N", "M", "K"), [(37, 19, 5), (1, 1, 1), (5, 0, 3), (33, 17, 1203)])
def test_matching_cost(classification: str, gamma: float, N: int, M: int, K: int) -> None:
    torch.manual_seed(N)
    S, B = 2, 3
    logits, boxes = torch.randn(S, B, N, K), _boxes(S, B, N)
    logits[0, 0, 0, 0], boxes[1, 1, N // 2, 0] = float("nan"), float("inf")
    labels, counts = torch.randint(0, K, (B, M)), torch.tensor([0, M // 2, M])
    arguments = (logits, boxes, labels, _boxes(B, M), counts, torch.tensor([[128.0, 160.0]] * B))
    options = ((2.0, 5.0, 2.0), 0.25, gamma, classification)
    got, want = ops.matching_cost(*arguments, *options), ops.matching_cost_reference(*arguments, *options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
@pytest.mark.parametrize(("N", "K"), [(7, 5), (1, 1), (9, 1203), (40, 80)])
def test_set_focal_loss(gamma: float, N: int, K: int) -> None:
    torch.manual_seed(N)
    logits = (torch.randn(2, 3, N, K, dtype=torch.float64) * 6).requires_grad_()
    matches = torch.full((2, 3, 2), -1)
    matches[:, 0, 0], matches[1, 1, 1] = N - 1, 0
    labels = torch.randint(0, K, (3, 2))
    weight = torch.randn(2, dtype=torch.float64)
    results = []
    for function in (ops.set_focal_loss, ops.set_focal_loss_reference):
        loss = function(logits, matches, labels, 0.25, gamma)
        results.append((loss, *torch.autograd.grad((loss * weight).sum(), logits)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("N", "M"), [(7, 2), (1, 1), (100, 70), (4, 0)])
def test_set_box_loss(N: int, M: int) -> None:
    torch.manual_seed(M)
    boxes, targets = _boxes(2, 3, N, dtype=torch.float64), _boxes(3, M, dtype=torch.float64)
    matches = torch.stack([torch.randperm(N)[:M] for _ in range(6)]).view(2, 3, M)
    if M:
        matches[0, 2, 0] = -1
        boxes[1, 0, matches[1, 0, 0]] = targets[0, 0]  # a perfect box: ties in every maximum
    if M > 1:
        boxes[1, 1, matches[1, 1, 1], 2] = boxes[1, 1, matches[1, 1, 1], 0] - 1  # turned inside out
    boxes.requires_grad_()
    sizes, weight = torch.tensor([[64.0, 80.0]] * 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    results = []
    for function in (ops.set_box_loss, ops.set_box_loss_reference):
        l1, giou = function(boxes, matches, targets, sizes)
        results.append((l1, giou, *torch.autograd.grad((l1 * weight[0] + giou * weight[1]).sum(), boxes)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


# Run without TRITON_INTERPRET, which makes of a kernel something that cannot be compiled.
COMPILE = """
import itertools, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparse_rcnn.kernels import matching_cost, set_box_loss, set_focal_loss

def compiled(kernel, constants, **pointers):
    signature = {**pointers, **{name: "i32" for name in ("B", "N", "M", "elements") if name in kernel.arg_names}}
    if "K" in kernel.arg_names and "K" not in constants:
        signature["K"] = "i32"
    source = ASTSource(kernel, {**signature, **{name: "constexpr" for name in constants}}, constants)
    text = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm["ptx"]
    assert ".entry " + kernel.__name__ in text

for real, gamma in itertools.product(("*fp32", "*fp64"), (0.0, 1.5, 2.0)):
    focal = {"ALPHA": 0.25, "GAMMA": gamma, "BLOCK": 1024}
    compiled(set_focal_loss._set_focal_loss_kernel, focal, logits=real, classes="*i64", grad=real, parts=real)
    if gamma == 1.5:
        continue
    cost = {"K": 80, "CLASS_WEIGHT": 2.0, "L1_WEIGHT": 5.0, "GIOU_WEIGHT": 2.0, "ALPHA": 0.25, "GAMMA": gamma}
    cost |= {"FOCAL": gamma == 2.0, "NON_FINITE_COST": 1e6, "TINY": 1e-38, "BLOCK_N": 32, "BLOCK_M": 16, "BLOCK_K": 64}
    pointers = {"logits": real, "boxes": real, "target_labels": "*i64", "target_boxes": real, "target_counts": "*i64"}
    compiled(matching_cost._matching_cost_kernel, cost, **pointers, image_sizes=real, cost=real)
    pointers = {"boxes": real, "matches": "*i64", "target_boxes": real, "image_sizes": real, "grad_l1": real}
    pointers |= {"grad_giou": real, "l1_parts": real, "giou_parts": real}
    compiled(set_box_loss._set_box_loss_kernel, {"TINY": 1e-38, "BLOCK": 64, "ROUNDS": 19}, **pointers)
"""


@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_kernels_compile(capability: str, tmp_path: Path) -> None:
    """The interpreter lets pass what the compiler does not: a variable that changes its type in a loop, for one."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, capability]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_operator_without_a_triton_kernel_says_so() -> None:
    with pytest.raises(
        RuntimeError, match="apply_deltas: the triton backend was asked for and it has no Triton kernel"
    ):
        ops.apply_deltas(torch.zeros(1, 4), torch.zeros(1, 4))
