"""``report.html``: what is in the folder of a run is in the page, and nothing in it can stop a run."""

from __future__ import annotations

import base64
import io
import json
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image

from sparse_rcnn import report, train
from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.drawing import PANEL_SIDE
from sparse_rcnn.engine import run_report
from sparse_rcnn.engine.charts import line_chart
from sparse_rcnn.engine.logging import read_records
from sparse_rcnn.engine.run_report import _duration, _seconds, _spread, write_report
from sparse_rcnn.engine.stages import evaluate_stages
from sparse_rcnn.engine.trainer import Trainer
from sparse_rcnn.models import SparseRCNN
from sparse_rcnn.runtime import default_weights


class Page(HTMLParser):
    """Tags with their attributes, and the text of each section by its heading."""

    def __init__(self, path) -> None:
        super().__init__()
        self.tags, self.sections, self.open = [], {}, []
        self.heading = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags are nested as they should be"

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.heading = data
            self.sections[data] = []
        elif self.heading and data.strip():
            self.sections[self.heading].append(data.strip())

    def attributes(self, tag, name):
        return [attrs[name] for kind, attrs in self.tags if kind == tag and name in attrs]


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """The folder of a short run with two evaluations."""
    from tests.engine.conftest import TINY

    folder = tmp_path_factory.mktemp("runs") / "a <short> run"
    arguments = ["--data", str(scenes), "--val", str(scenes), "--output", str(folder), "--backbone", "resnet18"]
    arguments += ["--backbone-weights", "none", "--steps", "4", "--eval-every", "2", "--log-every", "1", "--lr", "1e-3"]
    arguments += ["--device", "cpu", "--set", *(f"{key}={value}" for key, value in TINY.items())]
    assert train.main(arguments) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_finished_run_has_its_report(finished):
    page = Page(finished / "report.html")
    assert list(page.sections) == list(run_report._SECTIONS)
    assert page.open == [] and "Could not be made" not in (finished / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_no_other_file(finished):
    page = Page(finished / "report.html")
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"script", "link", "iframe", "object"}
    for attribute in ("src", "href", "srcset", "xlink:href"):
        for tag, attrs in page.tags:
            assert attrs.get(attribute, "data:").startswith("data:"), tag
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert "url(" not in text and "http:" not in text and "https:" not in text and "@import" not in text


def test_the_figures_are_those_of_the_log(finished):
    page = Page(finished / "report.html")
    records = read_records(finished)
    training = [record for record in records if record["kind"] == "train"]
    best = max((record for record in records if record["kind"] == "val"), key=lambda record: record["AP"])
    summary = page.sections["Summary"]
    assert summary[summary.index("steps") + 1] == "4 of 4"
    assert summary[summary.index("best AP") + 1] == f"{best['AP']:.4f}"
    assert summary[summary.index("found at step") + 1] == str(best["step"])
    assert summary[summary.index("proposals") + 1] == "10" and summary[summary.index("stages") + 1] == "2"

    html = (finished / "report.html").read_text(encoding="utf-8")
    assert line_chart("Learning rate", {"lr": [(r["step"], r["lr"]) for r in training]}) in html
    of_stages = {f"stage {n}": [(r["step"], r[key]) for r in training] for n, key in ((1, "loss_ce_0"), (2, "loss_ce"))}
    assert line_chart("Class loss of each stage", of_stages, log=True) in html
    sums = {"total": [(r["step"], r["loss"]) for r in training]}
    for kind, name in (("ce", "class loss"), ("bbox", "L1 box loss"), ("giou", "GIoU loss")):
        sums[name] = [(r["step"], sum(v for k, v in r.items() if k.startswith(f"loss_{kind}"))) for r in training]
    assert line_chart("Loss, summed over the stages", sums, log=True) in html
    accuracy = page.sections["Accuracy"]
    for name, ap in best["per_class"].items():
        assert accuracy[accuracy.index(name) + 2] == (f"{ap:.3f}" if ap >= 0 else "none")
    assert "learning" not in page.sections["Configuration"] and "backbone_weights" in page.sections["Configuration"]
    assert "data: 6 images" in page.sections["Data"][0]


def test_pictures_go_through_all_stages(finished, scenes):
    page = Page(finished / "report.html")
    pictures, captions = page.attributes("img", "src"), page.attributes("img", "alt")
    dataset = open_dataset(scenes, "valid")
    names = [image["file_name"] for i, image in enumerate(dataset.images) if len(dataset.targets(i)[0])]
    wanted = [f"{name}, {what}" for name in names for what in ("annotated", "proposals", "stage 1", "stage 2")]
    assert captions == wanted
    for uri in pictures:
        kind, _, content = uri.partition(",")
        assert kind == "data:image/jpeg;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(content)))
        assert max(picture.size) == min(PANEL_SIDE, 2 * 128)


