from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest

from sparse_rcnn.engine import logging
from sparse_rcnn.engine.logging import Meter, RunLog, loss_kinds, read_records
from tests.full_disk import files_of_at_most


def steps_in(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_records_are_on_disk_at_once_and_a_second_run_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with RunLog(tmp_path, 0, 4) as log:
        log.record({"kind": "train", "step": 1})
        assert steps_in(path) == [1]
    with RunLog(tmp_path, 1, 4) as log:
        log.record({"kind": "train", "step": 2})
    assert steps_in(path) == [1, 2]


def test_what_a_crash_lost_and_cut_short_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"kind": "train", "st', encoding="utf-8")
    with RunLog(tmp_path, 2, 4) as log:
        log.record({"step": 3, "again": True})
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_is_an_error_that_names_the_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with (
        pytest.raises(OSError) as error,
        RunLog(tmp_path, 0, 4) as log,
    ):
        log.record({"step": 1})
        with files_of_at_most(path.stat().st_size + 5):
            log.record({"step": 2})
    assert str(error.value) == f"{path}: cannot write the log (File too large)"
    with RunLog(tmp_path, 1, 4) as log:
        log.record({"step": 2})
    assert steps_in(path) == [1, 2]


def test_a_last_line_without_its_end_is_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}', encoding="utf-8")
    with RunLog(tmp_path, 2, 4) as log:
        log.record({"step": 3})
    assert steps_in(path) == [1, 2, 3]


def test_every_line_is_json_even_of_what_is_not_finite(tmp_path):
    with RunLog(tmp_path, 0, 4) as log:
        log.record({"kind": "train", "step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert record == {"kind": "train", "step": 1, "loss": None, "grad_norm": None, "lr": 0.1}


def test_reading_leaves_out_what_is_cut_short(tmp_path):
    assert read_records(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2}\n{"step": 7}\n{"st', encoding="utf-8")
    assert read_records(tmp_path) == [{"step": 1, "a": 2}, {"step": 7}]


def test_losses_are_summed_over_the_stages():
    record = {"loss": 9.0, "loss_ce": 1.0, "loss_ce_0": 2.0, "loss_giou_4": None, "loss_bbox_10": 4.0, "lr": 1.0}
    assert loss_kinds(record) == {"ce": 3.0, "bbox": 4.0}


def test_a_line_says_losses_speed_and_the_time_that_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.time, "monotonic", lambda: 100.0)
    with RunLog(tmp_path, 10, 40) as log:
        monkeypatch.setattr(logging.time, "monotonic", lambda: 160.0)  # ten steps in a minute, twenty to go
        values = {"step": 20, "lr": 1e-4, "loss": 3.0, "loss_ce": 1.0, "loss_bbox": 2.0, "grad_norm": 5.0}
        log.training({**values, "images_per_second": 2.5, "seconds": 60.0})
    line = "step 20/40  loss 3.000 (ce 1.00 bbox 2.00)  grad 5.00  lr 1.00e-04  2.50 img/s  60 s, 0:02:00 left"
    assert line in capsys.readouterr().out


class Writer:
    """Stands in for TensorBoard's."""

    made: list[Writer] = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        Writer.made.append(self)

    def add_scalar(self, tag, value, step):
        if value == 13.0:
            raise OSError("disk full")
        self.scalars.append((tag, value, step))

    def flush(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def tensorboard(monkeypatch):
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))


def test_tensorboard_gets_what_the_log_gets(tmp_path, capsys, tensorboard):
    with RunLog(tmp_path, 3, 9) as log:
        values = {"step": 4, "lr": 0.5, "loss": 3.0, "loss_ce_0": 3.0, "grad_norm": math.inf}
        log.training({**values, "images_per_second": 2.0, "seconds": 1.0})
        log.record({"kind": "val", "step": 4, "AP": 0.25, "per_class": {"cat": 0.5}, "failed": []})
    (writer,) = Writer.made
    assert writer.folder == str(tmp_path / "tensorboard") and writer.purge_step == 4 and writer.closed
    assert writer.scalars == [
        *(("train/lr", 0.5, 4), ("loss/loss", 3.0, 4), ("loss/loss_ce_0", 3.0, 4)),
        *(("train/images_per_second", 2.0, 4), ("train/seconds", 1.0, 4)),
        *(("validation/AP", 0.25, 4), ("AP of classes/cat", 0.5, 4)),
    ]
    assert capsys.readouterr().out.count("TensorBoard") == 1


def test_tensorboard_that_fails_is_said_once_and_left_alone(tmp_path, capsys, tensorboard):
    with RunLog(tmp_path, 0, 9) as log:
        for step in (1, 2):
            log.record({"kind": "val", "step": step, "AP": 13.0})
    assert capsys.readouterr().out.count("warning: no more TensorBoard files: disk full") == 1
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2] and Writer.made[0].scalars == []


def test_without_tensorboard_nothing_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunLog(tmp_path, 0, 9) as log:
        log.record({"kind": "val", "step": 1, "AP": 0.5})
    assert "TensorBoard" not in capsys.readouterr().out and not (tmp_path / "tensorboard").exists()


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
