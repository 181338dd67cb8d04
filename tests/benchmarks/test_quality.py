"""The peer of the quality table: it resumes exactly, speaks the evaluator's language, and the table is of both."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import faster_rcnn, quality
from benchmarks.faster_rcnn import FasterRCNNPeer, PeerTrainer, lr_factor
from sparse_rcnn import train
from sparse_rcnn.data import synthetic
from sparse_rcnn.engine.charts import LEFT, RIGHT, WIDTH
from sparse_rcnn.models import SparseRCNN, SparseRCNNConfig

SETTINGS = {
    **{"images": 8, "batch_size": 2, "lr": 1e-3, "optimizer": "sgd", "channels": 8, "augment": "paper", "seed": 3},
    **{
        "group_shapes": True,
        "frozen_stages": 0,
        "min_size": 64,
        "max_size": 96,
        "train_min_sizes": [48, 64],
        "train_max_size": 96,
        "dtype": "float32",
    },
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    synthetic.write_dataset(folder, 6, seed=1, size=(96, 128), split="train")
    synthetic.write_dataset(folder, 3, seed=2, size=(96, 128), split="valid")
    return str(folder)


@pytest.fixture(autouse=True, scope="module")
def random_backbone():
    """ImageNet weights are in a package that not everyone has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faster_rcnn, "load_backbone_weights", lambda backbone: "none")
        yield


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    """A run of four steps in one sitting: its trainer."""
    trainer, done = run_peer(scenes, tmp_path_factory.mktemp("peer"))
    assert done and trainer.step == 4
    return trainer


def run_peer(scenes, output, minutes=None):
    trainer = PeerTrainer(scenes, scenes, output, SETTINGS)
    done = trainer.run(minutes, eval_every=2, checkpoint_every=10, log_every=1)
    return trainer, done


