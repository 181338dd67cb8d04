"""The infer command: exit codes, files, failures among good images, the official demo's flags."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import sparse_rcnn
from sparse_rcnn import SparseRCNN
from sparse_rcnn.infer import describe, main
from sparse_rcnn.results import AtomicFile

ERROR = "sparse_rcnn.infer: error: "


@pytest.fixture
def images(tmp_path, monkeypatch, write_image):
    monkeypatch.chdir(tmp_path)
    for name, size in (("1.jpg", (40, 60)), ("2.png", (60, 40)), ("sub/1.jpg", (30, 100))):
        write_image(tmp_path / "in" / name, *size)
    return tmp_path


def _infer(*arguments):
    return main([str(argument) for argument in (*arguments, "--weights", "w", "--device", "cpu")])


def test_table_and_summary(images, known_weights, capsys):
    assert _infer("in") == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0] == "in/1.jpg: 1 fish 0.90, 1 crab 0.80, 1 star 0.60"
    assert lines[1] == "in/2.png: 1 fish 0.90, 1 crab 0.80, 1 star 0.60"
    assert lines[2].startswith("2 images, 6 detections in ")
    for phase in ("decode", "preprocess", "forward", "postprocess"):
        assert phase in lines[2]
    assert output.err == ""  # no bar where there is no terminal


def test_quiet(images, known_weights, capsys):
    assert _infer("in", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_selection_flags(images, known_weights, capsys):
    assert _infer("in/1.jpg", "--score-threshold", "0", "--classes", "fish,2", "--nms", "0.5", "--top-k", "9") == 0
    assert capsys.readouterr().out.startswith("in/1.jpg: 1 fish 0.90, 1 star 0.60\n")
    assert _infer("in/1.jpg", "--score-threshold", "0", "--top-k", "3", "--batch-size", "4") == 0
    assert capsys.readouterr().out.startswith("in/1.jpg: 1 fish 0.90, 1 crab 0.80, 1 star 0.60\n")


def test_json_jsonl_csv(images, known_weights):
    code = _infer("in", "--recursive", *("--json", "out/r.json", "--jsonl", "out/r.jsonl", "--csv", "out/r.csv"))
    assert code == 0
    results = json.loads((images / "out/r.json").read_text())
    assert len(results) == 9
    assert {key: results[0][key] for key in ("image_id", "category_id", "file_name")} == {
        "image_id": 0,  # 1.jpg is there twice
        "category_id": 1,
        "file_name": "in/1.jpg",
    }
    np.testing.assert_allclose(results[0]["bbox"], [15, 10, 30, 10], atol=1e-4)
    np.testing.assert_allclose(results[6]["bbox"], [25, 7.5, 50, 7.5], atol=1e-4)
    lines = [json.loads(line) for line in (images / "out/r.jsonl").read_text().splitlines()]
    assert [(line["image_id"], line["file_name"], line["height"], line["width"]) for line in lines] == [
        *((0, "in/1.jpg", 40, 60), (1, "in/2.png", 60, 40), (2, "in/sub/1.jpg", 30, 100)),
    ]
    assert [row["name"] for row in lines[2]["detections"]] == ["fish", "crab", "star"]
    rows = list(csv.DictReader(io.StringIO((images / "out/r.csv").read_text())))
    assert len(rows) == 9
    assert rows[3] == {
        **{"file_name": "in/2.png", "width": "40", "height": "60", "label": "0", "name": "fish", "score": "0.9000"},
        **{"x1": "10.00", "y1": "15.00", "x2": "30.00", "y2": "30.00"},
    }
    assert sorted(os.listdir(images / "out")) == ["r.csv", "r.json", "r.jsonl"]  # nothing temporary is left


def test_numbered_files_give_the_image_ids(images, known_weights):
    assert _infer("in", "--json", "r.json", "--quiet") == 0
    assert {result["image_id"] for result in json.loads((images / "r.json").read_text())} == {1, 2}


def test_nothing_found_is_an_empty_list(images, known_weights, capsys):
    assert _infer("in/1.jpg", "--score-threshold", "0.99", "--json", "r.json") == 0
    assert json.loads((images / "r.json").read_text()) == []
    assert capsys.readouterr().out.startswith("in/1.jpg: nothing\n1 image, 0 detections in")


def test_drawn_images_and_strips(images, known_weights):
    assert _infer("in", "--recursive", "--output", "out", "--stages", "--jsonl", "r.jsonl", "--quiet") == 0
    drawn = sorted(path.relative_to(images / "out").as_posix() for path in (images / "out").rglob("*.*"))
    assert drawn == ["1.jpg", "1.stages.jpg", "2.png", "2.stages.png", "sub/1.jpg", "sub/1.stages.jpg"]
    before, after = Image.open(images / "in/2.png"), Image.open(images / "out/2.png")
    assert before.size == after.size == (40, 60)
    assert not np.array_equal(np.asarray(before), np.asarray(after))
    strip = Image.open(images / "out/2.stages.png")
    assert strip.width == 3 * (80 + 8) + 8  # the proposals and two stages, at twice the size
    line = json.loads((images / "r.jsonl").read_text().splitlines()[0])
    assert np.shape(line["stage_boxes"]) == (2, 5, 4)
    assert line["proposal_index"] == [4, 3, 2]


def test_equal_names_from_two_directories(images, known_weights):
    assert _infer("in/1.jpg", "in/sub/1.jpg", "--output", "out", "--quiet") == 0
    assert Image.open(images / "out/1.jpg").size == (60, 40)
    assert Image.open(images / "out/sub/1.jpg").size == (100, 30)


def test_one_image_into_one_file(images, known_weights, capsys):
    assert _infer("in/1.jpg", "--output", "drawn.png", "--quiet") == 0
    assert Image.open(images / "drawn.png").size == (60, 40)
    assert _infer("in", "--output", "drawn.png") == 2
    assert capsys.readouterr().err == f"{ERROR}--output: expected a directory for 2 images, got the file drawn.png\n"


@pytest.mark.parametrize("output", ["in", "in/sub/.."])
def test_inputs_are_never_overwritten(images, known_weights, capsys, output):
    before = (images / "in/1.jpg").read_bytes()
    assert _infer("in", "--output", output) == 2
    assert "would overwrite an input" in capsys.readouterr().err
    assert (images / "in/1.jpg").read_bytes() == before


@pytest.fixture
def bad_files(images):
    (images / "in/0-empty.jpg").touch()
    (images / "in/3-text.png").write_text("no image")
    (images / "in/4-cut.jpg").write_bytes((images / "in/1.jpg").read_bytes()[:300])
    return images


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_bad_files_are_named_and_the_rest_is_done(bad_files, known_weights, capsys, batch_size):
    code = _infer("in", "gone.jpg", "--batch-size", batch_size, "--csv", "r.csv", "--output", "out")
    assert code == 1
    output = capsys.readouterr()
    errors = output.err.splitlines()
    assert len(errors) == 4
    for error, name in zip(errors, ("gone.jpg", "0-empty.jpg", "3-text.png", "4-cut.jpg"), strict=True):
        assert error.startswith(ERROR) and name in error
    assert "2 images, 6 detections, 4 failed" in output.out
    rows = list(csv.DictReader(io.StringIO((bad_files / "r.csv").read_text())))
    assert [row["file_name"] for row in rows] == ["in/1.jpg"] * 3 + ["in/2.png"] * 3
    assert sorted(os.listdir(bad_files / "out")) == ["1.jpg", "2.png"]


def test_nothing_usable(bad_files, known_weights, capsys):
    assert _infer("in/0-empty.jpg", "--json", "r.json") == 1
    assert json.loads((bad_files / "r.json").read_text()) == []
    assert "0 images, 0 detections, 1 failed" in capsys.readouterr().out


def test_stdin_and_globs(images, known_weights, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"in/sub/1.jpg\nin/2.png\n")))
    assert _infer("-") == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["in/sub/1.jpg", "in/2.png"]
    assert _infer("in/**/*.jpg") == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["in/1.jpg", "in/sub/1.jpg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected an INPUT, --video-input or --webcam; -h tells more"),
        (["in", "--webcam"], "images, --video-input and --webcam exclude each other"),
        (["in", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["in", "--top-k", "many"], "argument --top-k: invalid int value: 'many'"),
        (["in", "--dtype", "int8"], "argument --dtype: invalid choice"),
        (["in", "--score-threshold", "2"], "score_threshold: expected a number within 0..1, got 2.0"),
        (["in", "--batch-size", "0"], "batch_size: expected an integer >= 1, got 0"),
        (["in", "--classes", "fish,whale"], "classes: 'whale' is unknown, the model knows fish, crab, star (or 0..2)"),
        (["in", "--stages"], "--stages: needs images and --output DIR"),
        (["nothing-here"], "no input matched: nothing-here: no such file or directory"),
        (["void"], "no input matched: void: no images in this directory (--recursive looks deeper)"),
        (["*.bmp", "x.png"], "no input matched: *.bmp: the pattern matches nothing; x.png: no such file or directory"),
        (["in", "--json", "in"], "in: expected a file, it is a directory"),
        (["in", "--json", "r.json", "--csv", "in/1.jpg/r.csv"], "in/1.jpg"),
        (["in", "--output", "in/1.jpg/x"], "in/1.jpg"),
        (["in", "--device", "toaster"], "device: expected one that is here, got 'toaster'"),
        (["in", "--opts", "MODEL.WEIGHTS"], "--opts: expected pairs KEY VALUE, got MODEL.WEIGHTS"),
        (["--video-input", "gone.mp4"], ""),
    ],
)
def test_usage_errors_are_one_line(images, known_weights, capsys, arguments, message):
    (images / "void").mkdir()
    before = sorted(images.rglob("*"))
    # --opts takes all that follows it, so that the weights stand in front here.
    assert main(["--weights", "w", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(ERROR) and message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert sorted(images.rglob("*")) == before


def test_missing_weights(images, capsys):
    assert main(["in", "--weights", "no/such/model"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(ERROR) and "no/such/model" in error and error.count("\n") == 1


def test_flags_of_the_official_demo(images, monkeypatch, detector, capsys):
    loaded = []
    monkeypatch.setattr(SparseRCNN, "from_pretrained", classmethod(lambda cls, path: loaded.append(path) or detector))
    code = main(
        ["--config-file", "projects/SparseRCNN/configs/sparsercnn.res50.100pro.3x.yaml"]
        + ["--input", "in/1.jpg", "in/2.png", "--output", "out", "--confidence-threshold", "0.7"]
        + ["--opts", "MODEL.WEIGHTS", "model.pth", "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "640"]
    )
    assert code == 0
    output = capsys.readouterr()
    assert loaded == ["model.pth"]
    assert output.out.splitlines()[0] == "in/1.jpg: 1 fish 0.90, 1 crab 0.80"
    assert output.err.splitlines() == [
        "sparse_rcnn.infer: note: --opts: ignored INPUT.MIN_SIZE_TEST: the checkpoint itself tells the configuration",
        "sparse_rcnn.infer: note: --config-file is ignored: the checkpoint itself tells the configuration",
    ]
    assert sorted(os.listdir(images / "out")) == ["1.jpg", "2.png"]


def test_inputs_may_stand_anywhere(images, known_weights, capsys):
    assert main(["--quiet", "in/1.jpg", "--weights", "w", "in/2.png", "--csv", "r.csv", "--input", "in/sub"]) == 0
    names = [line.split(",")[0] for line in (images / "r.csv").read_text().splitlines()[1::3]]
    assert names == ["in/1.jpg", "in/2.png", "in/sub/1.jpg"]


def test_interrupt_keeps_what_was_done(images, known_weights, capsys):
    known_weights.register_forward_pre_hook(_raise_at(known_weights, KeyboardInterrupt()))
    assert _infer("in", "--jsonl", "r.jsonl", "--json", "r.json", "--output", "out") == 130
    assert [json.loads(line)["file_name"] for line in (images / "r.jsonl").read_text().splitlines()] == ["in/1.jpg"]
    assert len(json.loads((images / "r.json").read_text())) == 3
    assert os.listdir(images / "out") == ["1.jpg"]
    assert "1 image, 3 detections in" in capsys.readouterr().out


def test_a_failing_model_keeps_what_was_done(images, known_weights, capsys):
    known_weights.register_forward_pre_hook(_raise_at(known_weights, RuntimeError("out of\nmemory")))
    assert _infer("in", "--json", "r.json") == 1
    assert len(json.loads((images / "r.json").read_text())) == 3
    assert capsys.readouterr().err == f"{ERROR}out of memory\n"


def _raise_at(module, error):
    def hook(*_):
        if len(module.batches) == 1:
            raise error

    return hook


def test_a_picture_that_cannot_be_written_fails_alone(images, known_weights, capsys):
    (images / "out/2.png").mkdir(parents=True)
    assert _infer("in", "--output", "out", "--csv", "r.csv") == 1
    assert "2.png" in capsys.readouterr().err
    assert (images / "out/1.jpg").is_file()
    assert len((images / "r.csv").read_text().splitlines()) == 7
    assert sorted(os.listdir(images / "out")) == ["1.jpg", "2.png"]


def test_files_are_replaced_only_when_complete(tmp_path):
    path = tmp_path / "new" / "r.txt"
    first = AtomicFile(path)
    first.file.write("one")
    assert not path.exists()
    first.commit()
    assert path.read_text() == "one"
    second = AtomicFile(path)
    second.file.write("two")
    second.file.flush()
    assert path.read_text() == "one"
    second.discard()
    assert os.listdir(path.parent) == ["r.txt"]


def test_file_names_that_are_no_text(images, known_weights, write_image):
    name = os.fsdecode(b"in/caf\xe9.png")
    write_image(images / "x.png").rename(images / name)
    assert _infer(name, "--csv", "r.csv", "--json", "r.json", "--output", "out") == 0
    assert b"in/caf\xe9.png,60,40,0,fish" in (images / "r.csv").read_bytes()
    assert os.listdir(os.fsencode(images / "out")) == [b"caf\xe9.png"]


def test_long_lists_of_scores_are_cut(seven_fish):
    assert describe(seven_fish) == "7 fish 0.90 0.80 0.70 0.60 0.50 ..."


@pytest.fixture
def seven_fish():
    from sparse_rcnn.detections import Detections

    return Detections([[0, 0, 1, 1]] * 7, np.linspace(0.9, 0.3, 7), [0] * 7, ("fish",), (9, 9))


def test_video(images, known_weights, monkeypatch, capsys):
    """Frames of a stand-in for PyAV: the command's side of video, without the extra."""
    pixels = [np.full((41, 60, 3), shade, np.uint8) for shade in (10, 20, 30)]
    written = []

    class Reader:
        name, rate, frames = "clip.avi", 25, 3

        def __init__(self, path):
            assert path == "clip.avi"

        def __iter__(self):
            return iter(pixels)

        def close(self):
            written.append("reader closed")

    class Writer:
        def __init__(self, path, rate):
            written.append((str(path), rate))

        def add(self, picture):
            written.append(picture.size)

        def close(self):
            written.append("writer closed")

    from sparse_rcnn import video

    monkeypatch.setattr(video, "VideoReader", Reader)
    monkeypatch.setattr(video, "VideoWriter", Writer)
    assert main(["--video-input", "clip.avi", "--weights", "w", "--output", "out", "--json", "r.json"]) == 0
    assert written == [("out/clip.mp4", 25), *[(60, 41)] * 3, "reader closed", "writer closed"]
    results = json.loads((images / "r.json").read_text())
    assert [result["image_id"] for result in results[::3]] == [0, 1, 2]
    assert results[-1]["file_name"] == "clip.avi#2"
    assert capsys.readouterr().out.splitlines()[1].startswith("clip.avi#1: 1 fish 0.90")


