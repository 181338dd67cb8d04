"""The detector made ready for inference: what ``SparseRCNN.optimize`` returns."""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_rcnn.data.transforms import resize
from sparse_rcnn.inference.buckets import Buckets, Capture, GraphCapture
from sparse_rcnn.inference.fuse import compiled, evaluating, fuse
from sparse_rcnn.inference.head import InferenceHead
from sparse_rcnn.inference.linear import check_compression
from sparse_rcnn.inference.memory import give_freed_memory_back, keep_freed_memory, run_in_batches
from sparse_rcnn.inference.program import Program
from sparse_rcnn.inference.submitted import Run, Submitted, now
from sparse_rcnn.inference.upload import Uploads
from sparse_rcnn.inference.weight_guard import WeightGuard
from sparse_rcnn.models.batch import normalize_pixels, pad_images
from sparse_rcnn.models.sparse_rcnn import SparseRCNN, StageOutputs
from sparse_rcnn.onednn import cpu_has

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZE_MULTIPLE = 32
# Relative error that rounding may bring, through some fifty layers, when they are fused.
_FUSING_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


class StaleWeightsError(RuntimeError):
    """The detector's weights changed after it was optimized."""


class OptimizedSparseRCNN:
    """Inference with the weights that a detector has now; made by :meth:`SparseRCNN.optimize`.

    BatchNorm is folded, activations and residual sums are fused to their convolutions, tensors are channels-last, what
    depends on no image is computed once, and of the class towers only the last one runs. On a GPU each shape of batch
    runs as one CUDA graph from 8-bit pixels to detections; weights of the original's head that have the right type are
    shared with it. On a CPU oneDNN's order of them is another, and in float32 Winograd's filtering computes most 3x3
    convolutions. The original may not change any more; one tells so by :class:`StaleWeightsError`. It is not kept: who
    has no further use for it and lets it go saves its memory, on a GPU that of its backbone.

    Args:
        model: the detector.
        device: None is the model's.
        dtype: of features and weights; boxes are float32. None is bfloat16 (float16 where it has none) on a GPU and
            float32 on a CPU. A half type that a CPU has no instructions for becomes float32, with a warning.
        batch_size: images that a graph takes at most.
        image_sizes: (height, width) of images, as the network sees them, whose graphs are captured now.
        keep_memory: on a CPU let the process keep the memory that it frees, which saves a fifth of the time; it
            concerns the whole process.
        compile: run the backbone through ``torch.compile``, once for each shape, which takes minutes.
        out_layer_rank: put factors of this rank in the place of ``out_layer``'s weights; None keeps them. Inexact:
            ``python -m benchmarks.compression`` says how much.
        fp8: weights and inputs of ``dynamic_layer`` and ``out_layer`` in 8-bit floating point. Inexact, as above. On a
            CPU it is slow: good for seeing what it does to the results.
        capture: stands in for the capture of CUDA graphs (for tests).

    Attributes:
        config, device, dtype, batch_size.

    Raises:
        ValueError: a dtype that this GPU or this package has not, a batch size below 1, or a rank that the layer cannot
            have.
    """

    def __init__(
        self,
        model: SparseRCNN,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 1,
        image_sizes: Iterable[tuple[int, int]] = (),
        keep_memory: bool = True,
        compile: bool = False,
        out_layer_rank: int | None = None,
        fp8: bool = False,
        capture: Capture | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        weight = model.init_proposal_boxes.weight
        self.config, self.batch_size = model.config, batch_size
        self.device = weight.device if device is None else torch.empty(0, device=device).device
        self.dtype = resolve_dtype(self.device, dtype)
        check_compression(out_layer_rank, self.config.hidden_dim, fp8, self.device)
        self._compression = {"out_layer_rank": out_layer_rank, "fp8": fp8}
        self._guard = WeightGuard(model)
        with torch.inference_mode(), _collecting_circles():  # tracing leaves some that hold the backbone
            backbone, self._backbone_note = _fused(model.backbone, self.device, self.dtype, winograd=not compile)
            give_freed_memory_back()  # what was needed to fold, before the most is taken
            head = InferenceHead(model, self.device, self.dtype, **self._compression)
        if compile:
            backbone, self._backbone_note = compiled(backbone), f"{self._backbone_note}, compiled"
        self._program = Program(model, backbone, head, self.device, self.dtype)
        on_gpu = self.device.type == "cuda"
        with self._on_device():
            capture = GraphCapture(self.device) if capture is None and on_gpu else capture
            self._uploads = Uploads(self.device) if on_gpu else contextlib.nullcontext  # gives images as they are
        self._buckets = Buckets(self._program, capture, self.device, batch_size) if capture else None
        self._most = batch_size if capture else None  # images at a time; None is any number
        self._keeps_memory = keep_memory and self.device.type == "cpu"
        self._seen: set[tuple[int, int, int]] = set()  # shapes of batches that memory was kept of
        if self._keeps_memory:
            keep_freed_memory()  # only now: what was needed to fold is given back
        for size in image_sizes:
            self.warm_up(size)

    def __call__(self, images: Sequence[Tensor], return_stages: bool = False) -> list[dict[str, Tensor]] | StageOutputs:
        """What the model returns for these images in evaluation mode; see :meth:`SparseRCNN.forward`."""
        if return_stages or not _are_pixels(images):
            return self._call_uncaptured(images, return_stages)
        results = self.detect(images, [tuple(image.shape[1:]) for image in images])
        return [{name: values.to(self.device) for name, values in result.items()} for result in results]

    def detect(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Resize and detect.

        Args:
            images: uint8 [3, h, w] RGB, in any memory order, on any device.
            sizes: (height, width) that the network sees each in.

        Returns:
            A dict an image: ``boxes`` [n, 4] float32 xyxy in pixels of the image given, clipped to it, ``scores`` [n]
            descending, ``labels`` [n] and ``proposals`` [n], all on the CPU.

        Raises:
            StaleWeightsError: the model's weights changed.
            torch.OutOfMemoryError: even a single image is too much for the GPU's memory.
        """
        return self.submit(images, sizes).results()

    @torch.inference_mode()
    def submit(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Submitted:
        """Begin to :meth:`detect`; what it returns waits for the results, while the GPU goes on to what is submitted
        next. On a CPU they are there already."""
        images, shape = list(zip(images, sizes, strict=True)), padded_shape(sizes)
        with self._on_device():
            # Any number of images, all padded to one shape: what one is padded to changes what is found.
            return Submitted(
                run_in_batches(
                    lambda some: [self._run(*zip(*some, strict=True), shape)],
                    images,
                    self._most or len(images),
                    self._halve,
                )
            )

    def warm_up(self, size: tuple[int, int], images: int | None = None) -> None:
        """Run on blank images of this size, ``batch_size`` or so many: captures a GPU's graph for their shape."""
        blank = torch.zeros(3, *size, dtype=torch.uint8)
        self.detect([blank] * (images or self.batch_size), [tuple(size)] * (images or self.batch_size))

    def is_stale(self) -> bool:
        """Whether the model's weights are no longer those that this was made from."""
        return self._guard.changed()

    def report(self) -> dict[str, Any]:
        """What was done to the model and what was captured, in plain values."""
        buckets = self._buckets
        return {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "backbone": self._backbone_note,
            **self._compression,
            "batch_size": self.batch_size,
            "buckets": [{**key._asdict(), "replays": count} for key, count in buckets.replays.items()]
            if buckets
            else [],
            "batches_without_bucket": buckets.uncaptured if buckets else 0,
        }

    def _check_weights(self) -> None:
        if self.is_stale():
            raise StaleWeightsError("the model's weights changed since optimize(): call it again")

    def _on_device(self) -> contextlib.AbstractContextManager:
        """Streams, events and captures are the current GPU's."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _halve(self, batch_size: int) -> None:
        """Run smaller batches from now on."""
        self.batch_size = self._most = batch_size
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # what is captured may be running
        if self._buckets:
            self._buckets.clear()
            self._buckets.batch_size = batch_size
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], shape: tuple[int, int]) -> Run:
        """Begin to compute one batch."""
        captured = self._buckets.find(len(images), *shape) if self._buckets else None
        if captured is None:
            self._check_weights()
            begin = now(self.device)
            rows = torch.tensor([(*image.shape[1:], *size) for image, size in zip(images, sizes, strict=True)])
            images = [image.to(self.device, non_blocking=True) for image in images]
            run = Run(self._program(images, rows.to(self.device), shape), len(images), begin)
            self._settle((len(images), *shape))
            return run
        large = [index for index, image in enumerate(images) if image.numel() > captured.capacity]
        resized = {index: (sizes[index], images[index].shape[1:]) for index in large}
        images = [resize(image.cpu(), sizes[i]) if i in resized else image for i, image in enumerate(images)]
        with self._uploads(images) as there:
            rows = [(*image.shape[1:], *size) for image, size in zip(images, sizes, strict=True)]
            captured.inputs.fill(there, rows)
        begin = now(self.device)
        captured.replay()
        run = Run(captured.outputs, len(images), begin, resized)
        self._check_weights()  # while the GPU works
        return run

    def _settle(self, shape: tuple[int, int, int]) -> None:
        """After the first batch of a shape, keep no memory of it: the next ones lay their tensors out in what is free
        by then, and all alike, so that a tenth of the memory would lie idle."""
        if self._keeps_memory and shape not in self._seen:
            self._seen.add(shape)
            give_freed_memory_back()

    @torch.inference_mode()
    def _call_uncaptured(self, images: Sequence[Tensor], return_stages: bool) -> list[dict[str, Tensor]] | StageOutputs:
        self._check_weights()
        with self._on_device():
            pixels, sizes = (
                tensor.to(self.device, non_blocking=True)
                for tensor in pad_images(images, torch.float32, pin_memory=self.device.type == "cuda")
            )
            batch = normalize_pixels(pixels, sizes, self.config.pixel_mean, self.config.pixel_std)
            batch = batch.to(self.dtype).contiguous(memory_format=torch.channels_last)
            sizes = sizes.long().repeat(1, 2)
            begin = now(self.device)
            found, stages = self._program.stages(batch, sizes)
            results = Run(found, len(images), begin).results()
        detections = [{name: values.to(self.device) for name, values in result.items()} for result in results]
        return StageOutputs(*stages, detections, losses={}) if return_stages else detections


def resolve_dtype(device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    """The type to compute in on ``device``; see :class:`OptimizedSparseRCNN`.

    Raises:
        ValueError: none of the three, or bfloat16 on a GPU that has none.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if dtype == torch.bfloat16 and not has_bfloat16:
            raise ValueError(
                f"dtype: expected float32 or float16, {torch.cuda.get_device_name(device)} has no bfloat16"
            )
        return dtype or (torch.bfloat16 if has_bfloat16 else torch.float16)
    if dtype is not None and not cpu_has(dtype):
        name = str(dtype).removeprefix("torch.")
        warnings.warn(f"this processor has no instructions for {name}: computing in float32", stacklevel=4)
        return torch.float32
    return dtype or torch.float32


def padded_shape(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """What images of these sizes are padded to in one batch."""
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    return -(-height // SIZE_MULTIPLE) * SIZE_MULTIPLE, -(-width // SIZE_MULTIPLE) * SIZE_MULTIPLE


def _are_pixels(images: Sequence[Tensor]) -> bool:
    """Whether these are 8-bit images; of all others the model tells what is wrong, if it is wrong."""
    return len(images) > 0 and all(
        isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3 and image.shape[0] == 3
        and 0 not in image.shape
        for image in images
    )  # fmt: skip


@contextlib.contextmanager
def _collecting_circles() -> Iterator[None]:
    """Free what is made inside and afterwards held by nothing but itself; looking at nothing else, which would take
    longer than to make a detector."""
    collects = gc.isenabled()
    gc.disable()  # so that all of it stays in the youngest generation
    try:
        yield
    finally:
        if collects:
            gc.enable()
    gc.collect(0)


def _fused(backbone: nn.Module, device: torch.device, dtype: torch.dtype, winograd: bool) -> tuple[nn.Module, str]:
    """``backbone`` fused, or as it is where that does not work; and which, in words."""
    try:
        fused = fuse(backbone, device, dtype, winograd)
        error = _difference(backbone, fused, device, dtype)
        if error <= _FUSING_ERROR[dtype]:
            return fused, "fused"
        reason = f"fused it differs by {error:.2g}"
    except Exception as problem:  # tracing runs a backbone of any kind on objects that it does not expect
        reason = f"{type(problem).__name__}: {problem}"
    plain = copy.deepcopy(backbone).eval().to(device, dtype, memory_format=torch.channels_last)
    return plain, f"not fused ({reason})"


def _difference(backbone: nn.Module, fused: nn.Module, device: torch.device, dtype: torch.dtype) -> float:
    """Greatest relative difference of the two backbones' maps of one small image."""
    parameter = next(backbone.parameters())
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with evaluating(backbone):
        expected = backbone(image.to(parameter))
    maps = fused(image.to(device, dtype, memory_format=torch.channels_last))
    errors = [
        (got.to(want).float() - want.float()).norm() / want.float().norm()
        for got, want in zip(maps, expected, strict=True)
    ]
    return float(torch.stack(errors).max())
