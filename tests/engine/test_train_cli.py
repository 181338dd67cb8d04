from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import yaml

from sparse_rcnn import evaluate, train
from sparse_rcnn.engine.arguments import TrainParser, read_arguments, recipes
from sparse_rcnn.engine.checkpoint import load_checkpoint
from sparse_rcnn.engine.config import TrainConfig
from sparse_rcnn.engine.step import TrainStep
from tests.full_disk import files_of_at_most

QUICK = ["--backbone", "resnet18", "--backbone-weights", "none", "--steps", "2", "--batch-size", "1", "--device", "cpu"]
SET = ["--set", "num_stages=2", "num_proposals=10", "hidden_dim=32", "num_heads=4", "min_size=64", "max-size=96"]


@pytest.fixture
def run(scenes, tmp_path):
    """Calls ``train`` on the scenes; gives (exit code, output folder)."""

    def call(*more) -> int:
        return train.main(["--data", str(scenes), "--output", str(tmp_path / "run"), *QUICK, *SET, *more])

    return call


def one_line_error(capsys, command) -> str:
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"sparse_rcnn.{command}: error: ") and "\n" not in error
    return error


def config_of(*arguments: str) -> TrainConfig:
    return train.config_from_flags(read_arguments(["--data", "d", "--output", "o", *arguments]))


def test_every_field_is_a_flag_with_the_default_of_the_dataclass():
    flags = {action.dest for action in TrainParser()._actions if action.option_strings}
    assert flags - {"help", "config", "print_config"} == {field.name for field in dataclasses.fields(TrainConfig)}
    assert config_of() == TrainConfig(data="d", output="o")
    assert read_arguments(["--output", "o", "--no-crop"]) == {"output": "o", "crop": False}, "nothing that is not given"


def test_flags_are_typed():
    arguments = "--steps 7 --lr 3e-4 --decay-steps 4 6 --min-sizes 64 80 --max-size 96 --crop"
    arguments += " --set a=1 b-c=x --set d=[1,2] e=null f=1e-3 --time-limit 1.5 --val v --no-resume"
    assert config_of(*arguments.split()) == TrainConfig(
        **{"data": "d", "output": "o", "steps": 7, "lr": 3e-4, "decay_steps": (4, 6), "min_sizes": (64, 80)},
        **{"set": {"a": 1, "b_c": "x", "d": [1, 2], "e": None, "f": 1e-3}},
        **{"max_size": 96, "crop": True, "time_limit": 1.5, "val": "v"},
    )


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 5\nbatch_size: 4\nmin_sizes: [64, 80]\nset: {num_stages: 3, min_size: 64}\n")
    return str(path)


def test_files_and_flags_are_laid_over_each_other(mine):
    config = config_of("--config", "paper_300", "--config", mine, "--epochs", "12", "--set", "min_size=96")
    assert (config.preset, config.crop, config.base_lr, config.base_batch) == ("r50_300", True, 2.5e-5, 16)
    assert (config.epochs, config.batch_size, config.min_sizes) == (12, 4, (64, 80))
    assert config.set == {"num_stages": 3, "min_size": 96}
    assert config_of("--epochs", "12", "--config", mine).epochs == 5


def test_the_printed_configuration_is_the_one_that_runs(mine, tmp_path, capsys):
    arguments = ("--config", "small", "--config", mine, "--lr", "1e-4", "--decay-steps", "3", "9", "--set", "a=[1, 2]")
    with pytest.raises(SystemExit) as exit_:
        read_arguments([*arguments, "--print_config"])
    printed = capsys.readouterr().out
    assert exit_.value.code == 0 and yaml.safe_load(printed)["decay_steps"] == [3, 9]
    assert yaml.safe_load(printed)["data"] is None
    (tmp_path / "printed.yaml").write_text(printed)
    again = ["--config", str(tmp_path / "printed.yaml"), "--output", "o"]
    with pytest.raises(ValueError, match="--data: expected a folder or file"):
        train.config_from_flags(read_arguments(again))
    assert train.config_from_flags(read_arguments([*again, "--data", "d"])) == config_of(*arguments)


def test_every_recipe_is_one():
    assert recipes() == ["paper_100", "paper_300", "small"]
    paper, small = config_of("--config", "paper_100"), config_of("--config", "small")
    assert config_of("--config", "paper_300") == dataclasses.replace(paper, preset="r50_300", crop=True)
    assert (paper.preset, paper.epochs, paper.batch_size) == ("r50_100", 36, 16)
    assert (paper.base_lr, paper.base_batch) == (2.5e-5, 16)
    assert (paper.weight_decay, paper.clip_norm, paper.warmup_steps, paper.warmup_factor) == (1e-4, 1.0, 1000, 0.01)
    assert (paper.augment, paper.flip, paper.min_sizes, paper.ema_decay) == ("paper", 0.5, None, 0.0)
    assert (small.preset, small.augment, small.base_batch) == ("small", "small", 16) and small.ema_decay > 0.99


