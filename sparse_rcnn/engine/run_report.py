"""``report.html``: one file that shows how a training run went, and what its model sees."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from html import escape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sparse_rcnn import doctor
from sparse_rcnn.data.dataset import DetectionDataset
from sparse_rcnn.data.decode import ImageError
from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.drawing import annotation_panel, stage_panels
from sparse_rcnn.engine.charts import STYLE, bar_chart, box_canvas, line_chart
from sparse_rcnn.engine.checkpoint import load_checkpoint
from sparse_rcnn.engine.logging import METRICS_FILE, loss_kinds, read_records
from sparse_rcnn.engine.stages import StageResult, evaluate_stages
from sparse_rcnn.engine.views import detect, usual_view
from sparse_rcnn.models import SparseRCNN
from sparse_rcnn.runtime import Predictor, pick_device
from sparse_rcnn.weights.atomic import atomic_write

REPORT_FILE = "report.html"
_PICTURES = 4  # validation images that are drawn
_STAGE_SECONDS, _STAGE_IMAGES_AT_LEAST = 60.0, 10  # how long to score every stage on validation images
_SHOWN_SCORE, _SHOWN_AT_LEAST, _SHOWN_AT_MOST = 0.3, 3, 30  # which detections are drawn
_SHOWN_CLASSES = 100
_LOSS_NAMES = {"ce": "class loss", "bbox": "L1 box loss", "giou": "GIoU loss"}


def write_report(run: str | Path, val: str | None = None, device: str = "auto") -> tuple[Path, list[str]]:
    """Write ``report.html`` into the folder of a training run, from what lies there.

    The file needs no other: charts are inline SVG, pictures data URIs. A part that cannot be made says why in its
    place; the others are there all the same.

    Args:
        run: the ``output`` of :class:`~sparse_rcnn.engine.trainer.Trainer`, of a run that may still be going on.
        val: data set to draw and score images of; by default the one that the run was validated on.
        device: to run the model on.

    Returns:
        The file, and a line for each part that could not be made.

    Raises:
        ValueError: the folder has no record of a run.
        OSError: the file cannot be written.
    """
    given = _Run(Path(run), val, device)
    if not given.records:
        raise ValueError(f"{run}: expected the folder of a training run, found no records in {METRICS_FILE}")
    problems: list[str] = []
    sections = []
    for title, make in _SECTIONS.items():
        try:
            body = make(given)
        except Exception as error:  # whatever it is, the rest is worth having
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            problems.append(f"{title.lower()}: {reason}")
            body = f'<p class="note">Could not be made: {escape(reason)}</p>'
        if body:
            sections.append(f"<section>\n<h2>{title}</h2>\n{body}\n</section>")
    page = files("sparse_rcnn.engine").joinpath("report_page.html").read_text(encoding="utf-8")
    page = page.replace("{title}", escape(given.folder.resolve().name)).replace("{chart_style}", STYLE)
    path = given.folder / REPORT_FILE
    with atomic_write(path) as temporary:
        temporary.write_text(page.replace("{body}", "\n".join(sections)), encoding="utf-8")
    return path, problems


def try_report(run: str | Path, device: str, say: Callable[[str], None]) -> None:
    """Write the report and say so; whatever goes wrong is said too, and costs nothing but the report."""
    try:
        path, problems = write_report(run, device=device)
        lines = [f"report: {path}", *(f"warning: report: {problem}" for problem in problems)]
    except (Exception, KeyboardInterrupt) as error:
        lines = [f"warning: no report: {type(error).__name__}: {' '.join(str(error).split())}"]
    for line in lines:
        say(line)


class _Run:
    """What lies in the folder of a run, read when it is first asked for."""

    def __init__(self, folder: Path, val: str | None, device: str) -> None:
        self.folder, self.device = folder, device
        self.records = read_records(folder)
        self.train = [record for record in self.records if record.get("kind") == "train"]
        self.evaluations = [record for record in self.records if record.get("kind") == "val"]
        self._val = val

    @cached_property
    def config(self) -> dict[str, Any]:
        """The run's ``TrainConfig``; nothing before the first checkpoint."""
        path = self.folder / "last.pt"
        return load_checkpoint(path)["train_config"] if path.is_file() else {}

    @cached_property
    def best(self) -> dict[str, Any] | None:
        return max(self.evaluations, key=lambda record: record["AP"], default=None)

    @cached_property
    def model_folder(self) -> Path | None:
        """The best model, or where nothing was validated the last one."""
        candidates = (self.folder / "best", self.folder / "model")
        return next((folder for folder in candidates if folder.is_dir()), None)

    @cached_property
    def model(self) -> SparseRCNN:
        return SparseRCNN.from_pretrained(self.model_folder).eval().to(pick_device(self.device))

    @cached_property
    def val(self) -> DetectionDataset | None:
        source = self._val or self.config.get("val")
        return None if source is None else open_dataset(source, "valid", self.model.config.class_names)

    def series(self, records: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
        """(step, value) of the records that have a value of that name; COCO's -1 is none."""
        found = ((record["step"], record.get(name)) for record in records)
        return [(step, value) for step, value in found if value is not None and not (value < 0 and "AP" in name)]


def _summary(run: _Run) -> str:
    last = run.records[-1]["step"]
    wanted = run.config.get("steps")
    facts = {"steps": f"{last:,} of {wanted:,}" if wanted else f"{last:,}"}
    if skipped := sum(record.get("kind") == "skipped" for record in run.records):
        facts["steps skipped, not finite"] = f"{skipped:,}"
    if run.best is not None:
        facts |= {"best AP": f"{run.best['AP']:.4f}", "AP50": f"{run.best['AP50']:.4f}"}
        facts["found at step"] = f"{run.best['step']:,}"
    facts["trained for"] = _duration(_seconds([record["seconds"] for record in run.train]))
    if run.train:
        facts["images a second"] = f"{np.median([record['images_per_second'] for record in run.train]):.2f}"
    if run.model_folder is not None:
        config = run.model.config
        facts |= {"backbone": config.backbone, "proposals": config.num_proposals, "stages": config.num_stages}
        facts["parameters"] = f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.1f} M"
    cards = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
    return f"<dl>{cards}</dl>"


