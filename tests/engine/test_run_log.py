from __future__ import annotations

import json

import pytest

from sparse_rcnn.engine.logging import Meter, RunLog


def steps_in(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_records_are_on_disk_at_once_and_a_second_run_appends(tmp_path):
    path = tmp_path / "log.jsonl"
    with RunLog(path, 0, 4) as log:
        log.record({"kind": "train", "step": 1})
        assert steps_in(path) == [1]
    with RunLog(path, 1, 4) as log:
        log.record({"kind": "train", "step": 2})
    assert steps_in(path) == [1, 2]


def test_what_a_crash_lost_and_cut_short_goes(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"kind": "train", "st', encoding="utf-8")
    with RunLog(path, 2, 4) as log:
        log.record({"step": 3, "again": True})
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_the_meter_gives_means_and_starts_over():
    meter = Meter()
    meter.add({"loss_ce": 1.0, "loss_bbox": 2.0}, grad_norm=4.0, images=2)
    meter.add({"loss_ce": 3.0, "loss_bbox": 6.0}, grad_norm=8.0, images=2)
    values = meter.flush()
    assert {name: values[name] for name in ("loss", "loss_ce", "loss_bbox", "grad_norm")} == {
        **{"loss": 6.0, "loss_ce": 2.0, "loss_bbox": 4.0, "grad_norm": 6.0}
    }
    meter.add({"loss_ce": 5.0}, grad_norm=1.0, images=1)
    assert meter.flush()["loss"] == pytest.approx(5.0)
