"""What the training step's benchmark compares, and when its gate is red."""

from __future__ import annotations

import pytest
import torch

from benchmarks.train_step import AUTOCAST, KEPT, UNTIMED, _gate, names
from benchmarks.train_step_worker import IMPLEMENTATIONS

GRADIENTS = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]


def off_by(error: float) -> list[torch.Tensor]:
    return [GRADIENTS[0], GRADIENTS[1] + 5 * error]


def test_every_implementation_that_can_run_is_compared():
    assert names("cuda", False, [""]) == [name for name in IMPLEMENTATIONS if name not in (*UNTIMED, KEPT)]
    assert names("cpu", False, [""]) == [KEPT, AUTOCAST, "native, float32", "native, bfloat16"]
    assert len(names("cpu", True, [""])) == 6
    # The gate of bfloat16 needs the reference's error under autocast first.
    assert names("cpu", False, ["native, bfloat16"]) == [AUTOCAST, "native, bfloat16"]
    assert names("cpu", False, ["native, float32"]) == ["native, float32"]


@pytest.mark.parametrize(
    ("error", "limit", "passed"),
    [
        (0.1, None, True),  # of a reference
        (float("nan"), None, False),
        (0.19, 0.2, True),
        (0.21, 0.2, False),
        (0.1, float("nan"), False),
    ],
)
def test_gate(error, limit, passed):
    row = _gate(off_by(error), GRADIENTS, limit)
    assert row["passed"] is passed
    assert row["error"] == pytest.approx(error, rel=1e-4, nan_ok=True)