def test_train_resume_and_evaluate(run, scenes, tmp_path, capsys):
    assert run() == 0
    assert load_checkpoint(tmp_path / "run" / "last.pt")["model_config"]["max_size"] == 96
    assert train.main(["--output", str(tmp_path / "run"), "--resume", "--steps", "3"]) == 0
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3
    assert load_checkpoint(tmp_path / "run" / "last.pt")["train_config"]["batch_size"] == 1
    capsys.readouterr()

    files = [tmp_path / name for name in ("metrics.json", "detections.json")]
    arguments = ["--data", str(scenes), "--weights", str(tmp_path / "run" / "model"), "--device", "cpu"]
    assert evaluate.main([*arguments, "--json", str(files[0]), "--detections", str(files[1])]) == 0
    printed = capsys.readouterr().out
    metrics, detections = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    assert list(metrics["metrics"]) == names
    table = dict(line.split() for line in printed.split("\n\n")[0].splitlines())
    assert {name: float(value) for name, value in table.items()} == {
        name: pytest.approx(metrics["metrics"][name], abs=5e-5) for name in names
    }
    assert len(detections) == metrics["num_detections"] > 0
    assert detections[0].keys() == {"image_id", "category_id", "bbox", "score"}
    for name in metrics["per_class"]:
        assert f"\n{name} " in printed


def test_what_is_given_on_resume_replaces_what_would_win_over_it(run, tmp_path):
    assert run() == 0
    resume = ["--output", str(tmp_path / "run"), "--resume"]
    config = train.config_from_flags(read_arguments([*resume, "--epochs", "3", "--base-lr", "1e-4"]))
    assert (config.steps, config.epochs, config.lr, config.base_lr) == (None, 3, None, 1e-4)
    config = train.config_from_flags(read_arguments([*resume, "--lr", "1e-5"]))
    assert (config.steps, config.lr, config.batch_size) == (2, 1e-5, 1)


def test_what_a_run_is_made_of_cannot_change_on_resume(run, tmp_path, capsys):
    assert run() == 0
    capsys.readouterr()
    assert train.main(["--output", str(tmp_path / "run"), "--resume", "--batch-size", "4"]) == 2
    assert "--batch-size: the run was started with 1, got 4" in one_line_error(capsys, "train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "o"], "--data: expected a folder or file"),
        (["--data", "d"], "--output: expected a folder"),
        (["--data", "absent", "--output", "o"], "absent"),
        (["--data", "d", "--output", "o", "--lr", "0"], "lr: expected a positive number, got 0.0"),
        (["--data", "empty.json", "--output", "o"], "data: expected at least one image, got none in empty.json"),
        (
            ["--output", "absent", "--resume"],
            "absent/last.pt: expected a training checkpoint (.safetensors, .pth, .pt, .pkl), there is no",
        ),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "empty.json").write_text(json.dumps(empty), encoding="utf-8")
    assert train.main(arguments) == 2
    assert message in one_line_error(capsys, "train")
    assert [path.name for path in tmp_path.iterdir()] == ["empty.json"]  # nothing is left behind


@pytest.mark.parametrize(
    ("main", "name", "arguments", "message"),
    [
        (train.main, "train", ["--steps", "many"], "steps: expected int or null, got many"),
        (train.main, "train", ["--steps"], "argument --steps: expected one argument"),
        (train.main, "train", ["--stepz", "3"], "--stepz: no such flag (did you mean --steps?)"),
        (train.main, "train", ["--batch_size", "3"], "--batch_size: no such flag (did you mean --batch-size?)"),
        (train.main, "train", ["--qqqqq", "3"], "--qqqqq: no such flag"),
        (train.main, "train", ["--set", "num_proposals"], "--set: expected KEY=VALUE, got 'num_proposals'"),
        (
            train.main,
            "train",
            ["--decay-steps", "4", "x"],
            "decay_steps: expected tuple[int, ...] or null, got [4, 'x']",
        ),
        (train.main, "train", ["--config", "paper_30"], "got 'paper_30' (did you mean paper_300?)"),
        (evaluate.main, "evaluate", ["--data", "d"], "--weights"),
    ],
)
def test_flags_that_do_not_parse_are_one_line_and_exit_2(main, name, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert one_line_error(capsys, name).endswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 4", "error: batchsize: no such field (did you mean batch_size?)"),
        ("lr: many", "bad.yaml: lr: expected float or null, got many"),
        ("min_sizes: 64", "bad.yaml: min_sizes: expected tuple[int, ...] or null, got 64"),
        ("crop: 3", "bad.yaml: Value not boolean: 3."),
        ("set: 3", "bad.yaml: set: expected dict[str, Any], got 3"),
        ("- 3", "bad.yaml: Unexpected config: - 3"),
        ("data: [d", "bad.yaml: Problems parsing config: while parsing a flow sequence"),
        ("\x00", "bad.yaml: "),
    ],
)
def test_files_that_do_not_parse_are_one_line_and_exit_2(text, message, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit_:
        train.main(["--config", str(tmp_path / "bad.yaml")])
    assert exit_.value.code == 2
    assert message in one_line_error(capsys, "train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "r50_30"], "got 'r50_30' (did you mean r50_300?)"),
        (["--set", "num_proposal=5"], "config: unknown fields num_proposal (did you mean num_proposals?)"),
    ],
)
def test_names_that_no_model_has_are_one_line_and_exit_2(arguments, message, scenes, tmp_path, capsys):
    assert train.main(["--data", str(scenes), "--output", str(tmp_path / "run"), *arguments]) == 2
    assert one_line_error(capsys, "train").endswith(message)


