"""One implementation of whole-image inference in a process of its own; ``benchmarks.model`` starts and asks it.

It says on standard output which parts it can time when its first result is there, then answers lines: the name of a
part by the seconds of one call, ``gate PATH`` by whether it wrote all stages' outputs there, ``peak`` by the greatest
resident memory in GiB.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

PEER = "torchvision fasterrcnn_resnet50_fpn"
AUTOCAST = "reference, autocast"  # for the gate of bfloat16; not timed
# Name -> (optimized, type, backend); the peer is another detector.
IMPLEMENTATIONS: dict[str, Any] = {
    "reference": (False, torch.float32, "reference"),
    AUTOCAST: (False, torch.bfloat16, "reference"),
    "native kernels": (False, torch.float32, "native"),
    "optimized, float32": (True, torch.float32, "native"),
    "optimized, bfloat16": (True, torch.bfloat16, "native"),
    PEER: None,
}
Parts = dict[str, Callable[[], Any]]


def main() -> None:
    """Serve one parent until it closes the pipe."""
    name, folder, height, width = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5])
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        parts, stages = _peer(image) if name == PEER else _detector(name, folder, image)
        parts["whole"]()
        print(json.dumps(list(parts)), flush=True)
        for line in sys.stdin:
            print(json.dumps(_answer(line.strip(), parts, stages)), flush=True)


def _answer(message: str, parts: Parts, stages: Callable[[], Any] | None) -> Any:
    if message == "peak":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if message.startswith("gate "):
        if stages is None:
            return False
        outputs = stages()
        torch.save({"logits": outputs.logits, "boxes": outputs.boxes}, message.removeprefix("gate "))
        return True
    start = time.perf_counter()
    parts[message]()
    return time.perf_counter() - start


def _detector(name: str, folder: str, image: torch.Tensor) -> tuple[Parts, Callable[[], Any]]:
    from sparse_rcnn import SparseRCNN, ops

    optimized, dtype, backend = IMPLEMENTATIONS[name]
    # In the memory format that Predictor gives it: in the other, eager is a third slower.
    model = SparseRCNN.from_pretrained(folder).to(memory_format=torch.channels_last)
    if optimized:
        detector = model.optimize(dtype=dtype)
        parts = {"whole": lambda: detector([image]), **_optimized_parts(detector, image)}
        return parts, lambda: detector([image], return_stages=True)

    def run(call: Callable[[], Any]) -> Any:
        with ops.backend(backend), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return call()

    parts = {"whole": lambda: model([image]), **_parts(model, image)}
    parts = {part: lambda call=call: run(call) for part, call in parts.items()}
    return parts, lambda: run(lambda: model([image], return_stages=True))


def _parts(model: Any, image: torch.Tensor) -> Parts:
    """Backbone with FPN and head alone; the maps are made by their first call."""
    made: dict[str, Any] = {}

    def maps() -> list[torch.Tensor]:
        if not made:
            made["batch"], made["sizes"] = model._normalize([image])
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


def _optimized_parts(detector: Any, image: torch.Tensor) -> Parts:
    from sparse_rcnn.models.proposals import to_pixels

    program, made = detector._program, {}
    size = tuple(image.shape[1:])
    sizes, shape = torch.tensor([[*size, *size]]), tuple(-(-side // 32) * 32 for side in size)

    def normalize() -> torch.Tensor:
        return program.normalize([image], sizes, shape)

    def backbone() -> Any:
        made.setdefault("batch", normalize())
        return program.backbone(made["batch"])

    def head() -> Any:
        if "maps" not in made:
            made["maps"] = backbone()
        return program.head(made["maps"], to_pixels(program.proposal_boxes, sizes[:, 2:].float()))

    return {"preprocessing": normalize, "backbone+FPN": backbone, "head": head}


def _peer(image: torch.Tensor) -> tuple[Parts, None]:
    import torchvision

    height, width = image.shape[1:]
    peer = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=min(height, width), max_size=max(height, width)
    ).eval()
    return {"whole": lambda: peer([image / 255.0])}, None


if __name__ == "__main__":
    main()
