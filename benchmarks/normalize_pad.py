"""normalize_pad: photographs of two sizes to the input of the network, one and four of them."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, main, native
from sparse_rcnn.data.transforms import network_size, resize
from sparse_rcnn.ops import normalize_pad, normalize_pad_reference

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def step_by_step(
    images: Sequence[Tensor],
    sizes: Tensor,
    shape: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """The resize of ``sparse_rcnn.data`` on the CPU (Pillow), then what a model does with its images."""
    device = images[0].device
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
    batch = torch.zeros(len(images), 3, *shape, device=device)
    for slot, image, (_, _, height, width) in zip(batch, images, sizes.tolist(), strict=True):
        resized = resize(image.cpu(), (height, width)).to(device, torch.float32)
        slot[:, :height, :width] = (resized - mean) / std
    return batch.to(dtype).contiguous(memory_format=torch.channels_last)


def torchvision_steps(
    images: Sequence[Tensor],
    sizes: Tensor,
    shape: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """What torchvision's detectors would run on the device, with its 8-bit antialiased resize."""
    from torchvision.transforms.v2 import functional as transforms

    padded = []
    for image, (_, _, height, width) in zip(images, sizes.tolist(), strict=True):
        image = transforms.resize(image, [height, width], antialias=True)
        image = transforms.normalize(image.float(), list(mean), list(std))
        padded.append(F.pad(image, (0, shape[1] - width, 0, shape[0] - height)))
    return torch.stack(padded).to(dtype, memory_format=torch.channels_last)


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Images as a decoder leaves them, rows of interleaved pixels; ``dtype`` is that of the result."""
    for height, width in ((480, 640), (1080, 1920)):
        new_height, new_width = network_size(height, width, 800, 1333)
        shape = (-(-new_height // 32) * 32, -(-new_width // 32) * 32)
        for count in (1, 4):

            def inputs(
                generator: torch.Generator,
                count: int = count,
                size: tuple[int, ...] = (height, width, new_height, new_width),
                shape: tuple[int, int] = shape,
            ) -> dict[str, Any]:
                pixels = torch.randint(0, 256, (count, *size[:2], 3), generator=generator, dtype=torch.uint8)
                images = list(pixels.to(device).permute(0, 3, 1, 2).unbind())
                sizes = torch.tensor([size] * count, device=device)
                return {"images": images, "sizes": sizes, "shape": shape, "mean": MEAN, "std": STD, "dtype": dtype}

            yield Case(
                name=f"{count} of {width}x{height} to {new_width}x{new_height}",
                inputs=inputs,
                reference=normalize_pad_reference,
                implementations={
                    "native": native(normalize_pad),
                    "Pillow": step_by_step,
                    "torchvision": torchvision_steps,
                },
                bytes={"forward": 3 * count * (height * width + shape[0] * shape[1] * dtype.itemsize)},
                ungated={"torchvision": "coarser weights: some pixels differ by one grey level"},
                headline=count == 1,
            )


if __name__ == "__main__":
    sys.exit(main("normalize_pad", cases))
