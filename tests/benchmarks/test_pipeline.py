"""The pipeline's benchmark: its gate, and that it runs."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import pipeline
from sparse_rcnn import SparseRCNN, SparseRCNNConfig
from sparse_rcnn.detections import Detections


def make(*boxes, scores=None, labels=None):
    scores = [0.9] * len(boxes) if scores is None else scores
    return Detections(boxes, scores, [0] * len(boxes) if labels is None else labels, ("fish", "crab"), (100, 100))


def test_the_gate_sees_what_differs():
    one, other = (10, 10, 20, 20), (30, 30, 40, 40)
    assert pipeline.difference([make(one, other)], [make(other, one)]) == 0
    assert pipeline.difference([make((10, 10, 20, 20.25))], [make(one)]) == 0.25
    assert pipeline.difference([make(one)], [make(one, other)]) == np.inf
    assert pipeline.difference([make(one)], [make(one, labels=[1])]) == np.inf
    assert pipeline.difference([make(one)], [make(one, other, scores=[0.9, 0.305])]) == 0


@pytest.mark.parametrize("red", [False, True])
def test_all_ways_are_measured_after_the_gate(tmp_path, monkeypatch, capsys, red):
    torch.manual_seed(0)
    config = SparseRCNNConfig(
        **{"num_classes": 3, "num_proposals": 10, "num_stages": 2, "backbone": "resnet18", "hidden_dim": 32},
        **{"dim_dynamic": 8, "dim_feedforward": 64, "num_heads": 4, "min_size": 64, "max_size": 96},
    )
    SparseRCNN(config).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(pipeline, "SCENES", 3)
    monkeypatch.setattr(pipeline, "SCORE_THRESHOLD", 0.0)
    monkeypatch.setattr(pipeline, "environment", lambda device: {})
    if red:
        monkeypatch.setattr(pipeline, "difference", lambda *found: 1.0)
    arguments = ["--weights", str(tmp_path / "model"), "--images", "7", "--batch-size", "2", "--device", "cpu"]
    arguments += ["--size", "40", "60", "--rounds", "2", "--json", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
    assert pipeline.main() == int(red)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["passed"] is not red and "passed" in capsys.readouterr().out
    if red:
        assert not any("per_s" in name for name in report)
        return
    for name in ("forward", "loop", "pipeline"):
        assert report[f"{name}_images_per_s"]["runs"] == 2 and report[f"{name}_images_per_s"]["median"] > 0
    assert 0 < report["forward_busy"] < 1 and report["pipeline_to_forward"] > 0 and report["pipeline_to_loop"] > 0
