"""One implementation of the training step in a process of its own; ``benchmarks.train_step`` starts and asks it.

It says on standard output that it is ready after its first step, then answers lines: ``step`` by the seconds of one
step and of its parts, ``gate PATH`` by writing losses and gradients of the first step there, ``peak`` by the greatest
memory in GiB: resident on a CPU, allocated on a GPU.
"""

from __future__ import annotations

import io
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image

from sparse_rcnn import SparseRCNN, ops
from sparse_rcnn.cuda_capture import CudaCapture
from sparse_rcnn.data.decode import decode_image
from sparse_rcnn.data.transforms import TrainTransform
from sparse_rcnn.engine.cuda_graph import WARM_UP_STEPS, GraphedStep
from sparse_rcnn.engine.optimizer import build_optimizer
from sparse_rcnn.engine.step import TrainStep
from sparse_rcnn.inference.memory import keep_freed_memory
from sparse_rcnn.models import backbone, dynamic_head, linear
from sparse_rcnn.models.batch import Batch

NUM_BOXES = 8
PARTS = ("data", "forward", "matching and loss", "backward", "optimizer")


class Implementation(NamedTuple):
    """How a step is computed."""

    backend: str
    bfloat16: bool = False
    float64: bool = False
    compiled: bool = False
    graphed: bool = False
    keeps_memory: bool = False  # on a CPU, as the trainer's process does
    own_layers: bool = False  # the references of the operators alone: convolutions and linear layers as of the kernels


REFERENCE = "reference, float32"
# For the gates alone.
EXACT, NATIVE_EXACT = "reference, float64", "native, float64"
OWN_LAYERS = "reference operators, float32"
IMPLEMENTATIONS = {
    EXACT: Implementation("reference", float64=True),
    NATIVE_EXACT: Implementation("native", float64=True),
    OWN_LAYERS: Implementation("reference", own_layers=True),
    REFERENCE: Implementation("reference"),
    "reference, memory kept, float32": Implementation("reference", keeps_memory=True),
    "reference, bfloat16": Implementation("reference", bfloat16=True),
    "reference, torch.compile, float32": Implementation("reference", compiled=True),
    "reference, torch.compile, bfloat16": Implementation("reference", bfloat16=True, compiled=True),
    "native, float32": Implementation("native", keeps_memory=True),
    "native, bfloat16": Implementation("native", bfloat16=True, keeps_memory=True),
    "native, CUDA graph, bfloat16": Implementation("native", bfloat16=True, graphed=True),
}


def main() -> None:
    """Serve one parent until it closes the pipe."""
    name, folder, device, *numbers = sys.argv[1:]
    batch_size, height, width = map(int, numbers)
    worker = Worker(IMPLEMENTATIONS[name], folder, torch.device(device), batch_size, (height, width))
    for _ in range(1 + WARM_UP_STEPS * worker.implementation.graphed):
        worker.seconds()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        message, _, path = line.strip().partition(" ")
        print(json.dumps({"step": worker.seconds, "peak": worker.peak}[message]() if not path else worker.gate(path)))
        sys.stdout.flush()


