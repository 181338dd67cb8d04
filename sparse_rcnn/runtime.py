"""The way from an image in any form to :class:`Detections`: decode, resize, detect, scale back, select."""

from __future__ import annotations

import importlib.resources
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sparse_rcnn.data.decode import ImageError, decode_image
from sparse_rcnn.data.read_ahead import Worker, begin_workers, read_file, read_images
from sparse_rcnn.data.transforms import network_size, resize
from sparse_rcnn.detections import Detections, resolve_classes
from sparse_rcnn.inference import OptimizedSparseRCNN, StaleWeightsError, padded_shape, resolve_dtype
from sparse_rcnn.inference.memory import run_in_batches
from sparse_rcnn.inference.pipeline import Pipeline
from sparse_rcnn.models import SparseRCNN

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Files that a worker must have to read to be worth its start, which takes as long as reading some large photographs.
FILES_PER_WORKER = 16
# Batches whose images are held at a time, to find some that are padded alike.
_HELD_BATCHES = 4
OnError = Callable[[Any, ImageError], None]


@dataclass
class Timings:
    """Seconds spent, by phase, summed over ``images``.

    ``decode`` includes the reading (and what an iterator over images takes to give the next one); worker processes do
    it side by side with the rest and with each other, threads with each other. ``forward`` is the device's, with the
    preprocessing of an optimized model, and on a CPU with its transfers. Drawing and writing are not in here.
    """

    images: int = 0
    decode: float = 0.0
    preprocess: float = 0.0
    forward: float = 0.0
    postprocess: float = 0.0
    readers: int = 1  # processes or threads that shared the decoding

    def per_image(self) -> dict[str, float]:
        """Mean milliseconds of each phase, by name."""
        phases = ("decode", "preprocess", "forward", "postprocess")
        return {phase: 1000 * getattr(self, phase) / max(self.images, 1) for phase in phases}


class Throughput(NamedTuple):
    """Images a second of the two that work side by side, each if it need not wait for the other."""

    decoder: float
    forward: float


