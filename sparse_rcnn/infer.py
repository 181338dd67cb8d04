"""``python -m sparse_rcnn.infer INPUT...``: detections of images or a video, printed, drawn and written to files."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from sparse_rcnn.data.read_ahead import CAN_HAVE_WORKERS
from sparse_rcnn.detections import Detections
from sparse_rcnn.results import PICTURE_FORMATS, CocoWriter, CsvWriter, JsonlWriter, write_picture
from sparse_rcnn.shards import PartWriter, RankDied, Shards, merge
from sparse_rcnn.sources import Inputs, expand_inputs, image_ids, output_names, strip_name

COMMAND = "sparse_rcnn.infer"
_EPILOG = """\
Exit status: 0 all done, 1 some input failed (named on stderr, the others are done), 2 wrong usage, 130 interrupted.
COCO image ids are the file names' numbers if each is a number of its own, else 0, 1, 2... in the order of the inputs.
Without --nms there is no suppression, for Sparse R-CNN needs none, but where the model's configuration has an IoU for
it, as one trained on few images may; --nms 1 is none. Results depend on no batch size: images that are padded
alike share a batch. torchrun --nproc-per-node=K -m sparse_rcnn.infer ... does the same in K processes, on K GPUs where
there are as many; if one dies, the results of the others are kept as FILE.part*."""


class UsageError(Exception):
    """Something wrong with the arguments: exit status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status (see ``--help``)."""
    with contextlib.suppress(AttributeError):  # a file name may hold bytes that the terminal's encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _note(str(message))
        try:
            options = parse_arguments(argv)
            run = _Run(options, Shards.join())
        except (UsageError, ValueError, OSError) as error:
            if not (isinstance(error, UsageError) and int(os.environ.get("RANK", "0"))):  # it is the same to all
                _complain(error)
            return 2
        except KeyboardInterrupt:
            return 130
        return run.execute()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the official demo's flags translated to this command's.

    Raises:
        UsageError: the arguments do not fit together.
    """
    options = _parser().parse_intermixed_args(argv)
    options.inputs += options.input
    _apply_official_options(options)
    if options.config_file is not None:
        _note("--config-file is ignored: the checkpoint itself tells the configuration")
    ways = bool(options.inputs) + bool(options.video_input) + options.webcam
    if ways == 0:
        raise UsageError("expected an INPUT, --video-input or --webcam; -h tells more")
    if ways > 1:
        raise UsageError("images, --video-input and --webcam exclude each other")
    if options.stages and (options.output is None or not options.inputs):
        raise UsageError("--stages: needs images and --output DIR")
    if options.classes is not None:
        options.classes = [name.strip() for name in options.classes.split(",")]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"python -m {COMMAND}",
        description="Detect objects in images or in a video with Sparse R-CNN.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="file, directory, glob, URL, or - for a list on stdin")
    add("--recursive", action="store_true", help="look into subdirectories too")
    add("--weights", metavar="PATH", help="model directory or checkpoint; default: the bundled demo model")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1... (default: %(default)s)")
    dtype = "auto (default) is float32 on a CPU, bfloat16 on a GPU"
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help=dtype)
    add("--no-optimize", dest="optimize", action="store_false", help="run the model as it was trained, unfused")
    warm_up = "sizes of images to make ready for before the first, height x width (800x1333,1080x1920)"
    add("--warmup", type=_sizes, default=[], metavar="HxW,...", help=warm_up)
    add("--batch-size", type=int, default=1, metavar="B", help="images a forward pass (default: %(default)s)")
    workers = "processes that read images (default: by the number of cores and images; 0: this one reads)"
    add("--workers", type=int, metavar="N", help=workers)
    select = parser.add_argument_group("which detections")
    add = select.add_argument
    threshold = "lowest score, 0..1 (default: %(default)s; COCO evaluation wants 0)"
    add("--score-threshold", "--confidence-threshold", type=float, default=0.3, metavar="S", help=threshold)
    add("--top-k", type=int, metavar="K", help="at most the K best of an image")
    add("--classes", metavar="A,B", help="only these, by name or index, separated by commas")
    add(
        "--nms",
        type=float,
        metavar="IOU",
        help="class-wise non-maximum suppression (default: the model's, which is off)",
    )
    results = parser.add_argument_group("results")
    add = results.add_argument
    add("--output", metavar="DIR", type=Path, help="write drawn images there (one image: or to a file, as x.png)")
    add("--stages", action="store_true", help="write a strip with the boxes of every stage beside each drawn image")
    add("--json", metavar="FILE", help="COCO results")
    add("--jsonl", metavar="FILE", help="one JSON object a line for each image")
    add("--csv", metavar="FILE", help="one row for each detection")
    add("--quiet", action="store_true", help="no table, no bar, no summary; failures are still told")
    official = parser.add_argument_group("flags of the official demo")
    add = official.add_argument
    add("--input", nargs="+", default=[], metavar="INPUT", help="the same as INPUT")
    add("--video-input", metavar="FILE", help="frames of a video; --output gets an .mp4 (needs PyAV)")
    add("--webcam", action="store_true", help="frames of the first webcam (Linux, needs PyAV)")
    add("--config-file", metavar="FILE", help="accepted and ignored")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="MODEL.WEIGHTS and MODEL.DEVICE")
    return parser