def records_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_in_pieces_is_the_run_in_one(whole, scenes, tmp_path):
    for step in range(1, 5):
        parts, done = run_peer(scenes, tmp_path, minutes=0)
        assert parts.step == step and done == (step == 4)
    for (name, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    one, two = (
        [{**record, "seconds": 0, "images_per_second": 0} for record in records_of(trainer.output)]
        for trainer in (whole, parts)
    )
    assert one == two and [r["step"] for r in one if r["kind"] == "val"] == [2, 4]
    losses = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
    assert one[0]["loss"] == pytest.approx(sum(one[0][name] for name in losses), abs=1e-5)


def test_bfloat16_rounds_no_anchor_and_no_box():
    torch.manual_seed(0)
    detector = FasterRCNNPeer(SparseRCNNConfig.preset("small", num_classes=2), channels=8).eval().detector
    seen = {}
    detector.rpn.anchor_generator.register_forward_hook(lambda *call: seen.update(anchors=call[2]))
    detector.rpn.register_forward_hook(lambda *call: seen.update(regions=call[2][0]))

    def boxes(bfloat16):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            found = detector([torch.zeros(3, 256, 320)])
        return seen["anchors"][0], seen["regions"][0], found[0]["boxes"]

    (exact, *_), (anchors, *others) = boxes(False), boxes(True)
    assert torch.equal(anchors, exact)
    for each in others:
        assert each.dtype == torch.float32 and len(each) and (each != each.bfloat16()).any()


def test_the_schedule_warms_up_and_ends_at_nothing():
    assert lr_factor(0, 4000) == 0.01 and lr_factor(250, 4000) == pytest.approx(0.505)
    assert lr_factor(500, 4000) == 1 and lr_factor(2250, 4000) == pytest.approx(0.5) and lr_factor(4000, 4000) == 0
    assert lr_factor(1, 4) == 1  # a quarter of a short run is warm-up


def test_labels_count_from_0_here_and_from_1_in_torchvision():
    sizes = {"min_size": 64, "max_size": 96, "num_classes": 3}
    peer = FasterRCNNPeer(SparseRCNNConfig.preset("small", **sizes), channels=8)
    seen = {}

    def detector(images, targets=None):
        seen.update(images=images, targets=targets)
        return [{"boxes": torch.zeros(2, 4), "scores": torch.ones(2), "labels": torch.tensor([1, 3])}]

    del peer.detector
    peer.detector = detector
    image = torch.full((3, 64, 64), 51, dtype=torch.uint8)
    (found,) = peer.eval()([image])
    assert found["labels"].tolist() == [0, 2] and seen["images"][0].unique().tolist() == pytest.approx([0.2])
    peer.train()([image], [{"boxes": torch.ones(1, 4), "labels": torch.tensor([2]), "image_id": 5}])
    assert seen["targets"][0]["labels"].tolist() == [3]


def test_images_reach_the_network_at_the_size_they_come_in():
    peer = FasterRCNNPeer(SparseRCNNConfig.preset("small", num_classes=3), channels=8)
    images, _ = peer.detector.transform([torch.zeros(3, 50, 70), torch.ones(3, 64, 40)])
    assert images.image_sizes == [(50, 70), (64, 40)] and images.tensors.shape == (2, 3, 64, 96)
    mean, std = (torch.tensor(v).view(3, 1, 1) / 255 for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    torch.testing.assert_close(images.tensors[1, :, :, :40], ((1 - mean) / std).expand(3, 64, 40))


def test_the_table_is_of_both_runs(whole, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quality, "_TIMED_IMAGES", 1)
    monkeypatch.setattr(quality, "_WARM_UP", 1)
    monkeypatch.setattr(quality, "_DRAWS", 20)
    monkeypatch.setattr(train, "try_report", lambda *arguments: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # for good, which other tests would see
    arguments = ["--data", scenes, "--val", scenes, "--output", str(tmp_path / "ours"), "--backbone", "resnet18"]
    arguments += ["--backbone-weights", "none", "--steps", "1", "--batch-size", "3", "--device", "cpu", "--set"]
    arguments += ["num_stages=2", "num_proposals=10", "hidden_dim=32", "num_heads=4", "min_size=64", "max_size=96"]
    assert train.main(arguments) == 0
    capsys.readouterr()
    files = {name: tmp_path / f"quality.{name}" for name in ("json", "curve")}
    arguments = ["--ours", str(tmp_path / "ours"), "--peer", str(whole.output), "--val", scenes]
    flags = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    assert quality.main(["table", *arguments, *flags]) == 0
    printed = capsys.readouterr().out

    report = json.loads(files["json"].read_text(encoding="utf-8"))
    ours, peer = report["detectors"].values()
    assert ours["trained_images"] == 3 and peer["trained_images"] == 8
    assert [point[0] for point in peer["curve"]] == [4, 8] and [point[0] for point in ours["curve"]] == [3]
    best = max(record["AP"] for record in records_of(whole.output) if record["kind"] == "val")
    assert peer["metrics"]["AP"] == pytest.approx(best, abs=1e-6)  # of the model that was kept, by the other scorer
    low, high = report["difference"]["AP"]
    assert report["difference"]["draws"] == 20 and low <= high
    assert quality.quality_table(report) in printed
    # A file with its log beside it is the same.
    SparseRCNN.from_pretrained(tmp_path / "ours" / "best").save_pretrained(tmp_path / "shipped")
    (tmp_path / "shipped" / "model.jsonl").write_text('{"kind": "val", "images": 70, "AP": 0.1, "AP50": 0.2}\n')
    arguments[1] = str(tmp_path / "shipped" / "model.safetensors")
    assert quality.main(["table", *arguments, *flags]) == 0
    again = json.loads(files["json"].read_text(encoding="utf-8"))["detectors"]["Sparse R-CNN"]
    assert again["metrics"] == ours["metrics"] and again["curve"] == [[70, 0.1, 0.2]]
    assert again["trained_images"] == 70
    assert "<svg" in files["curve"].read_text(encoding="utf-8")


def test_the_readme_has_the_table_of_the_figures():
    report = json.loads((quality.ROOT / quality.FIGURES).read_text(encoding="utf-8"))
    assert quality.quality_table(report) in (quality.ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_and_the_curves_of_known_figures():
    def figures(ap, speed, images, nms=None, votes=False):
        metrics = {"AP": ap, "AP50": 2 * ap, "AP75": ap, "APs": -1.0, "APm": 0.1, "APl": 0.2}
        curve = [[images // 2, 0.0, ap], [images, ap, 2 * ap]]
        classes = {"fish": {"AP": ap, "AP50": -1.0}}
        costs = {"parameters": 8_700_000, "trained_images": images, "images_per_second": speed}
        return {"metrics": metrics, "per_class": classes, "curve": curve, "nms": nms, "votes": votes, **costs}

    env = {"commit": "0123456789", "dirty": False, "torch": "2.99", "processor": "A", "isa": "B", "threads": 2}
    detectors = {
        "Sparse R-CNN": figures(0.31, 30.0, 48000, 0.6, True),
        "Faster R-CNN-FPN": figures(0.3, 20.0, 24000, 0.5),
    }
    difference = {"draws": 1000, "AP": (-0.005, 0.0333), "AP50": (-0.046, 0.0118)}
    val = {"images": 127, "boxes": 909}
    report = {"detectors": detectors, "val": val, "difference": difference, "environment": env}
    lines = quality.quality_table(report).splitlines()
    assert lines[:3] == ["| | Sparse R-CNN | Faster R-CNN-FPN |", "|---|---|---|", "| AP | 0.310 | 0.300 |"]
    for line in (
        *("| AP50 | 0.620 | 0.600 |", "| AP of small objects | – | – |", "| fish: AP / AP50 | 0.310 / – | 0.300 / – |"),
        "| suppression of duplicates at IoU | 0.6, with votes | 0.5 |",
        *("| images trained on | 48,000 | 24,000 |", "| speed of inference | 1.50x | 1.00x |"),
    ):
        assert line in lines
    assert lines[-4].startswith("In 95 % of 1,000 draws") and lines[-3].startswith("-0.005 to +0.033, ")
    assert lines[-3].endswith(" -0.046 to +0.012.")
    assert lines[-2].startswith("127 validation images with 909 boxes, scored by pycocotools. Times in one run on A")
    svg = quality.curves(report)
    end = f"{WIDTH - RIGHT:.1f}"  # where the 48,000 images of ours are
    assert svg.count("<path") == 4 and f"L{end}," in svg and f"M{(LEFT + WIDTH - RIGHT) / 2:.1f}," in svg
    assert "Faster R-CNN-FPN, AP50" in svg
