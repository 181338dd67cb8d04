"""Processes that save and train until they are killed; see test_kill.

They are forked from one that has everything imported: a hundred of them then take seconds. It runs on one thread, for
the threads of OpenMP do not survive a fork.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from sparse_rcnn import train
from sparse_rcnn.engine.checkpoint import load_checkpoint
from sparse_rcnn.engine.config import TrainConfig
from sparse_rcnn.engine.trainer import Trainer
from sparse_rcnn.weights import read_config
from sparse_rcnn.weights.atomic import remove_leftovers

KEEP = 3  # every third checkpoint of those that are killed is kept


def fork(work: Callable[[], int]) -> int:
    """Do ``work`` in a process of its own, whose exit status is what it returns; its id."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            status = work()
        finally:
            os._exit(status)
    return child


def kill_savers(index: int, config: TrainConfig, kills: int) -> None:
    """Kill ``kills`` processes that write one checkpoint after another, and look each time at what there is.

    In the checkpoint of step n every tensor is filled with n.
    """
    torch.set_num_threads(1)
    Trainer(config).run()
    trainer = Trainer(TrainConfig(**{**vars(config), "resume": True}))
    output = trainer.output
    seconds = timed(lambda: save(trainer, 1))
    moments, last, hits, between, early = random.Random(0), 1, 0, 0, 0
    for _ in range(kills):
        begun, begin = os.pipe()
        child = fork(lambda first=last + 1, begin=begin: save_for_ever(trainer, first, begin))
        # So many of its writes are begun, and then a part of the time that one takes now: the disk's speed does not
        # decide where the kills fall.
        os.read(begun, 1)
        for _ in range(moments.choice((0, 1, 2, 2))):
            seconds = timed(lambda begun=begun: os.read(begun, 1))
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        os.close(begun)
        os.close(begin)
        hits += any(path.name.startswith(".") for path in output.rglob("*"))
        step, model_step, kept = look(output)
        due = {n for n in range(last + 1, step + 1) if n % KEEP == 0}
        early += kept > due
        assert kept in (due, due | {step + 1}), (last, step, kept)
        assert step >= last and model_step in (step - 1, step), (last, step, model_step)
        between += model_step < step
        last = step
        for folder in (output, output / "model"):  # as the next start does
            remove_leftovers(folder)
    # The kills came after whole checkpoints, while files were written, and between those that belong together.
    assert last > kills / 4 and hits > kills / 10 and between > 0 and early > 0, (last, hits, between, early)


def timed(work: Callable[[], object]) -> float:
    """The seconds that ``work`` takes."""
    start = time.monotonic()
    work()
    return time.monotonic() - start


def fill(trainer: Trainer, step: int) -> None:
    moments = [value for values in trainer.optimizer.state.values() for value in values.values()]
    for tensor in [*trainer.model.state_dict().values(), *moments, trainer.plain_step.skipped]:
        tensor.fill_(step)
    trainer.step = step


def save(trainer: Trainer, step: int) -> None:
    fill(trainer, step)
    trainer.save(keep=step % KEEP == 0)


def save_for_ever(trainer: Trainer, first: int, begin: int) -> int:
    os.write(begin, b".")
    fill(trainer, first - 1)
    trainer.save_model()  # as a resumed run does first
    for step in itertools.count(first):
        os.write(begin, b".")
        save(trainer, step)


def look(output: Path) -> tuple[int, int, set[int]]:
    """The steps of ``last.pt``, of ``model/`` and of the kept checkpoints; each file must be of one step."""
    state = load_checkpoint(output / "last.pt")
    assert_is_of_step(state, state["step"])
    kept = {int(path.stem.removeprefix("step_")): path for path in output.glob("step_*.pt")}
    for step, path in kept.items():
        assert_is_of_step(load_checkpoint(path), step)
        path.unlink()
    read_config(output / "model" / "config.json")
    weights = load_file(output / "model" / "model.safetensors")
    (model_step,) = {value for tensor in weights.values() for value in (tensor.min().item(), tensor.max().item())}
    return state["step"], int(model_step), set(kept)


def assert_is_of_step(state: dict, step: int) -> None:
    moments = [value for values in state["optimizer"]["state"].values() for value in values.values()]
    tensors = [*state["model"].values(), *moments]
    assert len(tensors) > 200
    assert state["step"] == step and state["skipped"] == [step, step]
    assert all((tensor == step).all() for tensor in tensors), step


def kill_training(index: int, arguments: list[str], whole: str, parts: str, kills: int) -> None:
    """Train into ``whole``, and into ``parts`` with ``kills`` of the processes killed and the next ones resuming."""
    torch.set_num_threads(1)
    child = fork(lambda: train.main([*arguments, "--output", whole]))
    assert os.waitpid(child, 0)[1] == 0
    moments, last, killed = random.Random(0), Path(parts, "last.pt"), 0
    while True:
        if last.exists():
            load_checkpoint(last)
        given = ["--output", parts, "--resume"] if last.exists() else [*arguments, "--output", parts]
        child = fork(lambda given=given: train.main(given))
        if killed < kills:
            wait_for_checkpoints(child, last, moments.choice((0, 1, 1, 2)))
            time.sleep(moments.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert status == 0, status
            break
        killed += 1
    assert killed >= 2, killed


def wait_for_checkpoints(child: int, path: Path, count: int) -> None:
    """Until a process has replaced ``path`` so many times, or has ended."""
    before = path.stat().st_mtime_ns if path.exists() else None
    while count > 0 and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now = path.stat().st_mtime_ns if path.exists() else None
        count -= now != before
        before = now
        time.sleep(0.005)