class Worker:
    """A training step of random weights on random pictures.

    The reference is what one would write: torchvision's blocks, and the process's memory as glibc handles it. Ours is
    what the trainer does.
    """

    def __init__(
        self, implementation: Implementation, folder: str, device: torch.device, batch_size: int, size: tuple[int, int]
    ) -> None:
        self.implementation, self.device, self.size = implementation, device, size
        plain = implementation.backend == "reference" and not implementation.own_layers
        # As the trainer has it. On a GPU eager PyTorch is the faster for channels_last.
        layout = torch.contiguous_format if plain and device.type == "cpu" else torch.channels_last
        model = SparseRCNN.from_pretrained(folder).to(device, memory_format=layout).train()
        model = model.double() if implementation.float64 else model
        if implementation.own_layers:
            for module in (backbone, dynamic_head, linear):
                module.is_reference = lambda: False
        if implementation.keeps_memory and device.type == "cpu":
            keep_freed_memory()
        self.model = model
        self.step = TrainStep(model, build_optimizer(model, lr=2.5e-5), 1.0, implementation.bfloat16)
        self.call: Callable[[Batch], None] = lambda batch: self.step(batch.to(device))
        if implementation.compiled:
            model.compile()
        if implementation.graphed:
            self.call = GraphedStep(self.step, CudaCapture(device), print)
        self.first: list[torch.Tensor] | None = None  # report and gradients
        self.step.optimizer.register_step_pre_hook(self._note_gradients)
        self.stamps: dict[str, float] = {}
        self.stamping = False
        self._watch()
        self.generator = torch.Generator().manual_seed(1)
        self.files = [self._file() for _ in range(batch_size)]
        self.transform = TrainTransform((min(size),), max(size))

    def _file(self) -> bytes:
        """A picture of half the size, as a JPEG, which decoding and resizing make one of the whole."""
        height, width = (side // 2 for side in self.size)
        coarse = torch.randint(0, 256, (3, height // 8, width // 8), dtype=torch.uint8, generator=self.generator)
        picture = Image.fromarray(coarse.permute(1, 2, 0).numpy()).resize((width, height))
        file = io.BytesIO()
        picture.save(file, "JPEG")
        return file.getvalue()

    def data(self) -> Batch:
        """What a loader does, and the padding."""
        images, targets = [], []
        for file in self.files:
            image = torch.from_numpy(decode_image(file)).permute(2, 0, 1)
            corners = torch.rand(NUM_BOXES, 2, generator=self.generator) * 0.6 * min(self.size) / 2
            boxes = torch.cat([corners, corners + 10 + torch.rand(NUM_BOXES, 2, generator=self.generator) * 90], 1)
            labels = torch.randint(0, self.model.config.num_classes, (NUM_BOXES,), generator=self.generator)
            image, target = self.transform(image, {"boxes": boxes, "labels": labels}, self.generator)
            images.append(image)
            targets.append(target)
        return self.model.prepare(images, targets)

    def seconds(self) -> dict[str, float]:
        """Of one step and its parts; on a GPU the parts are those of a further step, which waits after each."""
        begin = time.perf_counter()
        batch = self.data()
        data = time.perf_counter() - begin
        self.stamping = self.device.type == "cpu"
        start, end = self._run(batch)
        found = {"whole": end - start, "data": data}
        if not self.stamping and not (self.implementation.compiled or self.implementation.graphed):
            self.stamping = True
            start, end = self._run(batch)
        if at := self.stamps:
            found |= {"matching and loss": at["losses"] - at["outputs"], "backward": at["gradients"] - at["losses"]}
            found |= {"forward": at["outputs"] - start, "optimizer": end - at["gradients"]}
        return found

    def _run(self, batch: Batch) -> tuple[float, float]:
        """When a step began and when it was done."""
        self.stamps.clear()
        start = self._now()
        with ops.backend(self.implementation.backend):
            self.call(batch)
        return start, self._now()

    def _watch(self) -> None:
        criterion, backward = self.model.criterion, self.step._backward

        def timed(batches: Any) -> torch.Tensor:
            losses = backward(batches)
            self._stamp("gradients")
            return losses

        if self.implementation.compiled or self.implementation.graphed:
            return  # which has no such places
        self.step._backward = timed
        criterion.register_forward_pre_hook(lambda *_: self._stamp("outputs"))
        criterion.register_forward_hook(lambda *_: self._stamp("losses"))

    def _stamp(self, name: str) -> None:
        if self.stamping:
            self.stamps[name] = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _note_gradients(self, *_: Any) -> None:
        if self.first is None and not self.implementation.graphed:
            self.first = [parameter.grad.double().cpu() for parameter in self.step.parameters]

    def gate(self, path: str) -> bool:
        """Write a step's report, and the first step's gradients; a graph has the step's that it is made of."""
        if self.first is None:
            return False
        torch.save(self.first, path)
        self.first = []
        return True

    def peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
