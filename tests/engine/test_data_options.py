"""What training does with its data: formats, the report before the first step, cache, grouping and augmentation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from sparse_rcnn import evaluate, train
from sparse_rcnn.engine.trainer import TrainConfig, Trainer
from tests.data_formats import WRITERS, make_splits


def losses_of(config: TrainConfig) -> list[dict[str, float]]:
    """The logged figures of a run, but for its timings."""
    Trainer(config).run()
    log = (Path(config.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in log]


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    splits = make_splits()
    return {name: write(tmp_path_factory.mktemp(name), splits) for name, write in WRITERS.items()}


def test_copies_in_every_format_train_to_identical_losses(copies, tiny_config, tmp_path):
    runs = {
        name: losses_of(
            tiny_config(data=str(folder), val=str(folder), output=str(tmp_path / name), steps=10, crop=True)
        )
        for name, folder in copies.items()
    }
    assert [record["kind"] for record in runs["coco"]] == ["train"] * 10 + ["val"]
    assert len({record["loss"] for record in runs["coco"][:10]}) == 10
    for name, records in runs.items():
        assert records == runs["coco"], name


def test_neither_cache_nor_workers_change_the_losses(scenes, tiny_config, tmp_path):
    plain = losses_of(tiny_config(output=str(tmp_path / "plain"), steps=4))
    assert losses_of(tiny_config(output=str(tmp_path / "cached"), steps=4, cache_mb=1, workers=2)) == plain


@pytest.mark.parametrize("augment", ["small", "mosaic"])
def test_grouping_and_augmentation_resume_exactly(tiny_config, tmp_path, augment):
    options = {"group_shapes": True, "augment": augment}
    whole = losses_of(tiny_config(output=str(tmp_path / "whole"), steps=4, **options))
    parts = str(tmp_path / "parts")
    losses_of(tiny_config(output=parts, steps=2, **options))
    assert losses_of(tiny_config(output=parts, steps=4, resume=True, workers=2, **options)) == whole
    for other in {"paper", "small", "mosaic"} - {augment}:
        others = {**options, "augment": other}
        assert losses_of(tiny_config(output=str(tmp_path / other), steps=2, **others)) != whole[:2]


def test_evaluate_reads_every_format_and_scores_it_the_same(copies, tiny_config, tmp_path, capsys):
    Trainer(tiny_config(data=str(copies["voc"]), steps=1)).run()
    capsys.readouterr()
    files = []
    for name, folder in copies.items():
        files.append([tmp_path / f"{name}.json", tmp_path / f"{name}-detections.json"])
        arguments = ["--data", str(folder), "--weights", str(tmp_path / "run" / "model"), "--device", "cpu"]
        arguments += ["--json", str(files[-1][0]), "--detections", str(files[-1][1]), "--stages"]
        assert evaluate.main([*arguments, "--scorer", "pycocotools"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("AP, NMS") == len(copies)
    results = [[json.loads(file.read_text(encoding="utf-8")) for file in pair] for pair in files]
    for metrics, detections in results:
        for key in ("metrics", "per_class", "stages"):
            assert metrics[key] == results[0][0][key]
        assert detections == results[0][1] and {d["image_id"] for d in detections} <= {1, 2, 3}
    assert len(results[0][0]["stages"]) == 2 and results[0][0]["stages"][1]["metrics"] == results[0][0]["metrics"]


@pytest.fixture
def spoilt(scenes, tmp_path):
    """The scenes with one image missing, one that is none, and one box outside."""
    folder = tmp_path / "spoilt"
    shutil.copytree(scenes, folder)
    images = sorted((folder / "train").iterdir())
    images[0].unlink()
    images[1].write_bytes(b"junk")
    content = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    content["annotations"].append({"id": 10**6, "image_id": 4, "category_id": 1, "bbox": [-20, 5, 50, 50]})
    (folder / "train.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_bad_images_are_left_out_and_reported(spoilt, tiny_config, tmp_path, capsys):
    trainer = Trainer(tiny_config(data=str(spoilt), steps=3))
    assert [image["id"] for image in trainer.dataset.images] == [3, 4, 5, 6]
    trainer.run()
    printed = capsys.readouterr().out
    written = (tmp_path / "run" / "data_report.txt").read_text(encoding="utf-8")
    for problem in (
        "000000.jpg: no such file, left out",
        "000001.jpg: not an image of a known format",
        "annotation 1000000 (000003.jpg): bbox [-20, 5, 50, 50] reaches outside the 128 x 96 image, clipped",
    ):
        assert f"problem: {problem}\n" in printed and f"problem: {problem}\n" in written
    assert "data: 5 images, " in printed


def test_strict_refuses_what_would_be_mended(spoilt, scenes, tmp_path, capsys, tiny_config):
    arguments = ["--data", str(spoilt), "--output", str(tmp_path / "run"), "--strict", "--device", "cpu"]
    arguments += ["--backbone", "resnet18", "--backbone-weights", "none", "--set", "num_stages=1", "num_proposals=5"]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert (
        error.startswith("sparse_rcnn.train: error: data: 3 problems: 000000.jpg: no such file") and "\n" not in error
    )
    assert not (tmp_path / "run" / "last.pt").exists() and (tmp_path / "run" / "data_report.txt").exists()
    Trainer(tiny_config(data=str(scenes), strict=True, output=str(tmp_path / "clean")))


def test_a_truncated_image_is_found_when_strict(scenes, tiny_config, tmp_path):
    folder = tmp_path / "truncated"
    shutil.copytree(scenes, folder)
    path = folder / "train" / "000002.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    Trainer(tiny_config(data=str(folder)))
    with pytest.raises(ValueError, match=r"data: 1 problems: 000002\.jpg: cannot decode the image: .*truncated"):
        Trainer(tiny_config(data=str(folder), strict=True))


def test_evaluate_refuses_a_split_with_images_missing(spoilt, capsys):
    arguments = ["--data", str(spoilt), "--split", "train", "--weights", "w", "--device", "cpu"]
    assert evaluate.main(arguments) == 2
    assert "1 images are missing or unreadable: 000000.jpg" in capsys.readouterr().err


def test_options_that_do_not_go_together_are_named():
    with pytest.raises(ValueError, match="augment: expected paper, small or mosaic, got 'large'"):
        TrainConfig(data="d", output="o", augment="large")
    for augment in ("small", "mosaic"):
        with pytest.raises(ValueError, match=f"crop: expected False with augment {augment}"):
            TrainConfig(data="d", output="o", augment=augment, crop=True)
    with pytest.raises(ValueError, match="cache_mb: expected at least 0, got -1"):
        TrainConfig(data="d", output="o", cache_mb=-1)


def test_wide_and_tall_images_train_together(copies, tiny_config, tmp_path):
    sizes = {Image.open(path).size for path in (copies["coco"] / "train").iterdir()}
    assert len({width > height for width, height in sizes}) == 2
    records = losses_of(tiny_config(data=str(copies["coco"]), group_shapes=True, steps=6))
    assert len(records) == 6
