"""The infer command on many images: workers, an interruption, and several processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sparse_rcnn
from sparse_rcnn import infer
from sparse_rcnn.detections import Detections
from sparse_rcnn.runtime import FILES_PER_WORKER
from sparse_rcnn.shards import PartWriter, RankDied, Shards, merge

ERROR = "sparse_rcnn.infer: error: "
COUNT = 2 * FILES_PER_WORKER + 5  # enough for two workers
TIMEOUT = 600  # seconds; nothing here takes as long, but the machine may be busy
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(sparse_rcnn.__file__).parents[1])}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Here are ``in/`` with pictures of four sizes, the eighth of which is none, and the results."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(1)
    for number in range(COUNT):
        size = ((60, 40), (40, 60), (64, 64), (62, 44))[number % 7 % 4]
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(f"in/{number:03d}.png")
    (tmp_path / "in/007.png").write_bytes(b"no image")
    return tmp_path


def flags(weights, name):
    return [
        *("in", "--weights", str(weights), "--device", "cpu", "--score-threshold", "0"),
        *("--json", f"{name}.json", "--jsonl", f"{name}.jsonl", "--csv", f"{name}.csv"),
    ]


def read(name):
    lines = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
    with open(f"{name}.csv", newline="") as file:
        return json.loads(Path(f"{name}.json").read_text()), lines, list(csv.DictReader(file))


def assert_same_files(name, expected):
    """All three, but for rounding."""
    (coco, lines, rows), (coco_, lines_, rows_) = read(name), read(expected)
    keys = ("image_id", "category_id", "file_name")
    assert [[one[key] for key in keys] for one in coco] == [[one[key] for key in keys] for one in coco_]
    for field in ("bbox", "score"):
        got, want = ([one[field] for one in results] for results in (coco, coco_))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=5e-3)
    assert [line["file_name"] for line in lines] == [line["file_name"] for line in lines_]
    assert [len(line["detections"]) for line in lines] == [len(line["detections"]) for line in lines_]
    assert [(row["file_name"], row["name"]) for row in rows] == [(row["file_name"], row["name"]) for row in rows_]


def test_the_same_files_by_workers_and_by_batches(folder, tiny_weights, capsys):
    for name, more in (("one", ["--workers", "0"]), ("many", ["--workers", "2", "--batch-size", "4"])):
        assert infer.main(flags(tiny_weights, name) + more) == 1
        output = capsys.readouterr()
        assert output.err.count("\n") == 1 and "007.png: not an image" in output.err
        summary = output.out.splitlines()[-1]
        assert summary.startswith(f"{COUNT - 1} images, ") and ", 1 failed in " in summary
        assert summary.endswith(" images/s: the forward is the slower")
    assert len(read("one")[1]) == COUNT - 1
    assert_same_files("many", "one")


def test_the_default_number_of_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert infer._default_workers("cpu") == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert infer._default_workers("cpu") == 0
    monkeypatch.setattr("sparse_rcnn.runtime.pick_device", lambda device: torch.device("cuda"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert infer._default_workers("auto") == 6


def test_few_files_begin_no_worker(folder, tiny_weights, monkeypatch):
    monkeypatch.setattr("sparse_rcnn.data.read_ahead.Worker", None)
    assert infer.main(["in/000.png", "--weights", str(tiny_weights), "--device", "cpu", "--workers", "2"]) == 0


def test_warnings_are_notes(folder, tiny_weights, capsys, monkeypatch):
    monkeypatch.setattr("sparse_rcnn.inference.optimized.cpu_has", lambda dtype: dtype == torch.float32)
    assert infer.main(["in/000.png", "--weights", str(tiny_weights), "--device", "cpu", "--dtype", "bfloat16"]) == 0
    note = "sparse_rcnn.infer: note: this processor has no instructions for bfloat16: computing in float32\n"
    assert capsys.readouterr().err == note


def test_ctrl_c_leaves_the_finished_results(folder, tiny_weights):
    """A real signal to a real process, in the midst of its images."""
    command = [sys.executable, "-m", "sparse_rcnn.infer", *flags(tiny_weights, "r"), "--workers", "2"]
    command += [f"{folder}/in/{number:03d}.png" for number in range(COUNT)] * 30  # far from done when the signal comes
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True,
        # A shell's background job, which the tests may be, ignores the signal, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    said = [process.stdout.readline() for _ in range(3)]
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130, errors + output[-1000:]
    lines = [*said, *output.splitlines()]
    names = [line.split(":")[0] for line in lines[:-1]]
    _, found, _ = read("r")
    assert [line["file_name"] for line in found] == names
    assert 3 <= len(names) < 30 * COUNT
    assert "Traceback" not in errors
    assert sorted(os.listdir()) == ["in", "r.csv", "r.json", "r.jsonl"]


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=TIMEOUT)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch is built without torch.distributed")
def test_two_processes_make_the_files_of_one(folder, tiny_weights):
    assert infer.main([*flags(tiny_weights, "one"), "--quiet"]) == 1
    run = torchrun("-m", "sparse_rcnn.infer", *flags(tiny_weights, "two"), "--batch-size", "3", "--output", "drawn")
    assert run.returncode == 1  # as there: a file is no image
    assert_same_files("two", "one")
    assert sorted(os.listdir("drawn")) == sorted({path.name for path in Path("in").iterdir()} - {"007.png"})
    assert [line for line in run.stderr.splitlines() if line.startswith(ERROR)] == [
        f"{ERROR}in/007.png: not an image of a known format"
    ]
    lines = run.stdout.splitlines()
    assert sum(line.startswith("in/") for line in lines) == COUNT - 1
    assert sum(line.startswith(f"{COUNT - 1} images, ") and ", 1 failed in " in line for line in lines) == 1
    assert {path.suffix for path in Path().glob("two*")} == {".json", ".jsonl", ".csv"}  # no part is left


DYING = """
import os, signal, sys, time
from pathlib import Path
from sparse_rcnn import infer

