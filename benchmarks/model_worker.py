"""One implementation of whole-image inference in a process of its own; ``benchmarks.model`` starts and asks it.

It says ``"ready"`` on standard output when its first result is there, then answers lines: ``peak`` by the greatest
resident memory in GiB, of three images; ``gate PATH`` by whether it wrote all stages' outputs there; ``parts`` by the
names of what it can time, and each of these by the seconds of one call; ``floors`` by what the components compute and
the least time that they can take.

Parts: ``whole`` from 8-bit pixels to detections, ``backbone+FPN``, ``head``; ``whole xB`` of B images at once; of an
optimized detector also ``program xB``, the captured graph alone, and its components, ``STEP xB``.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.measure import ceilings

PEER = "torchvision fasterrcnn_resnet50_fpn"
AUTOCAST = "reference, autocast"
COMPILED = "reference, compiled"  # bfloat16, without host reads
KEPT = "reference, memory kept"  # as the optimized detector leaves its process
# Name -> (optimized, type, backend); the peer is another detector.
IMPLEMENTATIONS: dict[str, Any] = {
    "reference": (False, torch.float32, "reference"),
    KEPT: (False, torch.float32, "reference"),
    AUTOCAST: (False, torch.bfloat16, "reference"),
    COMPILED: (False, torch.bfloat16, "reference"),
    "native kernels": (False, torch.float32, "native"),
    "optimized, float32": (True, torch.float32, "native"),
    "optimized, bfloat16": (True, torch.bfloat16, "native"),
    PEER: None,
}
WINDOW = 0.05  # seconds that a GPU is timed for at once
Parts = dict[str, Callable[[], Any]]


class Worker:
    """The implementation ``name`` with the weights in ``folder``, on images of (height, width) ``size``."""

    def __init__(self, name: str, folder: str, device: torch.device, size: Sequence[int], batches: list[int]) -> None:
        self.name, self.folder, self.device, self.batches = name, folder, device, batches
        generator = torch.Generator().manual_seed(1)
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        self.images = [image.to(device)] * max(batches)
        self.size, self.shape = tuple(size), tuple(-(-side // 32) * 32 for side in size)
        self.components: dict[str, Any] = {}
        self.stages: Callable[[], Any] | None = None
        self.parts: Parts = {}
        self.add_parts: Callable[[], None] = lambda: None  # those that only a benchmark has
        if name == PEER:
            self._peer()
        elif name == COMPILED:
            self._compiled()
        elif IMPLEMENTATIONS[name][0]:
            self._optimized()
        else:
            self._plain()

    def answer(self, message: str) -> Any:
        """To one line."""
        if message == "peak":
            for _ in range(2):  # the memory of the second image's tensors lies elsewhere
                self.parts["whole"]()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if message == "parts":
            self.add_parts()
            return list(self.parts)
        if message == "floors":
            return self._floors()
        if message.startswith("gate "):
            return self._write_stages(message.removeprefix("gate "))
        return self._seconds(self.parts[message])

    def _seconds(self, call: Callable[[], Any]) -> float:
        if self.device.type == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        once = self._gpu_seconds(call, 1)
        return once if once > WINDOW else self._gpu_seconds(call, min(int(WINDOW / once), 200))

    @staticmethod
    def _gpu_seconds(call: Callable[[], Any], count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    def _write_stages(self, path: str) -> bool:
        if self.stages is None:
            return False
        outputs = self.stages()
        torch.save({"logits": outputs.logits.float().cpu(), "boxes": outputs.boxes.float().cpu()}, path)
        return True

    def _floors(self) -> dict[str, dict[str, float]]:
        if not self.components:
            return {}
        best = ceilings(self.device, IMPLEMENTATIONS[self.name][1])
        limits = best["gemm_flop_per_s"], best["copy_bytes_per_s"]
        return {name: {"gflop": c.gflop, "floor_s": c.floor(*limits)} for name, c in self.components.items()}

    def _load(self) -> Any:
        from sparse_rcnn import SparseRCNN

        # In the memory format that Predictor gives it: in the other, eager is a third slower.
        return SparseRCNN.from_pretrained(self.folder).to(self.device, memory_format=torch.channels_last)

    def _plain(self) -> None:
        from sparse_rcnn import ops
        from sparse_rcnn.inference import keep_freed_memory

        _, dtype, backend = IMPLEMENTATIONS[self.name]
        model = self._load()
        if self.name == KEPT:
            keep_freed_memory()

        def run(call: Callable[[], Any]) -> Any:
            with ops.backend(backend), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                return call()

        def add(calls: Parts) -> None:
            self.parts |= {part: lambda call=call: run(call) for part, call in calls.items()}

        add({self._whole(count): lambda count=count: model(self.images[:count]) for count in self.batches})
        self.add_parts = lambda: add(_parts(model, self.images[:1]))
        self.stages = lambda: run(lambda: model(self.images[:1], return_stages=True))

    def _compiled(self) -> None:
        from benchmarks.sync_free import forward, sync_free

        model = self._load()
        boxes = copy.deepcopy(model.init_proposal_boxes)
        model.bfloat16()
        model.init_proposal_boxes = boxes
        run = torch.compile(forward(model), mode="max-autotune", dynamic=False)

        def whole(count: int) -> SimpleNamespace:
            batch, sizes = model._normalize(self.images[:count])
            with sync_free():
                outputs = run(batch.bfloat16().contiguous(memory_format=torch.channels_last), sizes)
            logits, boxes, scores = outputs
            return SimpleNamespace(logits=logits, boxes=boxes, scores=scores.cpu())

        self.parts = {self._whole(count): lambda count=count: whole(count) for count in self.batches}
        self.stages = lambda: whole(1)

    def _optimized(self) -> None:
        _, dtype, _ = IMPLEMENTATIONS[self.name]
        detector = self._load().optimize(dtype=dtype, batch_size=max(self.batches))
        self.stages = lambda: detector(self.images[:1], return_stages=True)
        self.parts = {
            self._whole(count): lambda count=count: detector.detect(self.images[:count], [self.size] * count)
            for count in self.batches
        }
        self.add_parts = lambda: self._add_program(detector._program)

    def _add_program(self, program: Any) -> None:
        from benchmarks.components import components
        from sparse_rcnn.models.proposals import to_pixels

        for count in self.batches if self.device.type == "cuda" else [1]:
            images = self.images[:count]
            sizes = torch.tensor([[*self.size, *self.size]] * count, device=self.device)
            steps = components(program, images, sizes, self.shape)
            self.components |= {f"{step} x{count}": component for step, component in steps.items()}
            if self.device.type == "cuda":
                self.parts[f"program x{count}"] = self._replayed(
                    lambda images=images, sizes=sizes: program(images, sizes, self.shape)
                )
        batch = program.normalize(self.images[:1], sizes[:1], self.shape)
        features, boxes = program.backbone(batch), to_pixels(program.proposal_boxes, sizes[:1, 2:].float())
        parts = {"backbone+FPN": lambda: program.backbone(batch), "head": lambda: program.head(features, boxes)}
        parts |= {name: component.call for name, component in self.components.items()}
        self.parts |= {name: self._replayed(call) for name, call in parts.items()}

    def _replayed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as a CUDA graph, as it is part of one in the detector; on a CPU the call."""
        if self.device.type == "cpu":
            return call
        from sparse_rcnn.cuda_capture import CudaCapture

        capture, results = CudaCapture(self.device), []
        for _ in range(3):
            capture.run(call)
        replay = capture.capture(lambda: results.append(call()))
        return lambda: (replay(), results)

    def _peer(self) -> None:
        import torchvision

        height, width = self.size
        peer = torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, min_size=min(height, width), max_size=max(height, width)
        )
        peer = peer.eval().to(self.device)
        image = self.images[0] / 255.0
        self.parts = {self._whole(count): lambda count=count: peer([image] * count) for count in self.batches}

    @staticmethod
    def _whole(count: int) -> str:
        return "whole" if count == 1 else f"whole x{count}"


