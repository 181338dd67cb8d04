"""A run that was stopped and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from sparse_rcnn import SparseRCNN, train
from sparse_rcnn.engine.checkpoint import load_checkpoint, save_checkpoint
from sparse_rcnn.engine.step import TrainStep
from sparse_rcnn.engine.trainer import Trainer
from tests.engine.conftest import TINY
from tests.engine.test_trainer import assert_same, in_steps, timeless

# A checkpoint has the state of everything; what differs between the runs compared is the configuration's steps.
STATE = ("model", "ema", "optimizer", "skipped", "step", "rng", "best_ap", "data", "model_config")
BATCH = 2  # of the six images, so that an epoch is three steps


@pytest.fixture
def quick_config(tiny_config):
    """The tiny run with a backbone of 0.1 million parameters."""
    return lambda **changes: tiny_config(**{"backbone": "lcnet_035", **changes})


def run(config, order: list | None = None, stop_in: int | None = None, signal_number=signal.SIGTERM) -> Trainer:
    """Train; note what each step is given, and send a signal within step ``stop_in`` of this process's part."""
    trainer = Trainer(config)
    step = trainer.train_step

    def noting(images, targets):
        if order is not None:
            pixels = hashlib.sha256(b"".join(image.numpy().tobytes() for image in images)).hexdigest()
            order.append((trainer.step, [target["image_id"] for target in targets], pixels))
        step(images, targets)

    trainer.train_step = noting
    if stop_in is not None:
        in_steps(trainer, {stop_in}, lambda losses: os.kill(os.getpid(), signal_number))
    trainer.run()
    return trainer


def assert_same_runs(first, second) -> None:
    a, b = load_checkpoint(f"{first}/last.pt"), load_checkpoint(f"{second}/last.pt")
    assert len(a["optimizer"]["state"]) > 50
    assert a.keys() == b.keys()
    for key in STATE:
        assert_same(a[key], b[key], key)
    assert timeless(first) == timeless(second)


def assert_same_models(first, second) -> None:
    a, b = SparseRCNN.from_pretrained(first), SparseRCNN.from_pretrained(second)
    assert a.config == b.config
    assert_same(dict(a.state_dict()), dict(b.state_dict()))


@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_epochs_are_seven_and_thirteen(quick_config, scenes, tmp_path, workers):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    seen, seen_in_parts = [], []
    options = {"decay_steps": (45,), "ema_decay": 0.9}
    run(quick_config(output=whole, steps=20 * 3, **options), seen)
    run(quick_config(output=parts, steps=7 * 3, workers=workers, **options), seen_in_parts)
    assert load_checkpoint(f"{parts}/last.pt")["step"] == 21
    run(quick_config(output=parts, steps=20 * 3, workers=workers, resume=True, **options), seen_in_parts)
    assert [step for step, _, _ in seen] == list(range(60)) and len({ids for ids in map(str, seen)}) == 60
    assert seen == seen_in_parts
    assert_same_runs(whole, parts)
    assert_same_models(f"{whole}/model", f"{parts}/model")
    assert len(load_checkpoint(f"{whole}/last.pt")["ema"]) == len(load_checkpoint(f"{whole}/last.pt")["model"])


def test_stops_in_the_middle_of_epochs_and_between_evaluations(quick_config, scenes, tmp_path):
    """Batches of four of six images span epochs; signals end the parts, and the workers change."""
    options = {
        **{"batch_size": 4, "steps": 14, "log_every": 1, "group_shapes": True, "augment": "small"},
        **{"val": str(scenes), "eval_every": 5, "checkpoint_every": 3, "keep_every": 6},
    }
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    seen, seen_in_parts = [], []
    run(quick_config(output=whole, **options), seen)
    ends = []
    for workers, stop_in in ((0, 1), (2, 4), (0, 5), (2, None)):
        trainer = run(quick_config(output=parts, workers=workers, resume=bool(ends), **options), seen_in_parts, stop_in)
        ends.append(trainer.step)
    assert ends == [1, 5, 10, 14]
    assert seen == seen_in_parts
    assert_same_runs(whole, parts)
    for name in ("model", "best", "step_00000006.pt", "step_00000012.pt"):
        assert_same_models(f"{whole}/{name}", f"{parts}/{name}")
    assert sorted(path.name for path in Path(parts).iterdir()) == sorted(path.name for path in Path(whole).iterdir())


def test_kept_checkpoints_are_of_their_steps_and_can_be_gone_back_to(quick_config, tmp_path):
    output = tmp_path / "run"
    run(quick_config(keep_every=2, checkpoint_every=0, steps=5))
    kept = {path.name: load_checkpoint(path)["step"] for path in output.glob("step_*.pt")}
    assert kept == {"step_00000002.pt": 2, "step_00000004.pt": 4}
    last, log = load_checkpoint(output / "last.pt"), timeless(output)
    shutil.copy(output / "step_00000002.pt", output / "last.pt")
    run(quick_config(keep_every=2, checkpoint_every=0, steps=5, resume=True))
    assert_same(load_checkpoint(output / "last.pt")["model"], last["model"])
    assert timeless(output) == log


