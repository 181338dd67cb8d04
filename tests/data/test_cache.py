from __future__ import annotations

import copy
import multiprocessing
import pickle

import numpy as np
import pytest

from sparse_rcnn.data.cache import PixelCache

SIZES = [(4, 5), (3, 3), (10, 10), (1, 2)]  # 60, 27, 300 and 6 bytes


def image(size, value):
    return np.full((*size, 3), value, dtype=np.uint8)


def test_images_come_back_as_they_went_in():
    cache = PixelCache(SIZES, 1000)
    assert [cache.get(index) for index in range(4)] == [None] * 4
    for index, size in enumerate(SIZES):
        cache.put(index, image(size, index + 1))
    for index, size in enumerate(SIZES):
        assert np.array_equal(cache.get(index), image(size, index + 1))
    cache.get(0)[:] = 99
    assert np.array_equal(cache.get(0), image(SIZES[0], 1))  # what get gives is a copy


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (59, 0), (60, 1), (86, 1), (87, 2), (386, 2), (387, 3), (393, 4)])
def test_the_first_images_that_fit_are_kept(limit, kept):
    cache = PixelCache(SIZES, limit)
    for index, size in enumerate(SIZES):
        cache.put(index, image(size, 7))
    assert [cache.get(index) is not None for index in range(4)] == [index < kept for index in range(4)]


def fill(cache):
    cache.put(1, image(SIZES[1], 5))


# Linux, where the suite runs, has it; Windows does not.
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_forked_processes_share_it():
    cache = PixelCache(SIZES, 1000)
    process = multiprocessing.get_context("fork").Process(target=fill, args=(cache,))
    process.start()
    process.join()
    assert process.exitcode == 0 and np.array_equal(cache.get(1), image(SIZES[1], 5))


def test_a_pickled_copy_is_empty_and_keeps_nothing():
    cache = PixelCache(SIZES, 1000)
    fill(cache)
    for other in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        fill(other)
        assert other.get(1) is None and other.limit == 0


def test_impossible_limits_are_named():
    with pytest.raises(ValueError, match="cache_mb: expected at least 0, got -1"):
        PixelCache(SIZES, -(10**6))
    with pytest.raises(ValueError, match="cache_mb: .* MB cannot be had"):
        PixelCache([(2**31, 2**20)], 2**63)
