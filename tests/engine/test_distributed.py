"""Several processes: the same as one, whatever is divided among them, and an end to all when one ends."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as torch_distributed

from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.data.loader import train_batches
from sparse_rcnn.engine import distributed
from sparse_rcnn.engine.checkpoint import load_checkpoint
from sparse_rcnn.engine.evaluator import evaluate
from sparse_rcnn.engine.stages import evaluate_stages
from sparse_rcnn.engine.trainer import Trainer
from sparse_rcnn.models import SparseRCNN
from sparse_rcnn.runtime import default_weights
from tests.engine import distributed_worker as worker
from tests.engine.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]

# All wheels of PyTorch for Linux have it; some builds for other systems do not.
pytestmark = pytest.mark.skipif(not torch_distributed.is_available(), reason="PyTorch has no torch.distributed")


def torchrun(*arguments: str, restarts: int = 0) -> subprocess.CompletedProcess:
    """Two processes; what they say."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, f"--max-restarts={restarts}", "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory, scenes) -> Path:
    """The folder of what two processes left."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun("tests.engine.distributed_worker", "everything", str(folder), str(scenes))
    assert done.returncode == 0, done.stderr
    return folder


def unchanged(image, target, generator):
    return image, target


def close(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """The largest difference of a value, as a share of the largest value of its tensor."""
    assert len(first) == len(second) > 60 and [a.shape for a in first] == [b.shape for b in second]
    assert sum(bool(gradient.any()) for gradient in first) > 40
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if len(a)]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) for a, b in pairs)


def apart_when_clipped(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """The largest difference of a value of the gradients as the optimizer gets them: clipped to norm 1."""
    norm = max(first[0][-3].item(), 1)  # of the report: losses, norm, two counts of skips
    values = [(a[:-1], b[:-1]) for a, b in zip(first[1:], second[1:], strict=True) if len(a)]  # without each one's norm
    return max(float((a - b).abs().max()) for a, b in values) / norm


# The class loss is of float32 even in float64. In float32 it is rounding, which the untrained ResNet's layers multiply.
# Where a processor's convolution of one image rounds otherwise than that of two, micro-batches of one are 7e-5 apart.
@pytest.mark.parametrize(("name", "dtype"), worker.CASES)
def test_gradients_do_not_depend_on_how_a_step_is_divided(two, name, dtype):
    tolerances = {1: (1e-5, 1e-6), 2: (2e-4, 2e-5)} if dtype == torch.float32 else {1: (1e-7, 1e-6), 2: (1e-7, 1e-6)}
    results = [torch.load(two / f"gradients{rank}.pt") for rank in range(2)]
    whole = worker.gradients(name, dtype, accumulate=1)
    for accumulate in (1, 2):
        first, second = (result[name, dtype, accumulate] for result in results)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "the processes drift apart"
        tolerance, clipped_tolerance = tolerances[accumulate]
        assert close(whole, first) < tolerance, accumulate
        assert apart_when_clipped(whole, first) < clipped_tolerance, accumulate
    assert close(whole, worker.gradients(name, dtype, accumulate=2)) < tolerances[2][0]


def test_a_run_of_two_processes_is_that_of_one(two, scenes, tmp_path):
    Trainer(worker.tiny_config(str(scenes), str(tmp_path / "one"), val=str(scenes))).run()
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "one", two / "run")
    ]
    assert [(r["kind"], r["step"]) for r in logs[0]] == [("train", 2), ("train", 4), ("train", 6), ("val", 6)]
    for one, other in zip(*logs, strict=True):
        for record in (one, other):
            del record["seconds"], record["kind"]
            record.pop("images_per_second", None)
        assert one.keys() == other.keys()
        if "loss" in one:
            assert other == pytest.approx(one, rel=1e-3)
    one, other = (load_checkpoint(run / "last.pt") for run in (tmp_path / "one", two / "run"))
    assert one["step"] == other["step"] == 6 and len(one["optimizer"]["state"]) == len(other["optimizer"]["state"])
    for name, value in one["model"].items():
        # AdamW's first steps are of the gradient's sign, and some gradients are zero but for rounding.
        distance = (other["model"][name] - value).abs()
        assert distance.max() <= 2 * 6e-4 and distance.mean() < 1e-6, name


def test_what_is_not_finite_in_one_process_is_skipped_by_all_and_named_by_its_images(two, scenes):
    said = [(two / f"poisoned{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    batches = train_batches(open_dataset(str(scenes), "train"), unchanged, 4, seed=0, start_step=2, share=(1, 2))
    ids = ", ".join(str(target["image_id"]) for target in next(batches)[1])
    assert said[0].startswith(f"step 3, image ids {ids}: loss_giou_0 is nan [1 of 6] ")
    assert math.isfinite(float(said[0].split()[-1])), "the weights"
    records = [json.loads(line) for line in (two / "poisoned run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "skipped"] == [3]


def test_evaluation_is_that_of_one_process(two, scenes):
    first, second = (torch.load(two / f"evaluation{rank}.pt", weights_only=False) for rank in range(2))
    model = SparseRCNN.from_pretrained(default_weights())
    sets = open_dataset(str(scenes), "valid"), open_dataset(str(scenes), "valid").without([1, 2])
    alone = [evaluate(model, data, batch_size) for data in sets for batch_size in (1, 2)]
    assert all(result.metrics["AP"] > 0.1 for result in alone)
    assert first[:4] == alone
    assert [result.to_dict() | {"num_detections": 0} for result in alone] == [r.to_dict() for r in second[:4]]
    stages = [evaluate_stages(model, data) for data in sets]
    assert first[4:] == second[4:] == stages and len(stages[0]) == 6


@pytest.fixture
def arguments(scenes, tmp_path) -> list[str]:
    """Of the run of ``worker.tiny_config``, with checkpoints."""
    fields = {"data": scenes, "output": tmp_path / "run", "backbone": "resnet18", "backbone-weights": "none"}
    fields |= {"device": "cpu", "steps": 6, "batch-size": 4, "lr": 1e-4, "log-every": 2, "warmup-steps": 4}
    fields |= {"checkpoint-every": 3}
    flags = [f"--{name}={value}" for name, value in fields.items()]
    return [*flags, "--set", *(f"{name}={value}" for name, value in TINY.items())]


def said(stderr: str) -> list[str]:
    """The errors that the processes said, each up to its parenthesis; none had a traceback."""
    # The launcher's own is of files of torch.
    assert f'File "{ROOT}/sparse_rcnn' not in stderr and f'File "{ROOT}/tests' not in stderr, stderr
    prefix = "sparse_rcnn.train: error: "
    lines = [line for line in stderr.splitlines() if line.startswith(prefix)]
    return [line.removeprefix(prefix).split(" (")[0] for line in lines]


def test_killed_processes_are_started_again_and_end_with_the_same_weights(two, arguments, tmp_path):
    # One is killed before there is a checkpoint, the other after.
    deaths = ["--die", "1:2", "--die", "0:5", "--"]
    done = torchrun("tests.engine.distributed_worker", "train", *deaths, *arguments, restarts=3)
    assert done.returncode == 0, done.stderr
    assert "step 6/6" in done.stdout and done.stdout.count("step 4/6") == 2, done.stdout
    uninterrupted, restarted = (load_checkpoint(run / "last.pt") for run in (two / "run", tmp_path / "run"))
    for name, value in uninterrupted["model"].items():
        assert torch.equal(restarted["model"][name], value), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]
    assert said(done.stderr) == 2 * ["another process of this run ended before its time"]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_end_of_a_job_saves_where_a_process_gets_the_signal_twice(arguments, tmp_path, rank):
    """As of a scheduler that sends SIGTERM to all processes, of which torchrun is one."""
    done = torchrun("tests.engine.distributed_worker", "end", f"{rank}:2", "--", *arguments, "--checkpoint-every=0")
    assert done.returncode != 0  # torchrun's, of the signal
    assert "stopped after step 2 (SIGTERM); continue with --resume" in done.stdout and not said(done.stderr)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


def test_a_restart_does_not_overwrite_or_resume_an_older_run(arguments, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes(b"precious")
    done = torchrun("sparse_rcnn.train", *arguments, restarts=1)
    assert done.returncode != 0
    refusal = f"output: {tmp_path / 'run' / 'last.pt'} exists; pass --resume, or choose another folder"
    assert said(done.stderr) == [refusal, refusal], "one line of each attempt"
    assert (tmp_path / "run" / "last.pt").read_bytes() == b"precious"


def test_an_error_of_one_process_ends_both_with_one_line(scenes, arguments, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    dataset = open_dataset(str(data), "train")
    (first, _) = next(train_batches(dataset, unchanged, 4, seed=0, share=(1, 2)))[1]
    image = dataset.image_path([record["id"] for record in dataset.images].index(first["image_id"]))
    image.write_bytes(image.read_bytes()[:-200])  # what only decoding finds
    done = torchrun("sparse_rcnn.train", *arguments, f"--data={data}")
    assert done.returncode != 0 and "step 2/6" not in done.stdout
    (line,) = said(done.stderr)
    assert str(image) in line


def test_a_device_for_each_process(monkeypatch):
    assert distributed.own_device("cuda:3") == "cuda:3"  # of a single process
    monkeypatch.setattr(distributed, "_several", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [distributed.own_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(ValueError, match="device: expected auto, cpu or cuda for several processes, got 'cuda:0'"):
        distributed.own_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="device: expected a GPU for each process of this machine, got 1 for 2"):
        distributed.own_device("cuda")
