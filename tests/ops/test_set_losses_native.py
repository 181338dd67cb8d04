"""The CPU kernels of matching_cost, set_focal_loss and set_box_loss: threads, levels, direct calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_rcnn import ops
from sparse_rcnn.self_test import Specification, leaves

OPERATORS = ("matching_cost", "set_focal_loss", "set_box_loss")
LARGE = {"S": 6, "B": 2, "N": 300, "K": 80, "M": 37}  # several tasks of every operator
ODD = {"S": 2, "B": 3, "N": 7, "K": 3, "M": 5}


@pytest.fixture(autouse=True)
def native():
    with ops.backend("native"):
        yield


def make_boxes(*shape, generator):
    corners = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 800
    return torch.cat([corners, corners + 1 + 300 * torch.rand(*shape, 2, generator=generator).double()], dim=-1)


def make_inputs(operator, dtype, S, B, N, K, M):
    """Arguments of an operator, and those that have a gradient."""
    generator = torch.Generator().manual_seed(S * N + M)
    logits = torch.randn(S, B, N, K, generator=generator, dtype=torch.float64) * 3 - 2
    matches = torch.stack([torch.randperm(N, generator=generator)[:M] for _ in range(S * B)]).view(S, B, M)
    matches[:, -1, M // 2 :] = -1
    counts = torch.full((B,), M)
    counts[-1] = M // 2
    every = {"logits": logits, "boxes": make_boxes(S, B, N, generator=generator), "matches": matches}
    every |= {"target_labels": torch.randint(K, (B, M), generator=generator), "target_counts": counts}
    every |= {"target_boxes": make_boxes(B, M, generator=generator)}
    every |= {"image_sizes": torch.tensor([[800.0, 1066.0], [640.0, 960.0]])[torch.arange(B) % 2]}
    names = {
        "matching_cost": ("logits", "boxes", "target_labels", "target_boxes", "target_counts", "image_sizes"),
        "set_focal_loss": ("logits", "matches", "target_labels"),
        "set_box_loss": ("boxes", "matches", "target_boxes", "image_sizes"),
    }[operator]
    inputs = {name: every[name].to(dtype) if every[name].is_floating_point() else every[name] for name in names}
    return inputs, {"matching_cost": (), "set_focal_loss": ("logits",), "set_box_loss": ("boxes",)}[operator]


def evaluate(operator, dtype, sizes):
    inputs, wrt = make_inputs(operator, dtype, **sizes)
    inputs, wanted = leaves(inputs, wrt)
    outputs = getattr(ops, operator)(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *(torch.autograd.grad(sum(o.sum() for o in outputs), wanted) if wanted else ())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [LARGE, ODD, {**ODD, "M": 0}, {**ODD, "K": 1}], ids=["large", "odd", "M0", "K1"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_values_and_gradients(operator, sizes, dtype):
    inputs, wrt = make_inputs(operator, dtype, **sizes)
    record = Specification(getattr(ops, f"{operator}_reference"), inputs, wrt).compare(getattr(ops, operator))
    assert record["passed"], record


@pytest.mark.parametrize("operator", OPERATORS)
def test_results_do_not_depend_on_the_number_of_threads(operator):
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(evaluate(operator, torch.float32, LARGE))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(first, other) for first, other in zip(results[0], result, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
def test_arguments_need_not_be_contiguous(operator):
    inputs, _ = make_inputs(operator, torch.float32, **ODD)
    strided = {name: torch.stack([tensor, tensor], dim=-1)[..., 0] for name, tensor in inputs.items()}
    assert not any(tensor.is_contiguous() for name, tensor in strided.items())
    results = [getattr(ops, operator)(**given) for given in (inputs, strided)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def direct_arguments(operator, **changes):
    """Of the operator in torch.ops, whose focal loss takes a class a proposal."""
    inputs, _ = make_inputs(operator, torch.float32, **ODD)
    if operator == "matching_cost":
        inputs |= {"weights": [2.0, 5.0, 2.0], "alpha": 0.25, "gamma": 2.0, "classification": "focal"}
        inputs["non_finite_cost"] = 1e6
    elif operator == "set_focal_loss":
        classes = torch.randint(-1, 5, (2, 3, 7), generator=torch.Generator().manual_seed(0))  # some of them none
        inputs = {"logits": inputs["logits"], "classes": classes, "alpha": 0.25, "gamma": 2.0}
    return inputs | changes


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_is_registered_right(operator):
    torch.library.opcheck(getattr(torch.ops.sparse_rcnn, operator), (), direct_arguments(operator))


WRONG = [
    ("matching_cost", {"logits": torch.zeros(2, 3, 7)}, "logits: expected shape"),
    ("matching_cost", {"logits": torch.zeros(2, 3, 7, 0)}, "logits: expected at least one class"),
    ("matching_cost", {"logits": torch.zeros(2, 3, 7, 3).double()}, "logits: expected dtype Float"),
    ("matching_cost", {"boxes": torch.zeros(2, 3, 6, 4)}, "boxes: expected shape"),
    ("matching_cost", {"target_labels": torch.zeros(2, 5).long()}, "target_labels: expected shape"),
    ("matching_cost", {"target_labels": torch.zeros(3, 5)}, "target_labels: expected dtype Long"),
    ("matching_cost", {"target_boxes": torch.zeros(3, 4, 4)}, "target_boxes: expected shape"),
    ("matching_cost", {"target_boxes": torch.zeros(3, 5, 4).half()}, "target_boxes: expected dtype Float"),
    ("matching_cost", {"target_counts": torch.zeros(2).long()}, "target_counts: expected shape"),
    ("matching_cost", {"target_counts": torch.zeros(3)}, "target_counts: expected dtype Long"),
    ("matching_cost", {"image_sizes": torch.zeros(2, 2)}, "image_sizes: expected shape"),
    ("matching_cost", {"image_sizes": torch.zeros(3, 2).double()}, "image_sizes: expected dtype Float"),
    ("matching_cost", {"weights": [1.0]}, "weights: expected three numbers"),
    ("matching_cost", {"classification": "sigmoid"}, "classification: expected focal or softmax"),
    ("set_focal_loss", {"logits": torch.zeros(2, 3, 7)}, "logits: expected shape"),
    ("set_focal_loss", {"logits": torch.zeros(2, 3, 7, 3).half()}, "logits: expected float32 or float64"),
    ("set_focal_loss", {"classes": torch.zeros(2, 3, 6).long()}, "classes: expected shape"),
    ("set_focal_loss", {"classes": torch.zeros(2, 3, 7)}, "classes: expected dtype Long"),
    ("set_box_loss", {"boxes": torch.zeros(2, 3, 7, 5)}, "boxes: expected shape"),
    ("set_box_loss", {"matches": torch.zeros(3, 3, 5).long()}, "matches: expected shape"),
    ("set_box_loss", {"matches": torch.zeros(2, 3, 5)}, "matches: expected dtype Long"),
    ("set_box_loss", {"target_boxes": torch.zeros(3, 6, 4)}, "target_boxes: expected shape"),
    ("set_box_loss", {"target_boxes": torch.zeros(3, 5, 4).double()}, "target_boxes: expected dtype Float"),
    ("set_box_loss", {"image_sizes": torch.zeros(3, 3)}, "image_sizes: expected shape"),
]


@pytest.mark.parametrize(
    ("operator", "wrong", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_direct_call_cannot_read_out_of_bounds(operator, wrong, message):
    native = getattr(torch.ops.sparse_rcnn, operator)
    native(**direct_arguments(operator))
    with pytest.raises(RuntimeError, match=message):
        native(**direct_arguments(operator, **wrong))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_lesser_instruction_sets(capability):
    """Tests of this folder in a process of its own, with the kernels that another processor would get."""
    names = ("test_set_losses_native.py", "test_matching_cost.py", "test_set_focal_loss.py", "test_set_box_loss.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-k", "(native and not reference and not triton) and (values or equals or float32 or gamma or finite)"]
    command += [str(Path(__file__).with_name(name)) for name in names]
    done = subprocess.run(
        command, env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
