"""Many images through one pipeline: order, batches, bounds, interruptions; and the same results whatever the way."""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_rcnn import runtime
from sparse_rcnn.data.decode import ImageError
from sparse_rcnn.inference import upload
from sparse_rcnn.inference.memory import run_in_batches
from sparse_rcnn.inference.pipeline import Pipeline
from sparse_rcnn.inference.upload import Uploads
from sparse_rcnn.runtime import Predictor
from tests.inference.test_buckets import StandIn

CPU = torch.device("cpu")


@dataclass
class Thing:
    number: int
    shape: tuple[int, int] = (32, 32)
    error: Exception | None = None


class Device:
    """Computes ten times the number, whenever it is waited for, and keeps account."""

    def __init__(self, fail_at=None):
        self.batches, self.underway, self.most, self.fail_at = [], 0, 0, fail_at

    def submit(self, batch):
        if len(self.batches) == self.fail_at:
            raise KeyboardInterrupt
        assert len({thing.shape for thing in batch}) == 1
        self.batches.append([thing.number for thing in batch])
        self.underway += 1
        self.most = max(self.most, self.underway)

        def wait():
            self.underway -= 1
            return [10 * thing.number for thing in batch]

        return wait


def raise_it(thing):
    raise thing.error


def test_any_mixture_comes_out_in_order_and_within_bounds():
    rng = random.Random(0)
    for _ in range(300):
        batch_size, window, depth = rng.randint(1, 5), rng.randint(1, 12), rng.randint(1, 3)
        shapes = [(32 * side, 32) for side in range(1, rng.randint(2, 5))]
        things = [
            Thing(number, rng.choice(shapes), ValueError() if rng.random() < 0.1 else None)
            for number in range(rng.randint(0, 40))
        ]
        device, failed, taken = Device(), [], 0

        def count(things=things):
            nonlocal taken
            for thing in things:
                taken += 1
                yield thing

        pipeline = Pipeline(device.submit, failed.append, batch_size, window, depth)
        results, bound = [], max(window, depth * batch_size)
        for result in pipeline.run(count()):
            results.append(result)
            assert taken - len(results) - len(failed) <= bound
        assert results == [10 * thing.number for thing in things if thing.error is None]
        assert failed == [thing for thing in things if thing.error is not None]
        assert sorted(sum(device.batches, [])) == [result // 10 for result in results]
        assert all(len(batch) <= batch_size for batch in device.batches)
        assert device.most <= depth and device.underway == 0


def test_batches_are_filled_across_other_shapes():
    device = Device()
    things = [Thing(number, (32, 32) if number % 2 else (32, 64)) for number in range(12)]
    assert list(Pipeline(device.submit, raise_it, 3, 12).run(things)) == [10 * n for n in range(12)]
    assert device.batches == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]


def test_one_by_one_nothing_is_asked_for_too_early():
    taken = []
    stream = Pipeline(Device().submit, raise_it, 1, 4).run(taken.append(n) or Thing(n) for n in range(9))
    assert [next(stream), next(stream)] == [0, 10] and taken == [0, 1]


@pytest.mark.parametrize("thrown", [False, True])
def test_an_interruption_gives_out_what_is_done(thrown):
    """The second and third, in one batch, are done before the first, which waits for others of its shape."""
    things = [Thing(0, (64, 64)), Thing(1), Thing(2), Thing(3), Thing(4), Thing(5, (64, 64))]
    if thrown:  # while the consumer is at work on the first
        stream = Pipeline(Device().submit, raise_it, 2, 8).run([*things, Thing(6, (96, 96))])
        assert next(stream) == 0
        results = [stream.throw(KeyboardInterrupt())]
        expected = [10, 20, 30, 40, 50]
    else:
        stream = Pipeline(Device(fail_at=2).submit, raise_it, 2, 8).run(things)
        results, expected = [], [10, 20, 30, 40]
    with pytest.raises(KeyboardInterrupt):
        for result in stream:
            results.append(result)
    assert results == expected


def test_an_error_is_raised_in_its_turn():
    stream = Pipeline(Device().submit, raise_it, 1, 8).run([Thing(0), Thing(1, error=ImageError("x")), Thing(2)])
    assert next(stream) == 0
    with pytest.raises(ImageError, match="x"):
        next(stream)


def test_halving():
    counts, said = [], []

    def run(items):
        counts.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [item + 1 for item in items]

    with pytest.warns(UserWarning) as told:
        assert run_in_batches(run, range(11), 8, said.append) == list(range(1, 12))
    assert counts == [8, 4, 2, 2, 2, 2, 2, 1] and said == [4, 2]
    assert str(told[0].message) == "out of memory with 8 images at a time: going on with 4"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[...] DefaultCPUAllocator: can't allocate memory")])
def test_a_single_item_that_does_not_fit_is_an_error(error):
    def run(items):
        raise error

    with pytest.warns(UserWarning, match="going on with 1"), pytest.raises(type(error)):
        run_in_batches(run, [1, 2], 2, lambda most: None)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def run(items):
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        run_in_batches(run, [1, 2], 2, lambda most: None)