def record(self, detections, record=infer._Run._record):
    record(self, detections)
    if os.environ["RANK"] == "1" and self.images == 2:
        other = Path("r.json.part0of2.jsonl")  # of a process that may still be starting
        while not (other.exists() and other.stat().st_size):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

infer._Run._record = record
if __name__ == "__main__":
    sys.exit(infer.main())
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch is built without torch.distributed")
def test_a_process_that_dies_is_named_and_the_others_results_kept(folder, tiny_weights):
    Path("dying.py").write_text(DYING)
    run = torchrun("dying.py", *flags(tiny_weights, "r"), "--workers", "0")
    assert run.returncode == 1
    told = [line for line in run.stderr.splitlines() if line.startswith(ERROR) and "rank" in line]
    assert told == [f"{ERROR}rank 1 died; the results of the others are in r.json.part0of2.jsonl"]
    kept = [json.loads(line)["file_name"] for line in Path("r.json.part0of2.jsonl").read_text().splitlines()]
    assert kept == [f"in/{number:03d}.png" for number in range(0, COUNT, 2)][: len(kept)] and kept
    assert not any(Path(f"r{suffix}").exists() for suffix in (".json", ".jsonl", ".csv"))


def stores(count):
    """Processes of one command, by a store in memory."""
    store = torch.distributed.HashStore()
    return [Shards(store, rank, count, rank) for rank in range(count)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch is built without torch.distributed")
def test_values_of_any_size_are_shared():
    first, second = stores(2)
    value = {"sources": [f"{number:0900d}-\udce9" for number in range(10_000)]}
    assert first.share(lambda: value) is value
    assert second.share(None) == value
    assert (first.own("abcde"), second.own("abcde")) == (list("ace"), list("bd"))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch is built without torch.distributed")
def test_figures_are_added_and_the_slow_waited_for():
    first, second = stores(2)
    later = threading.Timer(0.5, second.gather, (["b"], {"images": 3, "decode": 0.5}))
    later.start()
    assert first.gather(["a"], {"images": 2, "decode": 0.25}) == (["a", "b"], {"images": 5, "decode": 0.75})


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch is built without torch.distributed")
@pytest.mark.parametrize("before", [True, False])
def test_the_dead_are_named(monkeypatch, before):
    """When the first process was told to stop, in its own work or while it waited for the others."""
    first, _, third, _ = stores(4)
    monkeypatch.setattr("sparse_rcnn.shards.GRACE", 0.2)
    assert third.gather(["c"], {"images": 1}) is None
    signals = [] if before else [KeyboardInterrupt()]  # torchrun's

    def wait(seconds):
        if signals:
            raise signals.pop()

    monkeypatch.setattr("sparse_rcnn.shards.time.sleep", wait)
    with pytest.raises(RankDied, match="^rank 1, 3 died; the results of the others are in a, c$"):
        first.gather(["a"], {"images": 1}, interrupted=before)


def test_parts_are_merged_in_the_order_of_the_inputs(tmp_path):
    def make(number):
        boxes = np.random.default_rng(number).random((number % 3, 4), dtype=np.float32) * 100
        return Detections(boxes, boxes[:, 0] / 100, np.arange(len(boxes)), ("fish", "crab"), (40, 60 + number))

    writers = [PartWriter(tmp_path / "r.json", Shards(None, rank, 3, rank)) for rank in range(3)]
    for number in range(8):
        if number == 4:
            writers[1].skip("4.png", "no image")
        elif number != 7:  # and the second process was interrupted
            writers[number % 3].add(make(number), f"{number}.png", 10 + number)
    for writer in writers:
        writer.close()
    merged = list(merge([writer.path for writer in writers], ("fish", "crab")))
    assert [(name, image_id) for _, name, image_id in merged] == [(f"{n}.png", 10 + n) for n in (0, 1, 2, 3, 5, 6)]
    for found, name, _ in merged:
        expected = make(int(name[0]))
        np.testing.assert_array_equal(found.boxes, expected.boxes)  # to the last bit
        np.testing.assert_array_equal(found.scores, expected.scores)
        assert found.labels.tolist() == expected.labels.tolist() and found.image_size == expected.image_size
        assert found.to_coco(1) == expected.to_coco(1)
    assert os.listdir(tmp_path) == []


def test_a_video_is_for_one_process(monkeypatch, capsys):
    if not torch.distributed.is_available():
        pytest.skip("PyTorch is built without torch.distributed")
    monkeypatch.setattr(Shards, "join", classmethod(lambda cls: stores(2)[0]))
    assert infer.main(["--video-input", "x.mp4", "--weights", "w"]) == 2
    assert capsys.readouterr().err == f"{ERROR}a video is for one process\n"
