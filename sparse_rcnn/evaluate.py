"""``python -m sparse_rcnn.evaluate --data DIR|FILE --weights PATH``: the COCO metrics of a detector."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from sparse_rcnn.data.dataset import DetectionDataset, some
from sparse_rcnn.data.formats import SPLITS, open_dataset
from sparse_rcnn.engine import distributed
from sparse_rcnn.engine.evaluator import EvalResult, evaluate, match_classes
from sparse_rcnn.engine.scoring import SCORERS, pick_scorer
from sparse_rcnn.engine.stages import StageResult, evaluate_stages
from sparse_rcnn.runtime import pick_device
from sparse_rcnn.weights.atomic import atomic_write


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n" if distributed.first_to_complain() else None)


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = _Parser(prog="sparse_rcnn.evaluate", description="The 12 COCO numbers and the AP of every class.")
    parser.add_argument("--data", required=True, help="folder or file in COCO, YOLO or Pascal VOC format")
    parser.add_argument("--weights", required=True, help="checkpoint: own format, official or mmdetection")
    parser.add_argument("--split", default="valid", choices=SPLITS, help="of a folder (default valid)")
    parser.add_argument("--json", metavar="FILE", help="write the metrics here")
    parser.add_argument("--detections", metavar="FILE", help="write the detections here, as COCO results")
    parser.add_argument("--batch-size", type=int, default=1, help="images a forward pass; 1 (default) has no padding")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16 is autocast")
    parser.add_argument("--nms", type=float, metavar="IOU", help="as of infer (default: the model's, which is off)")
    parser.add_argument("--tta", action="store_true", help="see each image at three sizes, plain and mirrored")
    parser.add_argument(
        "--stages", action="store_true", help="also score every stage of the head as if it were the last"
    )
    parser.add_argument(
        "--scorer", default="auto", choices=SCORERS, help="auto (default): hotcoco where installed, the same numbers"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 (an image could not be read, or a file not written) or 2 (bad arguments)"""
    distributed.connect()
    args = build_parser().parse_args(arguments)
    try:
        distributed.start(args.device)
        model, dataset = _load(args)
        match_classes(model.config, dataset)
    except (ValueError, TypeError, OSError) as error:
        return _fail(error, 2)
    try:
        options = {"batch_size": args.batch_size, "dtype": args.dtype, "progress": True, "scorer": args.scorer}
        result = evaluate(model, dataset, tta=args.tta, nms=args.nms, **options)
        stages = evaluate_stages(model, dataset, **options) if args.stages else None
        if distributed.is_main():
            _tell(args, result, stages)
        distributed.stop()
    except (ValueError, OSError, RuntimeError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    if result.failed:
        if distributed.is_main():
            print("\n".join(result.failed), file=sys.stderr)
        return _fail(f"{len(result.failed)} of {len(dataset)} images could not be read; they count as empty", 1)
    return 0


def _tell(args: argparse.Namespace, result: EvalResult, stages: list[StageResult] | None) -> None:
    """Print the tables, and write the files that were asked for."""
    print("\n".join(table(result)))
    record = {"weights": args.weights, "data": args.data, **result.to_dict()}
    if stages is not None:
        print("\n".join(stage_table(stages)))
        record["stages"] = [stage.to_dict() for stage in stages]
    if args.json:
        _write_json(args.json, record, indent=2)
    if args.detections:
        _write_json(args.detections, result.detections)


def _load(args: argparse.Namespace) -> tuple[Any, DetectionDataset]:
    from sparse_rcnn.models import SparseRCNN

    if args.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {args.batch_size}")
    if args.nms is not None and not 0 <= args.nms <= 1:
        raise ValueError(f"--nms: expected a number within 0..1, got {args.nms}")
    device = pick_device(distributed.own_device(args.device))
    pick_scorer(args.scorer)
    dataset = open_dataset(args.data, args.split)
    if dataset.left_out:  # the numbers of a part are not those of the split
        raise ValueError(f"{len(dataset.left_out)} images are missing or unreadable: {some(dataset.left_out)}")
    model = SparseRCNN.from_pretrained(args.weights)
    return model.to(device), dataset


def table(result: EvalResult) -> list[str]:
    """The result as lines of text."""
    lines = [f"{name:<6}{value:8.4f}" for name, value in result.metrics.items()]
    width = max(len(name) for name in (*result.per_class, "class")) + 2
    columns = next(iter(result.per_class.values()), {})
    lines += ["", f"{'class':<{width}}" + "".join(f"{column:>8}" for column in columns)]
    lines += [
        f"{name:<{width}}" + "".join(f"{value:8.4f}" for value in values.values())
        for name, values in result.per_class.items()
    ]
    return lines + [f"note: {note}" for note in result.notes]


def stage_table(stages: list[StageResult]) -> list[str]:
    """The stages as lines of text."""
    lines = ["", f"{'stage':<8}{'AP':>8}{'AP50':>8}{'AR100':>8}{'AP, NMS':>10}{'duplicates':>12}"]
    for result in stages:
        numbers = "".join(f"{result.metrics[name]:8.4f}" for name in ("AP", "AP50", "AR100"))
        lines.append(f"{result.stage:<8}{numbers}{result.ap_with_nms:10.4f}{result.duplicates:12.2f}")
    return lines


def _write_json(path: str, value: Any, indent: int | None = None) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


def _fail(error: Exception | str, code: int) -> int:
    if distributed.first_to_complain():
        print(f"sparse_rcnn.evaluate: error: {distributed.describe(error)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