def test_uploads_by_turns():
    """What a GPU's streams do one beside the other, here one after the other."""
    uploads, rng = Uploads(CPU), np.random.default_rng(0)
    earlier = None
    for sizes in ([(3, 5), (40, 7)], [(9, 9)], [(100, 90), (1, 1), (2, 300)], [(4, 4)]):
        images = [torch.from_numpy(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).permute(2, 0, 1) for size in sizes]
        with uploads(images) as there:
            assert all(torch.equal(got, image) for got, image in zip(there, images, strict=True))
            starts = {image.data_ptr() for image in there}
            assert len(starts) == len(images) and not any((start - min(starts)) % upload._ALIGNMENT for start in starts)
            if earlier is not None:  # the batch before is still there: the GPU may be reading it
                assert all(torch.equal(got, image) for got, image in zip(*earlier, strict=True))
        earlier = (there, images)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Forty small pictures of four sizes, two of which are padded alike, one of which is none."""
    folder, rng, paths = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0), []
    for number in range(40):
        height, width = ((40, 60), (60, 40), (64, 64), (44, 62))[number % 7 % 4]
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        paths.append(folder / f"{number:02d}.png")
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1])
    paths[11].write_bytes(b"no image")
    return paths


def detect(predictor, paths, **options):
    failed = []
    found = list(predictor.stream(paths, on_error=lambda source, error: failed.append(source), **options))
    assert failed == [paths[11]]
    return found


@pytest.fixture(scope="module")
def expected(tiny_weights, photographs):
    """By the detector itself, each image alone."""
    return detect(Predictor(tiny_weights, device="cpu", optimize=False), photographs)


def assert_same(found, expected):
    assert [one.source for one in found] == [one.source for one in expected]
    for got, want in zip(found, expected, strict=True):
        assert len(got) == len(want) > 0 and got.image_size == want.image_size
        np.testing.assert_allclose(got.boxes, want.boxes, rtol=1e-4, atol=5e-3)
        np.testing.assert_allclose(got.scores, want.scores, rtol=1e-4)
        np.testing.assert_array_equal(got.labels, want.labels)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (1, 2), (4, 0), (7, 2)])
def test_results_do_not_depend_on_the_way(tiny_weights, photographs, expected, batch_size, workers):
    predictor = Predictor(tiny_weights, device="cpu", batch_size=batch_size, workers=workers)
    assert_same(detect(predictor, photographs), expected)
    assert predictor.timings.readers == (workers or min(batch_size, torch.get_num_threads()))
    assert predictor.timings.images == 39
    assert min(predictor.throughput()) > 0


def test_nor_on_buckets_nor_on_two_batches_under_way(tiny_weights, photographs, expected, monkeypatch):
    predictor = Predictor(tiny_weights, device="cpu", batch_size=4)
    predictor.optimized = predictor.model.optimize(batch_size=4, capture=StandIn())
    predictor.optimized._buckets.limit = 3  # of the shapes and remainders some find no room
    pipeline, depths = runtime.Pipeline, []

    def deeper(*arguments, depth, **options):
        depths.append(depth)
        return pipeline(*arguments, depth=2, **options)

    monkeypatch.setattr(runtime, "Pipeline", deeper)
    assert_same(detect(predictor, photographs), expected)
    report = predictor.optimized.report()
    assert len(report["buckets"]) == 3 and report["batches_without_bucket"] > 0
    assert depths == [1]


@pytest.mark.parametrize("optimize", [True, False])
def test_out_of_memory_halves_the_batch_and_loses_nothing(tiny_weights, photographs, expected, optimize):
    predictor = Predictor(tiny_weights, device="cpu", batch_size=8, optimize=optimize)
    owner, name = (predictor.optimized, "_program") if optimize else (predictor.model, "forward")
    real, sizes = getattr(owner, name), []

    def limited(images, *arguments, **options):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return real(images, *arguments, **options)

    setattr(owner, name, limited)
    with pytest.warns(UserWarning, match="going on with") as told:
        assert_same(detect(predictor, photographs), expected)
    assert [str(w.message) for w in told] == [
        "out of memory with 8 images at a time: going on with 4",
        "out of memory with 4 images at a time: going on with 2",
    ]
    assert max(sizes[2:]) == 2


@pytest.mark.parametrize("slow", [True, False])
def test_memory_is_bounded(tiny_weights, photographs, slow):
    """However many files there are and however long the consumer takes."""
    predictor = Predictor(tiny_weights, device="cpu", batch_size=3, workers=2)
    paths, pulled = [path for path in photographs if path != photographs[11]], 0

    def files():
        nonlocal pulled
        while pulled < 150:
            pulled += 1
            yield paths[pulled % len(paths)]

    bound = 4 * 3 + 2 * 3
    for given, _ in enumerate(predictor.stream(files()), start=1):
        assert pulled - given < bound
        if slow and given == 20:
            before = pulled
            torch.randn(400, 400) @ torch.randn(400, 400)  # whatever it does: nothing goes on behind its back
            assert pulled == before
            break
    else:
        assert given == 150


def test_workers_begin_with_the_predictor_and_serve_its_first_stream(tiny_weights, photographs):
    predictor = Predictor(tiny_weights, device="cpu", workers=2)
    workers = [worker.process for worker in predictor._begun]
    assert len(workers) == 2
    files = [path for path in photographs if path.stem != "11"][:32]
    assert len(predictor.predict(files[:9])) == 9  # too few to need them
    assert [worker.process for worker in predictor._begun] == workers
    stream = predictor.stream(files)
    next(stream)
    assert predictor._begun == [] and [worker.poll() for worker in workers] == [None, None]
    assert len(list(stream)) == 31
    assert None not in [worker.poll() for worker in workers]
    assert len(predictor.predict(files)) == 32  # by others


def test_workers_end_with_the_predictor(tiny_weights):
    predictor = Predictor(tiny_weights, device="cpu", workers=1)
    (worker,) = predictor._begun
    del predictor
    gc.collect()
    assert worker.process is None