def _losses(run: _Run) -> str:
    kinds: dict[str, list[tuple[float, float]]] = {"total": run.series(run.train, "loss")}
    for record in run.train:
        for kind, total in loss_kinds(record).items():
            kinds.setdefault(_LOSS_NAMES[kind], []).append((record["step"], total))
    stages = 1 + max((_stage_of(name) for name in run.train[0]), default=-1) if run.train else 0
    charts = [line_chart("Loss, summed over the stages", kinds, log=True)]
    for kind, name in _LOSS_NAMES.items():
        # The last stage's has no number in its name.
        names = {f"stage {stage + 1}": f"loss_{kind}_{stage}" for stage in range(stages)}
        names[f"stage {stages + 1}"] = f"loss_{kind}"
        lines = {label: points for label, key in names.items() if (points := run.series(run.train, key))}
        charts.append(line_chart(f"{name[0].upper()}{name[1:]} of each stage", lines, log=True))
    return _grid(charts)


def _stage_of(name: str) -> int:
    number = name.rpartition("_")[2]
    return int(number) if name.startswith("loss_") and number.isdecimal() else -1


def _optimization(run: _Run) -> str:
    return _grid(
        [
            line_chart("Learning rate", {"lr": run.series(run.train, "lr")}),
            line_chart("Gradient norm before clipping", {"norm": run.series(run.train, "grad_norm")}, log=True),
            line_chart("Images a second, without evaluations", {"": run.series(run.train, "images_per_second")}),
        ]
    )


def _accuracy(run: _Run) -> str:
    if run.best is None:
        return ""

    def chart(title: str, names: Sequence[str]) -> str:
        return line_chart(title, {name: points for name in names if (points := run.series(run.evaluations, name))})

    charts = [chart("Validation AP", ("AP", "AP50", "AP75")), chart("AP by size of object", ("APs", "APm", "APl"))]
    charts.append(chart("Recall by number of detections", ("AR1", "AR10", "AR100")))
    ranked = sorted(run.best["per_class"].items(), key=lambda item: -item[1])
    title = f"AP of each class at step {run.best['step']:,}"
    if len(ranked) > _SHOWN_CLASSES:
        half = _SHOWN_CLASSES // 2
        ranked, title = ranked[:half] + ranked[-half:], f"{title}: the {half} best and the {half} worst"
    return _grid([*charts, bar_chart(title, dict(ranked))])


def _proposals(run: _Run) -> str:
    if run.model_folder is None:
        return ""
    boxes = run.model.init_proposal_boxes.weight.detach().float().cpu().numpy()  # [N, 4] cxcywh of 0..1
    whole = (boxes[:, 2:].min(1) >= 0.9).mean()
    width, height = np.median(boxes[:, 2:], axis=0)
    text = (
        "The boxes that the head starts from in every image, before it has seen any of it. They are learned like "
        "weights. Each stage moves them to what the image shows, so that they need not look like objects: boxes as "
        f"large as the image are usual. Here the median box is {width:.0%} of the image's width and {height:.0%} of "
        f"its height; {whole:.0%} of the boxes cover nearly all of it (0.9 of both sides or more)."
    )
    charts = [box_canvas(f"The {len(boxes)} learned boxes", boxes), box_canvas("Their centres", boxes, centres=True)]
    return f"<p>{text}</p>\n{_grid(charts)}"