def test_video_without_pyav(images, known_weights, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    for flags in (["--webcam"], ["--video-input", "clip.avi"]):
        assert main([*flags, "--weights", "w"]) == 2
        assert capsys.readouterr().err == f"{ERROR}video: needs PyAV (pip install av)\n"


def test_the_command_itself(images, tiny_weights):
    (images / "in/bad.jpg").touch()
    run = subprocess.run(
        [sys.executable, "-m", "sparse_rcnn.infer", "in", "--weights", str(tiny_weights), "--score-threshold", "0"]
        + ["--device", "cpu", "--json", "r.json", "--output", "out", "--stages"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(sparse_rcnn.__file__).parents[1])},
    )
    assert run.returncode == 1
    assert run.stderr.startswith(ERROR) and "bad.jpg" in run.stderr and run.stderr.count("\n") == 1
    count = len(json.loads((images / "r.json").read_text()))
    assert 10 < count <= 20  # ten proposals an image, some of them outside it
    assert run.stdout.splitlines()[-1].startswith(f"2 images, {count} detections, 1 failed in ")
    assert sorted(os.listdir(images / "out")) == ["1.jpg", "1.stages.jpg", "2.png", "2.stages.png"]


def test_optimized_or_not_is_the_same(images, tiny_weights, capsys):
    results = []
    for flags in ([], ["--no-optimize"], ["--warmup", "40x60,8x8", "--dtype", "float32"]):
        command = [
            "in",
            "--weights",
            str(tiny_weights),
            "--device",
            "cpu",
            "--score-threshold",
            "0",
            "--json",
            "r.json",
        ]
        assert main([*command, *flags]) == 0
        results.append(json.loads((images / "r.json").read_text()))
    for other in results[1:]:
        assert [(r["image_id"], r["category_id"]) for r in other] == [
            (r["image_id"], r["category_id"]) for r in results[0]
        ]
        for mine, theirs in zip(results[0], other, strict=True):
            assert mine["score"] == pytest.approx(theirs["score"], rel=1e-4)
            assert mine["bbox"] == pytest.approx(theirs["bbox"], rel=1e-4, abs=0.02)


@pytest.mark.parametrize("text", ["800", "axb", "0x5", "5x5,", "1x2x3"])
def test_wrong_warmup(images, known_weights, capsys, text):
    assert main(["in", "--weights", "w", "--warmup", text]) == 2
    assert f"--warmup: expected HEIGHTxWIDTH, more separated by commas, got '{text}'" in capsys.readouterr().err