def test_a_cuda_graph_needs_a_gpu(run, tmp_path, capsys):
    assert run("--cuda-graph") == 2
    assert "cuda_graph: expected a CUDA device, got cpu" in one_line_error(capsys, "train")
    assert not (tmp_path / "run").exists()


def test_a_training_image_that_cannot_be_read_is_named_and_exits_1(write_coco, tmp_path, capsys):
    folder = write_coco({1: (64, 64)}, {1: "cat"}, [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 30, 30]}])
    path = folder / "valid" / "1.png"
    path.write_bytes(path.read_bytes()[:-30])  # a good header
    output = str(tmp_path / "run")
    code = train.main(["--data", str(folder / "valid.json"), "--output", output, *QUICK, *SET])
    assert code == 1
    assert "1.png" in one_line_error(capsys, "train")


def test_a_full_disk_exits_1_and_keeps_the_checkpoint(run, tmp_path, capsys):
    assert run() == 0
    capsys.readouterr()
    last = tmp_path / "run" / "last.pt"
    with files_of_at_most(last.stat().st_size // 2):  # the log has room, and model/ too
        assert train.main(["--output", str(tmp_path / "run"), "--resume", "--steps", "3"]) == 1
    message = f"{last}: cannot write the checkpoint (File too large); the one before is as it was"
    assert one_line_error(capsys, "train") == f"sparse_rcnn.train: error: {message}"
    assert load_checkpoint(last)["step"] == 2
    assert train.main(["--output", str(tmp_path / "run"), "--resume", "--steps", "3"]) == 0
    assert load_checkpoint(last)["step"] == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_only_an_interrupt_is_a_failure(run, tmp_path, monkeypatch, number, code):
    step = TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", lambda *arguments: (step(*arguments), os.kill(os.getpid(), number)))
    assert run("--checkpoint-every", "0") == code
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 1


def test_a_time_limit_is_no_failure(run, tmp_path):
    assert run("--time-limit", "0", "--checkpoint-every", "0") == 0
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 1


def test_a_damaged_checkpoint_is_one_line_and_exits_2(run, tmp_path, capsys):
    assert run() == 0
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    capsys.readouterr()
    assert train.main(["--output", str(tmp_path / "run"), "--resume"]) == 2
    error = one_line_error(capsys, "train")
    assert error.startswith(f"sparse_rcnn.train: error: {last}: expected a training checkpoint")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "absent", "--weights", "w"], "absent"),
        (["--data", "{scenes}", "--weights", "absent"], "absent"),
        (["--data", "{scenes}", "--weights", "w", "--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--data", "{scenes}", "--weights", "w", "--nms", "2"], "--nms: expected a number within 0..1, got 2.0"),
        (["--data", "{scenes}", "--weights", "w", "--device", "gpu"], "device: expected one that is here, got 'gpu'"),
    ],
)
def test_evaluate_says_what_is_wrong_and_exits_2(arguments, message, scenes, capsys):
    assert evaluate.main([argument.format(scenes=scenes) for argument in arguments]) == 2
    assert message in one_line_error(capsys, "evaluate")


def test_evaluate_exits_1_on_an_unreadable_image_after_the_table(run, write_coco, tmp_path, capsys):
    assert run() == 0
    folder = write_coco(
        {1: (64, 64), 2: (64, 64)},
        {1: "cube"},
        [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 30, 30]}],
    )
    (folder / "valid" / "2.png").write_bytes(b"no picture")
    capsys.readouterr()
    arguments = ["--data", str(folder), "--weights", str(tmp_path / "run" / "model"), "--device", "cpu"]
    assert evaluate.main(arguments) == 1
    captured = capsys.readouterr()
    assert "AP50" in captured.out and "cube" in captured.out
    *named, summary = captured.err.strip().splitlines()
    assert len(named) == 1 and "2.png" in named[0]
    assert summary == "sparse_rcnn.evaluate: error: 1 of 2 images could not be read; they count as empty"