def _parts(model: Any, images: list[torch.Tensor]) -> Parts:
    """Backbone with FPN and head alone; the maps are made by their first call."""
    made: dict[str, Any] = {}

    def maps() -> list[torch.Tensor]:
        if not made:
            made["batch"], made["sizes"] = model._normalize(images)
            made["maps"] = model.backbone(made["batch"])
        return made["maps"]

    def head() -> Any:
        from sparse_rcnn.models.proposals import to_pixels

        features = maps()
        boxes = to_pixels(model.init_proposal_boxes.weight, made["sizes"])
        return model.head(features, boxes, model.init_proposal_features.weight.unsqueeze(0))

    def backbone() -> Any:
        maps()
        return model.backbone(made["batch"])

    return {"backbone+FPN": backbone, "head": head}


def main() -> None:
    """Serve one parent until it closes the pipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=tuple(IMPLEMENTATIONS))
    parser.add_argument("folder")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--size", type=int, nargs=2, required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    options = parser.parse_args()
    if options.device.type == "cuda":  # float32 is float32 in all of them
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with torch.inference_mode():
        worker = Worker(options.name, options.folder, options.device, options.size, options.batches)
        worker.parts["whole"]()
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            print(json.dumps(worker.answer(line.strip())), flush=True)


if __name__ == "__main__":
    main()