def _sizes(text: str) -> list[tuple[int, int]]:
    """ "800x1333,1080x1920" as (height, width) pairs."""
    try:
        sizes = [tuple(int(side) for side in size.split("x")) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or not all(len(size) == 2 and min(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH, more separated by commas, got {text!r}")
    return sizes


def _apply_official_options(options: argparse.Namespace) -> None:
    if len(options.opts) % 2:
        raise UsageError(f"--opts: expected pairs KEY VALUE, got {' '.join(options.opts)}")
    values = dict(zip(options.opts[::2], options.opts[1::2], strict=True))
    weights, device = values.pop("MODEL.WEIGHTS", None), values.pop("MODEL.DEVICE", None)
    options.weights = options.weights or weights
    options.device = device if device and options.device == "auto" else options.device
    if values:
        _note(f"--opts: ignored {', '.join(values)}: the checkpoint itself tells the configuration")


class ImageFeed:
    """The images of one run: what to read, how to call each, where to draw it.

    Args:
        inputs: from :func:`expand_inputs`, at least one source.
        shards: to take a share of them; the names and ids are those of all.
        output: directory of drawn images, or the file for a single one; None draws nothing.
        stages: draw the stage strips too.

    Raises:
        UsageError: the output is no place for these images.
    """

    def __init__(self, inputs: Inputs, output: Path | None, stages: bool, shards: Shards | None) -> None:
        self.sources = shards.own(inputs.sources) if shards else inputs.sources
        self.total = len(self.sources)
        self.stages = stages
        self.ids = dict(zip(inputs.sources, image_ids(inputs.sources), strict=True))
        self.targets: dict[str, Path] = {}
        if output is None:
            return
        if output.suffix.lower() in PICTURE_FORMATS and not output.is_dir():
            if len(inputs.sources) > 1:
                raise UsageError(
                    f"--output: expected a directory for {len(inputs.sources)} images, got the file {output}"
                )
            self.targets[inputs.sources[0]] = output
        elif output.exists() and not output.is_dir():
            raise UsageError(f"--output: expected a directory, {output} is a file")
        else:
            names = output_names(inputs, tuple(PICTURE_FORMATS))
            self.targets = {source: output / name for source, name in zip(inputs.sources, names, strict=True)}
            output.mkdir(parents=True, exist_ok=True)
        originals = {os.path.realpath(source) for source in inputs.sources}
        for target in self.targets.values():
            if not originals.isdisjoint((os.path.realpath(target), os.path.realpath(_strip_path(target)))):
                raise UsageError(f"--output: {target} would overwrite an input")

    def identify(self, detections: Detections) -> tuple[str, int]:
        """Name and COCO image id of the image that these detections are of."""
        return detections.source, self.ids[detections.source]

    def draw(self, detections: Detections) -> None:
        """Write the drawn image, and the strip."""
        target = self.targets.get(detections.source)
        if target is not None:
            write_picture(target, detections.draw())
            if self.stages:
                write_picture(_strip_path(target), detections.draw_stages())

    def close(self) -> None:
        """Nothing is left open."""


def _strip_path(target: Path) -> Path:
    return target.with_name(strip_name(target.name))


class _Run:
    """One run: everything that can be found wrong beforehand is when it is made, the work is in ``execute``."""

    def __init__(self, options: argparse.Namespace, shards: Shards | None) -> None:
        # They load torch: not for -h and wrong flags.
        from sparse_rcnn.runtime import FILES_PER_WORKER, Predictor, default_weights

        self.options, self.shards = options, shards
        self.failures = self.images = self.detections = 0
        self.files: list[Any] = []  # of results; where they are merged, the first process has them
        self.writers: list[Any] = []  # what this process writes
        inputs = self._expand_inputs()
        if options.inputs and not inputs.sources:
            raise UsageError(f"no input matched: {'; '.join(inputs.problems) or 'the list is empty'}")
        if shards and not options.inputs:
            raise UsageError("a video is for one process")
        device = shards.device(options.device) if shards else options.device
        workers = _default_workers(device) if options.workers is None else options.workers
        if options.inputs:  # none begins that will have nothing to do
            workers = min(workers, len(inputs.sources) // FILES_PER_WORKER)
        self.predictor = Predictor(
            options.weights or default_weights(),
            device=device,
            dtype=options.dtype,
            batch_size=options.batch_size,
            workers=workers,
            score_threshold=options.score_threshold,
            top_k=options.top_k,
            classes=options.classes,
            nms=options.nms,
            optimize=options.optimize,
        )
        self.predictor.warm_up(options.warmup)
        if options.inputs:
            self.feed: Any = ImageFeed(inputs, options.output, options.stages, shards)
        else:
            from sparse_rcnn.video import VideoFeed

            self.feed = VideoFeed(options.video_input, options.output)
        self._open_files()
        if self.is_first:
            for problem in inputs.problems:
                self._fail(problem)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.shards is None or self.shards.rank == 0

    def _expand_inputs(self) -> Inputs:
        def expand() -> dict[str, Any]:
            return dataclasses.asdict(expand_inputs(self.options.inputs, self.options.recursive))

        return Inputs(**(self.shards.share(expand) if self.shards else expand()))

    def _open_files(self) -> None:
        """Open the result files now: a place that cannot be written to shall not be found out at the end."""
        options = self.options
        wanted = [(CocoWriter, options.json), (JsonlWriter, options.jsonl), (CsvWriter, options.csv)]
        wanted = [(writer, path) for writer, path in wanted if path is not None]
        try:
            for writer, path in wanted if self.is_first else ():
                self.files.append(writer(path))
            if self.shards and wanted:
                self.writers.append(PartWriter(wanted[0][1], self.shards))
        except OSError:
            _discard(self.files)
            self.feed.close()
            raise
        if not self.shards:
            self.writers = self.files

    def execute(self) -> int:
        """Do the work; returns the exit status. Whatever ends it, the results so far are kept."""
        start = time.perf_counter()
        interrupted = False
        # disable=None: no bar where stderr is no terminal.
        hidden = True if self.options.quiet or not self.is_first else None
        self.bar = tqdm(total=self.feed.total, unit="img", disable=hidden, leave=False, dynamic_ncols=True)
        try:
            self._detect_all()
        except KeyboardInterrupt:
            interrupted = True
        except (RuntimeError, ValueError, OSError) as error:  # out of memory, a damaged video, a full disk
            self._fail(error)
        finally:
            self.bar.close()
            self._close(self.feed, *self.writers)
        totals: dict[str, float] | None = self._totals()
        if self.shards:
            try:
                totals = self._merge(totals, interrupted)
            except (RankDied, OSError) as error:
                _discard(self.files)
                self._fail(error)
                return 1
        if totals is None:
            return 130 if interrupted else 0
        if not self.options.quiet:
            self._say(_summary(self.predictor, totals, time.perf_counter() - start))
        return 130 if interrupted else 1 if totals["failures"] else 0

    def _close(self, *targets: Any) -> None:
        for target in targets:
            try:
                target.close()
            except (ValueError, OSError) as error:
                self._fail(error)

    def _detect_all(self) -> None:
        stream = self.predictor.stream(
            self.feed.sources,
            return_stages=self.options.stages,
            keep_images=self.options.output is not None,
            on_error=self._skip,
        )
        try:
            for detections in stream:
                self._record(detections)
        except KeyboardInterrupt as interrupt:
            with contextlib.suppress(KeyboardInterrupt):  # what is done, and waited for an image before it
                self._record(stream.throw(interrupt))
                for detections in stream:
                    self._record(detections)
            raise

    def _record(self, detections: Detections) -> None:
        name, image_id = self.feed.identify(detections)
        self.images += 1
        self.detections += len(detections)
        for writer in self.writers:
            writer.add(detections, name, image_id)
        if not self.options.quiet:
            self._say(f"{name}: {describe(detections)}")
        try:
            self.feed.draw(detections)
        except OSError as error:
            self._fail(error, name)
        self.bar.update()

    def _totals(self) -> dict[str, float]:
        """Figures of this process, such that those of several can be added."""
        counts = {"images": self.images, "detections": self.detections, "failures": self.failures}
        rates = {f"{name}_rate": rate for name, rate in self.predictor.throughput()._asdict().items()}
        return dataclasses.asdict(self.predictor.timings) | rates | counts

    def _merge(self, totals: dict[str, float], interrupted: bool) -> dict[str, float] | None:
        """The totals of all processes, in the first one, which has made files of their parts; None in the others."""
        gathered = self.shards.gather([writer.path for writer in self.writers], totals, interrupted)
        if gathered is None:
            return None
        parts, totals = gathered
        for row in merge(parts, self.predictor.class_names) if parts else ():
            for file in self.files:
                file.add(*row)
        for file in self.files:
            file.close()
        return totals

    def _skip(self, source: str, error: object) -> None:
        self._fail(error, source)
        for writer in self.writers if self.shards else ():
            writer.skip(source, error)
        self.bar.update()

    def _fail(self, error: object, name: str = "") -> None:
        self.failures += 1
        _complain(error if name in str(error) else f"{name}: {error}")

    def _say(self, line: str) -> None:
        try:
            tqdm.write(line + "\n", file=sys.stdout, end="")  # in one piece, for others may write there too
            sys.stdout.flush()
        except BrokenPipeError:  # the reader (head, less) has gone; the files are still wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _discard(writers: Sequence[Any]) -> None:
    for writer in writers:
        writer.target.discard()


def _summary(predictor: Any, totals: dict[str, float], seconds: float) -> str:
    images, phases = totals["images"], ("decode", "preprocess", "forward", "postprocess")
    times = ", ".join(f"{phase} {1000 * totals[phase] / max(images, 1):.1f}" for phase in phases)
    failed = f", {totals['failures']} failed" if totals["failures"] else ""
    buckets = predictor.optimized.report()["buckets"] if predictor.optimized is not None else []
    captured = f"; captured {_count(len(buckets), 'shape')}" if buckets else ""
    decoder, forward = totals["decoder_rate"], totals["forward_rate"]
    slower = "decoder" if decoder < forward else "forward"
    return (
        f"{_count(images, 'image')}, {_count(totals['detections'], 'detection')}{failed} in {seconds:.1f} s; "
        f"ms an image: {times}{captured}; "
        f"decoder {decoder:.1f}, forward {forward:.1f} images/s: the {slower} is the slower"
    )


def _default_workers(device: str) -> int:
    """All cores of this process's share of the machine where a GPU detects; a quarter where they do so themselves, and
    of few none: whoever reads beside their threads makes all of them wait for the one whose core it takes."""
    from sparse_rcnn.runtime import pick_device

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not CAN_HAVE_WORKERS:
        return 0
    return min(16, max(1, cores) if pick_device(device).type == "cuda" else cores // 4)


def describe(detections: Detections, scores: int = 5) -> str:
    """One line: for each class how many and the best scores, best class first: ``2 fish 0.91 0.60, 1 crab 0.80``."""
    by_class: dict[str, list[float]] = {}
    for _, score, _, name in sorted(detections, key=lambda row: -row.score):
        by_class.setdefault(name, []).append(score)
    parts = []
    for name, values in by_class.items():
        shown = " ".join(f"{score:.2f}" for score in values[:scores])
        parts.append(f"{len(values)} {name} {shown}" + (" ..." if len(values) > scores else ""))
    return ", ".join(parts) or "nothing"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _complain(error: object) -> None:
    if isinstance(error, OSError) and error.filename and error.strerror:
        error = f"{os.fsdecode(error.filename)}: {error.strerror}"
    message = " ".join(str(error).split())  # one line, whatever a library put into it
    tqdm.write(f"{COMMAND}: error: {message}\n", file=sys.stderr, end="")


def _note(message: str) -> None:
    tqdm.write(f"{COMMAND}: note: {message}\n", file=sys.stderr, end="")


if __name__ == "__main__":
    sys.exit(main())
