"""The official formulation that matching and losses are timed against is one: it gives the references' numbers."""

from __future__ import annotations

import pytest
import torch

from benchmarks import losses, matching
from benchmarks.linear_assignment import for_package
from sparse_rcnn.ops import linear_assignment_reference
from sparse_rcnn.self_test import Specification

CPU = torch.device("cpu")
CASES = {case.name: case for file in (matching, losses) for case in file.cases(CPU, torch.float32)}


@pytest.mark.parametrize("name", [name for name in CASES if "20" not in name])
def test_official_formulation(name, monkeypatch):
    monkeypatch.setattr(matching, "PROPOSALS", 70)  # as many as the most targets and a few
    case = CASES[name]
    specification = Specification(case.reference, case.inputs(torch.Generator().manual_seed(1)), case.wrt)
    record = specification.compare(
        lambda **inputs: case.implementations["official"](**case.prepare["official"](inputs))
    )
    assert record["passed"], record


def test_padding_of_the_package_leaves_the_assignment_of_the_others():
    generator = torch.Generator().manual_seed(0)
    inputs = {"cost": torch.rand(2, 3, 9, 6, generator=generator), "counts": torch.tensor([6, 0, 2])}
    padded = for_package(inputs)
    assert padded["cost"].shape == (6, 6, 9) and padded["counts"].tolist() == [6, 0, 2, 6, 0, 2]
    expected = linear_assignment_reference(inputs["cost"], inputs["counts"]).flatten(0, 1)
    solved = linear_assignment_reference(padded["cost"].transpose(1, 2), torch.tensor(6))
    for row, wanted, count in zip(solved, expected, padded["counts"].tolist(), strict=True):
        assert row[:count].tolist() == wanted[:count].tolist()