@dataclass
class _Loaded:
    """One image that was read, or that could not be."""

    source: Any
    error: ImageError | None
    image: np.ndarray | None  # uint8 [H, W, 3] RGB, original size
    size: tuple[int, int] | None  # (height, width) that the network sees it in

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) that it is padded to."""
        return padded_shape([self.size])

    @property
    def pixels(self) -> Tensor:
        """uint8 [3, H, W], a view."""
        return torch.from_numpy(self.image).permute(2, 0, 1)


class Predictor:
    """Detections from images, with everything around the network done.

    Args:
        model: a ``SparseRCNN`` (moved to the device and put in evaluation mode), or the path of a checkpoint that
            ``SparseRCNN.from_pretrained`` reads.
        device: a torch device, or ``auto``: CUDA if there is one, else the CPU.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``: bfloat16 (or float16 where it has none) on a GPU,
            float32 on a CPU. A half type that a CPU has no instructions for becomes float32, with a warning. Boxes are
            float32 in any case.
        batch_size: images a forward pass. Only images that are padded alike share one, for the network sees the
            padding: detections are those of each image alone.
        workers: processes that read the files and URLs of a stream or list ahead, where there are enough of them; 0
            reads in this process. Those of the first stream begin at once, while the model is loaded.
        score_threshold, top_k, classes: which detections to keep, see :meth:`Detections.filter`. By default all N.
        nms: IoU of a class-wise suppression, see :meth:`Detections.nms`. None is the model's own (``config.nms``),
            which is none if it follows the paper; 1 is none. With votes where the model has them (``config.votes``).
        optimize: run what ``SparseRCNN.optimize`` makes of the model, made again when its weights change; False runs
            the model itself, half types by autocast.

    Attributes:
        model, device.
        optimized: the ``OptimizedSparseRCNN``, or None.
        class_names: the K names in label order; "0", "1" and so on where the model has none.
        timings: :class:`Timings` since the predictor was made; assign a fresh one to start over.

    Raises:
        ValueError: an argument out of range, an unknown class, a device that is not there, a bad checkpoint.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        device: str | torch.device = "auto",
        dtype: str = "float32",
        batch_size: int = 1,
        workers: int = 0,
        score_threshold: float = 0.0,
        top_k: int | None = None,
        classes: Sequence[str | int] | None = None,
        nms: float | None = None,
        optimize: bool = True,
    ) -> None:
        if dtype != "auto" and dtype not in _DTYPES:
            raise ValueError(f"dtype: expected auto or one of {', '.join(_DTYPES)}, got {dtype!r}")
        _check_at_least("batch_size", batch_size, 1)
        _check_at_least("workers", workers, 0)
        _check_fraction("score_threshold", score_threshold)
        if top_k is not None:
            _check_at_least("top_k", top_k, 1)
        if nms is not None:
            _check_fraction("nms", nms)
        self.device = pick_device(device)
        self.batch_size, self.workers = batch_size, workers
        self._begun = begin_workers(workers, self._ahead)  # for the first stream
        weakref.finalize(self, _stop, self._begun)
        if not isinstance(model, nn.Module):
            model = SparseRCNN.from_pretrained(model)
        self.model = model.eval().to(self.device)
        self.dtype = _DTYPES.get(dtype)
        self._most = batch_size  # that the memory suffices for
        self.optimized: OptimizedSparseRCNN | None = None
        if optimize and isinstance(model, SparseRCNN):
            self._optimize()
        else:
            self.dtype = self.dtype or resolve_dtype(self.device, None)
            self.model.to(memory_format=torch.channels_last)
        names = model.config.class_names
        self.class_names = tuple(names if names is not None else map(str, range(model.config.num_classes)))
        self.score_threshold = score_threshold
        self.top_k = top_k
        self.classes = None if classes is None else resolve_classes(classes, self.class_names)
        self.nms = model.config.nms if nms is None else nms
        self.timings = Timings()

    def _optimize(self) -> None:
        self.optimized = self.model.optimize(self.device, self.dtype, self.batch_size)
        self.dtype = self.optimized.dtype

    def warm_up(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Make ready for images of these sizes (height, width): on a GPU each shape of batch is captured once, by its
        first batch if not now."""
        config = self.model.config
        for size in sizes:
            if self.optimized is not None:
                self.optimized.warm_up(network_size(*size, config.min_size, config.max_size))

    def predict(self, source: Any, return_stages: bool = False) -> Detections | list[Detections] | Iterator[Detections]:
        """Detect the objects in one image or in many.

        Args:
            source: an image: a path, an http(s) URL, a PIL image, a uint8 RGB array [H, W, 3], or an RGB tensor
                [3, H, W] (uint8 0..255 or floating 0..1); or a list or tuple of images, or an iterator over images.
            return_stages: keep the boxes and scores of every stage too.

        Returns:
            ``Detections`` for an image, a list for a list, and for an iterator a generator. Boxes are in pixels of each
            image at its original size.

        Raises:
            ImageError: an image cannot be read.
            TypeError, ValueError: not an image in one of these forms.
        """
        if isinstance(source, (list, tuple)):
            return list(self.stream(source, return_stages))
        if isinstance(source, Iterator):
            return self.stream(source, return_stages)
        return next(self.stream([source], return_stages))

    def stream(
        self,
        sources: Iterable[Any],
        return_stages: bool = False,
        keep_images: bool = False,
        on_error: OnError | None = None,
    ) -> Iterator[Detections]:
        """Detections of each of ``sources``, in order, in memory that does not grow with their number.

        With a batch size of 1 and no workers an image is asked for when its detections are. Otherwise up to four
        batches' images are held, to find some that are padded alike; and workers are ahead of these by two batches'
        images, or two a worker if that is more. Without workers the images of a batch are read by threads.

        Args:
            sources: images as :meth:`predict` takes them.
            return_stages: keep the boxes and scores of every stage too.
            keep_images: keep each decoded image in ``Detections.image``, to be drawn on.
            on_error: called with a source that cannot be read and the error, in its turn; the source is then left out.
                By default the error is raised.
        """
        workers, is_known = self.workers, isinstance(sources, Sized)
        if is_known:
            workers = min(workers, len(sources) // FILES_PER_WORKER)
        # A GPU has two batches, one to compute and one at hand, unless the next image may depend on the last result.
        depth = 2 if self.device.type == "cuda" and (workers or is_known) else 1
        threads = 1 if workers else min(torch.get_num_threads(), self.batch_size)
        self.timings.readers = workers or threads

        def tell(loaded: _Loaded) -> None:
            if on_error is None:
                raise loaded.error
            on_error(loaded.source, loaded.error)

        pipeline = Pipeline(
            lambda batch: self._submit(batch, return_stages, keep_images),
            tell,
            self.batch_size,
            window=_HELD_BATCHES * self.batch_size,
            depth=depth,
        )
        yield from pipeline.run(self._load(sources, workers, threads))

    def throughput(self) -> Throughput:
        """What the decoder and the forward pass would do, each by itself, by ``timings``."""
        seconds = self.timings
        forward = seconds.preprocess + seconds.forward
        decode = seconds.decode / seconds.readers
        return Throughput(*(seconds.images / max(phase, 1e-9) for phase in (decode, forward)))

    @property
    def _ahead(self) -> int:
        """Images that workers are ahead by."""
        return 2 * max(self.workers, self.batch_size)

    def _load(self, sources: Iterable[Any], workers: int, threads: int) -> Iterator[_Loaded]:
        begun: int | list[Worker] = workers
        if workers and len(self._begun) == workers:
            begun = self._begun[:]
            self._begun.clear()
        ahead = self._ahead if workers else _HELD_BATCHES * self.batch_size
        for found in read_images(sources, read_image, begun, ahead, threads):
            self.timings.decode += found.seconds
            size = None
            if found.error is None:
                size = network_size(*found.pixels.shape[:2], self.model.config.min_size, self.model.config.max_size)
            yield _Loaded(found.source, found.error, found.pixels, size)

    def _submit(
        self, batch: Sequence[_Loaded], return_stages: bool, keep_images: bool
    ) -> Callable[[], list[Detections]]:
        """Begin to detect; the call waits for the detections."""
        if self.optimized is None or return_stages:
            found = run_in_batches(lambda some: self._run_stages(some, return_stages), batch, self._most, self._halve)
            return lambda: self._finish_all(batch, *zip(*found, strict=True), keep_images)
        images, sizes = [loaded.pixels for loaded in batch], [loaded.size for loaded in batch]
        submitted = self._with_present_weights(lambda: self.optimized.submit(images, sizes))

        def wait() -> list[Detections]:
            results = submitted.results()
            self.timings.forward += submitted.seconds
            return self._finish_all(batch, results, [None] * len(batch), keep_images)

        return wait

    def _halve(self, most: int) -> None:
        self._most = most
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _finish_all(
        self,
        batch: Sequence[_Loaded],
        results: Sequence[dict[str, Tensor]],
        stages: Sequence[_Stages | None],
        keep_images: bool,
    ) -> list[Detections]:
        begin = time.perf_counter()
        found = [
            self._finish(loaded, result, stage, keep_images)
            for loaded, result, stage in zip(batch, results, stages, strict=True)
        ]
        self.timings.images += len(batch)
        self.timings.postprocess += time.perf_counter() - begin
        return found

    def _with_present_weights(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except StaleWeightsError:
            self._optimize()
            return call()

    @torch.inference_mode()
    def _run_stages(
        self, batch: Sequence[_Loaded], return_stages: bool
    ) -> list[tuple[dict[str, Tensor], _Stages | None]]:
        """Detections in pixels of each image as it was read, by the model's own contract: images at network size,
        resized here; and every stage if asked for."""
        start = time.perf_counter()
        images = [resize(loaded.pixels, loaded.size) for loaded in batch]
        resized = time.perf_counter()
        images = [image.to(self.device) for image in images]
        if self.optimized is not None:
            outputs = self._with_present_weights(lambda: self.optimized(images, return_stages=return_stages))
        else:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                outputs = self.model(images, return_stages=return_stages)
        results = outputs.detections if return_stages else outputs
        results = [{key: value.cpu() for key, value in result.items()} for result in results]
        for result, loaded in zip(results, batch, strict=True):
            result["boxes"] = to_original(result["boxes"].float(), loaded.size, loaded.image.shape[:2])
        stages = _stages_of(outputs, self.model.config.classification) if return_stages else [None] * len(batch)
        self.timings.preprocess += resized - start
        self.timings.forward += time.perf_counter() - resized
        return list(zip(results, stages, strict=True))

    def _finish(
        self, loaded: _Loaded, result: dict[str, Tensor], stages: _Stages | None, keep_image: bool
    ) -> Detections:
        """Official post-processing of scaled boxes: clip to the image, drop empty ones; then the user's selection."""
        size, network = loaded.image.shape[:2], loaded.size
        result = {
            name: (values.float() if values.is_floating_point() else values).numpy() for name, values in result.items()
        }
        boxes = result["boxes"].clip(0, np.array([size[1], size[0]] * 2, np.float32))
        full = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        fields: dict[str, Any] = {}
        if stages is not None:
            fields = {
                "proposal_index": result["proposals"][full],
                "proposal_boxes": to_original(stages.proposal_boxes, network, size).numpy(),
                "stage_boxes": to_original(stages.boxes, network, size).numpy(),
                "stage_scores": stages.scores.amax(-1).numpy(),
            }
        found = Detections(
            boxes=boxes[full],
            scores=result["scores"][full],
            labels=result["labels"][full],
            class_names=self.class_names,
            image_size=size,
            source=os.fspath(loaded.source) if isinstance(loaded.source, (str, os.PathLike)) else None,
            image=loaded.image if keep_image else None,
            **fields,
        )
        if self.nms is not None:  # first, for those of low score have votes
            found = found.nms(self.nms, self.model.config.votes)
        return found.filter(self.score_threshold, self.top_k, self.classes)


@dataclass
class _Stages:
    """Stages of one image on the CPU, boxes in pixels of the network's image."""

    proposal_boxes: Tensor  # [N, 4]
    boxes: Tensor  # [S, N, 4]
    scores: Tensor  # [S, N, K]


def _stop(workers: Iterable[Worker]) -> None:
    for worker in workers:
        worker.stop()


def _stages_of(outputs: Any, classification: str) -> list[_Stages]:
    """Split ``StageOutputs`` of a batch into its images."""
    logits = outputs.logits.float().cpu()  # [S, B, N, K]
    scores = logits.sigmoid() if classification == "focal" else logits.softmax(-1)[..., :-1]
    boxes, proposal_boxes = outputs.boxes.float().cpu(), outputs.proposal_boxes.float().cpu()
    return [_Stages(proposal_boxes[i], boxes[:, i], scores[:, i]) for i in range(len(proposal_boxes))]


def to_original(boxes: Tensor, network: Sequence[int], original: Sequence[int]) -> Tensor:
    """Scale xyxy boxes [..., 4] from an image of size ``network`` to ``original``, both (height, width)."""
    x, y = original[1] / network[1], original[0] / network[0]
    return boxes * boxes.new_tensor([x, y, x, y])


def read_image(source: Any) -> np.ndarray:
    """Any form of one image as uint8 [H, W, 3] RGB, contiguous and writable.

    Raises:
        ImageError: a file or URL that cannot be read as an image.
        TypeError, ValueError: not an image; see :meth:`Predictor.predict` for what is.
    """
    if isinstance(source, (str, os.PathLike)):
        image = read_file(source)
    elif isinstance(source, Tensor):
        image = _from_tensor(source)
    elif isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ValueError(f"source: expected a uint8 RGB array [H, W, 3], got {source.dtype} {list(source.shape)}")
        image = source
    elif isinstance(source, Image.Image):
        image = decode_image(source)
    else:
        raise TypeError(
            f"source: expected a path, URL, PIL image, array or tensor, or a list or iterator of them, "
            f"got {type(source).__name__}"
        )
    return np.require(image, requirements=["C", "W"])


def _from_tensor(tensor: Tensor) -> np.ndarray:
    shape = list(tensor.shape)
    if tensor.dim() != 3 or shape[0] != 3 or 0 in shape:
        raise ValueError(f"source: expected an RGB tensor [3, H, W], got shape {shape}")
    if tensor.is_floating_point():
        low, high = tensor.aminmax()
        if not (low >= 0 and high <= 1):  # written so that NaN fails
            raise ValueError(f"source: expected a floating tensor within 0..1, got {low:g}..{high:g}")
        tensor = (tensor * 255).round().to(torch.uint8)
    elif tensor.dtype != torch.uint8:
        raise ValueError(f"source: expected a tensor of uint8 or floating point, got {tensor.dtype}")
    return tensor.permute(1, 2, 0).cpu().numpy()


def pick_device(device: str | torch.device) -> torch.device:
    """The torch device; ``auto`` is CUDA if there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device: expected one that is here, got {str(device)!r} ({reason})") from error
    return device


def default_weights() -> Path:
    """Directory of the bundled demo model.

    Raises:
        ValueError: this installation does not have it.
    """
    directory = Path(str(importlib.resources.files("sparse_rcnn"))) / "assets" / "demo"
    if not (directory / "model.safetensors").is_file():
        raise ValueError(f"weights: the bundled demo model is missing ({directory})")
    return directory


def _check_at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number within 0..1, got {value!r}")