def _pictures(run: _Run) -> str:
    if run.model_folder is None or run.val is None:
        return ""
    predictor = Predictor(run.model, pick_device(run.device), optimize=False)
    rows = []
    for index in _spread([i for i in range(len(run.val)) if len(run.val.targets(i)[0])], _PICTURES):
        name = escape(run.val.images[index]["file_name"])
        try:
            image = run.val[index][0]
        except ImageError as error:
            rows.append(f'<h3>{name}</h3>\n<p class="note">{escape(str(error))}</p>')
            continue
        found = predictor.predict(image, return_stages=True)
        good = int((found.scores >= _SHOWN_SCORE).sum())
        found = found.filter(top_k=min(max(good, _SHOWN_AT_LEAST), _SHOWN_AT_MOST))
        pixels = image.permute(1, 2, 0).numpy()
        annotated = annotation_panel(pixels, *run.val.targets(index), run.val.class_names)
        panels = [("annotated", annotated), *stage_panels(pixels, found)]
        figures = "".join(
            f'<figure><img src="{_data_uri(panel)}" alt="{name}, {caption}"><figcaption>{caption}</figcaption></figure>'
            for caption, panel in panels
        )
        rows.append(f'<h3>{name}</h3>\n<div class="panels">{figures}</div>')
    text = (
        f"Detections that score {_SHOWN_SCORE} or more, the best {_SHOWN_AT_LEAST} at least. Each proposal keeps its "
        "colour from the learned box to the last stage; the numbers are its best class score after the stage."
    )
    return f"<p>{text}</p>\n" + "\n".join(rows)


def _stages(run: _Run) -> str:
    if run.model_folder is None or run.val is None:
        return ""
    kept = set(_spread(range(len(run.val)), _affordable_images(run.model)))
    part = run.val.without(index for index in range(len(run.val)) if index not in kept)
    results = evaluate_stages(run.model, part)
    text = (
        f"What the detector would be worth with fewer stages, on {len(part)} of the {len(run.val)} validation images. "
        "Duplicates are the part of an image's best detections, as many as it has objects, that class-wise suppression "
        "at IoU 0.7 removes; “AP, NMS” is the AP after it. A trained head needs no suppression after its last stages."
    )
    counts = [(result.stage + 1, result) for result in results]
    scores = {name: [(n, result.metrics[name]) for n, result in counts] for name in ("AP", "AP50")}
    scores["recall (AR100)"] = [(n, result.metrics["AR100"]) for n, result in counts]
    duplicates = {"duplicates": [(n, 100 * result.duplicates) for n, result in counts]}
    charts = [
        line_chart("Accuracy by number of stages", scores, x_label="stages", x_start=None),
        line_chart("Duplicates removed, % of the best detections", duplicates, x_label="stages", x_start=None),
    ]
    return f"<p>{text}</p>\n{_grid(charts)}\n{_stage_table(results)}"


def _affordable_images(model: SparseRCNN) -> int:
    """How many images every stage can be scored on in the time for it."""
    blank = torch.zeros(3, model.config.min_size, model.config.max_size, dtype=torch.uint8)
    start = time.monotonic()
    detect(model, [blank], usual_view(model), every_stage=True)
    return max(_STAGE_IMAGES_AT_LEAST, int(_STAGE_SECONDS / (time.monotonic() - start)))


def _stage_table(results: Sequence[StageResult]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("stages", "AP", "AP50", "AR100", "AP, NMS", "duplicates"))
    rows = []
    for result in results:
        values = [*(result.metrics[name] for name in ("AP", "AP50", "AR100")), result.ap_with_nms]
        cells = "".join(f"<td>{value:.4f}</td>" for value in values) + f"<td>{result.duplicates:.1%}</td>"
        rows.append(f"<tr><td>{result.stage + 1}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _data(run: _Run) -> str:
    path = run.folder / "data_report.txt"
    return f"<pre>{escape(path.read_text(encoding='utf-8'))}</pre>" if path.is_file() else ""


def _configuration(run: _Run) -> str:
    parts = {"Training": run.config, "Software": doctor.versions()}
    if run.model_folder is not None:
        parts["Model"] = run.model.config.to_dict()
    return "\n".join(f"<details><summary>{name}</summary>{_table(values)}</details>" for name, values in parts.items())


def _table(values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value if isinstance(value, str) else json.dumps(value))}</td></tr>"
        for name, value in values.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


_SECTIONS: dict[str, Callable[[_Run], str]] = {
    **{"Summary": _summary, "Losses": _losses, "Accuracy": _accuracy, "Stage by stage": _pictures},
    **{"Number of stages": _stages, "Learned proposals": _proposals, "Optimization": _optimization},
    **{"Data": _data, "Configuration": _configuration},
}


def _grid(charts: Sequence[str]) -> str:
    shown = "\n".join(f"<figure>{chart}</figure>" for chart in charts if chart)
    return f'<div class="charts">\n{shown}\n</div>' if shown else ""


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the items, evenly spread over them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _seconds(clocks: Sequence[float]) -> float:
    """The time of all sittings: the clock of the records starts over with each."""
    return sum(now for now, later in pairwise([*clocks, 0.0]) if later < now)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{seconds / 60:.1f} min"