def test_stages_and_proposals_are_those_of_the_best_model(finished, scenes):
    page = Page(finished / "report.html")
    model = SparseRCNN.from_pretrained(finished / "best").eval()
    cells = page.sections["Number of stages"]
    table = cells[-12:]
    assert cells[-13] == "duplicates", "the last heading of the table"
    for result in evaluate_stages(model, open_dataset(scenes, "valid")):
        values = [*(result.metrics[name] for name in ("AP", "AP50", "AR100")), result.ap_with_nms]
        wanted = [str(result.stage + 1), *(f"{value:.4f}" for value in values), f"{result.duplicates:.1%}"]
        assert table[6 * result.stage :][:6] == wanted
    assert "on 3 of the 3 validation images" in cells[0]
    boxes = [attrs for tag, attrs in page.tags if tag == "rect" and attrs.get("class") == "box"]
    centre_x, _, width, _ = model.init_proposal_boxes.weight[3].tolist()
    assert len(boxes) == 10
    assert float(boxes[3]["width"]) == pytest.approx(400 * width, abs=0.06)
    assert float(boxes[3]["x"]) == pytest.approx(400 * (centre_x - width / 2), abs=0.06)


def test_a_part_that_cannot_be_made_leaves_the_others(copied, tmp_path):
    shutil.rmtree(copied / "best")
    shutil.rmtree(copied / "model")
    (copied / "best").mkdir()
    path, problems = write_report(copied, val=str(tmp_path / "nowhere"))
    text = Page(path).sections
    assert [problem.partition(":")[0] for problem in problems] == [
        *("summary", "stage by stage", "number of stages", "learned proposals", "configuration")
    ]
    assert text["Summary"][0].startswith("Could not be made: ")
    assert {"AP50", "class loss"} <= {*text["Accuracy"], *text["Losses"]}


def test_an_image_that_cannot_be_read_is_named_among_the_others(copied, scenes, tmp_path):
    data = shutil.copytree(scenes, tmp_path / "scenes")
    names = [image["file_name"] for image in open_dataset(data, "valid").images]
    (data / "valid" / names[0]).write_bytes(b"no image")
    path, problems = write_report(copied, val=str(data), device="cpu")
    page = Page(path)
    assert problems == [] and f"{names[0]}: " in " ".join(page.sections["Stage by stage"])
    assert {caption.partition(",")[0] for caption in page.attributes("img", "alt")} == set(names[1:])


def test_scoring_of_the_stages_is_bounded_in_time(monkeypatch):
    model = SparseRCNN.from_pretrained(default_weights()).eval()
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(run_report.time, "monotonic", lambda: next(clock))
    assert run_report._affordable_images(model) == 24
    clock = iter([10.0, 100.0])
    assert run_report._affordable_images(model) == 10


def test_a_run_without_validation_or_checkpoint_has_curves(tmp_path):
    first = {"kind": "train", "step": 5, "loss": 2.0, "lr": 0.1, "grad_norm": None}
    lines = [
        json.dumps({**first, "images_per_second": 3, "seconds": 90}),
        '{"kind": "skipped", "step": 6}',
        '{"kind": "t',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    path, problems = write_report(tmp_path)
    sections = Page(path).sections
    assert problems == [] and list(sections) == ["Summary", "Losses", "Optimization", "Configuration"]
    assert "1.5 min" in sections["Summary"] and "steps skipped, not finite" in sections["Summary"]


def test_the_command(copied, tmp_path, capsys):
    (copied / "report.html").unlink()
    assert report.main([str(copied), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{copied / 'report.html'}\n" and (copied / "report.html").is_file()
    assert report.main([str(copied), "--val", str(tmp_path / "nowhere"), "--device", "cpu"]) == 1
    assert "stage by stage: ValueError" in capsys.readouterr().err
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparse_rcnn.report: error: ") and "found no records" in error


@pytest.mark.parametrize("error", [RuntimeError("no more\nmemory"), KeyboardInterrupt(), OSError("disk full")])
def test_a_report_that_fails_costs_the_run_nothing(scenes, tiny_config, monkeypatch, capsys, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(run_report, "write_report", fail)
    config = tiny_config(steps=1)
    monkeypatch.setattr(train, "Trainer", lambda given: Trainer(config))
    assert train.main(["--data", str(scenes), "--output", config.output]) == 0
    line = f"warning: no report: {type(error).__name__}: {' '.join(str(error).split())}"
    assert line in capsys.readouterr().out


def test_a_run_that_stops_early_has_no_report(tiny_config, scenes, monkeypatch, tmp_path):
    config = tiny_config(time_limit=0)
    monkeypatch.setattr(train, "Trainer", lambda given: Trainer(config))
    assert train.main(["--data", str(scenes), "--output", config.output]) == 0
    assert (tmp_path / "run" / "last.pt").exists() and not (tmp_path / "run" / "report.html").exists()


def test_small_things():
    assert _seconds([]) == 0 and _seconds([10, 20, 5, 7, 1]) == 28
    assert _duration(90) == "1.5 min" and _duration(3660 * 2) == "2 h 02 min"
    assert _spread(range(3), 4) == [0, 1, 2] and _spread(range(101), 5) == [0, 25, 50, 75, 100]