def test_what_a_kill_left_half_done_is_put_right(quick_config, tmp_path):
    output = tmp_path / "run"
    run(quick_config(steps=1))
    shutil.copytree(output / "model", tmp_path / "before")
    run(quick_config(steps=2, resume=True))
    # As after a kill that came between last.pt and model/, and others while they were written.
    shutil.rmtree(output / "model")
    shutil.copytree(tmp_path / "before", output / "model")
    leftovers = [output / ".last.tmp.pt", output / "model" / ".model.tmp.safetensors"]
    for path in leftovers:
        path.write_bytes(b"half")
    run(quick_config(steps=2, resume=True))
    assert not any(path.exists() for path in leftovers)
    assert_same_models(output / "model", output / "last.pt")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_kill_between_the_files_of_a_step_loses_none_of_them(quick_config, tmp_path, monkeypatch, written):
    """The last step writes a kept checkpoint, last.pt and model/; it is killed when there are ``written`` of them."""
    output, options = tmp_path / "run", {"steps": 4, "checkpoint_every": 1, "keep_every": 4}
    run(quick_config(output=str(tmp_path / "whole"), **options))
    trainer, replace, replaced = Trainer(quick_config(**options)), os.replace, []

    def replace_or_die(source, target):
        if trainer.step == 4 and len(replaced) == written:
            raise Killed
        replace(source, target)
        replaced.extend([target] if trainer.step == 4 else [])

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace_or_die)
        trainer.run()
    assert len(replaced) == written
    run(quick_config(resume=True, **options))
    assert_same_runs(tmp_path / "whole", output)
    for name in ("model", "step_00000004.pt"):
        assert_same_models(tmp_path / "whole" / name, output / name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_too(quick_config, tmp_path, number):
    """As a scheduler sends it to all processes of a job, and a terminal to those in the foreground."""

    def signal_all(losses):
        children = multiprocessing.active_children()
        assert len(children) == 2
        # By another process: of its parent's signals, a worker of PyTorch dies in peace.
        subprocess.run(["kill", f"-{number}", *(str(child.pid) for child in children), str(os.getpid())], check=True)
        time.sleep(0.5)  # in which a worker that dies is noticed

    trainer = Trainer(quick_config(workers=2, checkpoint_every=0))
    in_steps(trainer, {2}, signal_all)
    assert trainer.run() == number
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


def test_a_worker_that_is_killed_ends_the_run_in_one_line_and_it_can_go_on(quick_config, tmp_path, monkeypatch, capsys):
    run(quick_config(output=str(tmp_path / "whole"), steps=8))
    run(quick_config(steps=2))

    def kill_one(step, batch):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.5)

    resume = ["--output", str(tmp_path / "run"), "--resume", "--steps", "8"]
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", kill_one)
        assert train.main([*resume, "--workers", "2"]) == 1
    error = capsys.readouterr().err.strip()
    assert "worker" in error and "ill" in error and "\n" not in error
    assert train.main(resume) == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "run")


@pytest.fixture
def changed(scenes, quick_config, tmp_path):
    """A run of two steps on data that has lost an image since."""
    folder = tmp_path / "data"
    shutil.copytree(scenes, folder)
    run(quick_config(data=str(folder), steps=2))
    (folder / "train" / "000002.jpg").unlink()
    return folder


def test_changed_data_is_refused_with_what_differs(changed, quick_config, tmp_path, capsys):
    before = (tmp_path / "run" / "last.pt").read_bytes()
    message = rf"^data: {changed}.* is not what the run was started on: 1 image gone \(000002\.jpg\)\. Put it back, or"
    with pytest.raises(ValueError, match=message):
        Trainer(quick_config(data=str(changed), steps=4, resume=True))
    assert train.main(["--output", str(tmp_path / "run"), "--resume", "--steps", "4"]) == 2
    assert "1 image gone (000002.jpg)" in capsys.readouterr().err
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_changed_data_is_trained_on_if_told_and_told_once(changed, tmp_path, capsys):
    resume = ["--output", str(tmp_path / "run"), "--resume"]
    assert train.main([*resume, "--steps", "4", "--accept-changed-data"]) == 0
    assert "the data is not what the run was started on: 1 image gone (000002.jpg)" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4
    assert train.main([*resume, "--steps", "5"]) == 0
    assert "not what the run was started on" not in capsys.readouterr().out


def test_weights_of_another_model_are_refused(quick_config, tmp_path):
    run(quick_config(steps=1))
    path = tmp_path / "run" / "last.pt"
    state = load_checkpoint(path)
    state["model_config"]["num_stages"] = TINY["num_stages"] + 1
    del state["format_version"]
    save_checkpoint(path, state)
    with pytest.raises(ValueError, match=r"last\.pt: .*missing head\.stages\.2\."):
        Trainer(quick_config(steps=2, resume=True))
