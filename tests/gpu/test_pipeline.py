"""The pipeline on a GPU: uploads beside the computation, two batches under way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_rcnn.inference.upload import Uploads
from sparse_rcnn.runtime import Predictor
from tests.inference.test_optimized import assert_equal_detections, make_images, make_model

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present"),
    pytest.mark.usefixtures("exact_float32"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_uploads_wait_for_those_who_read():
    """Readers that come late, behind a long computation, still see their own images."""
    uploads, rng, seen = Uploads(CUDA), np.random.default_rng(0), []
    for number in range(40):
        sizes = [(50 + number, 300)] * (1 + number % 5)
        images = [torch.from_numpy(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).permute(2, 0, 1) for size in sizes]
        with uploads([*images, images[0].to(CUDA)]) as there:
            torch.cuda._sleep(2_000_000)
            seen.append(([image.clone() for image in there], [*images, images[0]]))
    for copies, images in seen:
        assert all(torch.equal(copy.cpu(), image) for copy, image in zip(copies, images, strict=True))


@torch.inference_mode()
def test_batches_under_way_do_not_disturb_each_other():
    model = make_model()
    optimized, plain = model.optimize(CUDA, torch.float32, batch_size=4), model.optimize(CPU)
    batches = [
        [image.roll(index, -1) for image in make_images(*sizes)]
        for index, sizes in enumerate([[(40, 60)] * 4, [(40, 60)] * 3, [(64, 128)], [(40, 60)] * 4] * 3)
    ]
    sizes = [[tuple(image.shape[1:]) for image in images] for images in batches]
    submitted = [optimized.submit(images, size) for images, size in zip(batches, sizes, strict=True)]
    for one, images in zip(submitted, batches, strict=True):
        assert_equal_detections(one.results(), plain(images), atol=0.02)
        assert one.seconds > 0


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 0), (4, 2)])
def test_files_give_the_detectors_own_results(tmp_path, batch_size, workers):
    rng, model = np.random.default_rng(0), make_model(min_size=64, max_size=96)
    for number in range(40):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize([(60, 40), (40, 60), (64, 64)][number % 3], Image.Resampling.BICUBIC).save(
            tmp_path / f"{number:02d}.png"
        )
    files = sorted(tmp_path.iterdir())
    expected = Predictor(make_model(min_size=64, max_size=96), device="cpu", optimize=False).predict(files)
    predictor = Predictor(model, CUDA, "float32", batch_size, workers)
    for found, want in zip(predictor.predict(files), expected, strict=True):
        assert found.source == want.source and len(found) == len(want) > 0
        np.testing.assert_allclose(found.boxes, want.boxes, rtol=1e-4, atol=0.02)
        np.testing.assert_allclose(found.scores, want.scores, rtol=1e-3)
    assert predictor.timings.forward > 0


def test_out_of_memory_halves_the_batch_and_loses_nothing():
    model, images = make_model(), make_images(*[(64, 96)] * 6)
    optimized = model.optimize(CUDA, torch.float32, batch_size=6)
    capture = optimized._buckets.capture

    def limited(run, inputs):
        if len(inputs.images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return capture(run, inputs)

    optimized._buckets.capture = limited
    with pytest.warns(UserWarning, match="going on with"), torch.inference_mode():
        found = optimized(images)
        expected = model.optimize(CPU)(images)
    on_cpu = [{name: values.cpu() for name, values in result.items()} for result in found]
    assert_equal_detections(on_cpu, expected, atol=0.02)
