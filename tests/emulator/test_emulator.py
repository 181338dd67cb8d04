"""What a launch does: order, statistics, limits."""

import pytest
import torch


@pytest.fixture
def ops(emulator):
    emulator.set_seed(0)
    emulator.set_poison(0xFF)
    return torch.ops.sparse_rcnn_emulated


def test_a_seed_repeats_the_order(emulator, ops):
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))  # sums that depend on the order

    def total(seed: int) -> torch.Tensor:
        emulator.set_seed(seed)
        out = torch.zeros(4)
        ops.probe_red(x, True, out)
        return out

    assert torch.equal(total(1), total(1))
    assert len({tuple(total(seed).tolist()) for seed in range(10)}) > 1
    torch.testing.assert_close(total(1), x.sum(0), rtol=1e-4, atol=1e-4)


def test_statistics(emulator, ops):
    emulator.reset_statistics()
    ops.probe_pipeline(torch.zeros(3, 4, 256), 3)
    assert emulator.statistics() == {
        "launches": 1,
        "blocks": 3,
        "threads": 3 * 64,
        "barriers": 3 * 4 * 2,
        "warp_operations": 0,
        "mma": 0,
        "ldmatrix": 0,
        "ldmatrix_conflicts": 0,
        "cp_async_bytes": 3 * 3 * 1024,
        "shared_bytes": 2048,
    }
    emulator.reset_statistics()
    assert set(emulator.statistics().values()) == {0}


def test_warp_operations_and_static_arrays_are_counted(emulator, ops):
    emulator.reset_statistics()
    ops.probe_reduce(torch.zeros(2, 64))
    statistics = emulator.statistics()
    # Of each warp: 3 + 5 + (5 + 5) + 5 shuffles for the reductions, one of its own, two votes.
    assert statistics["warp_operations"] == 4 * (3 + 5 + 10 + 5 + 1 + 2)
    assert statistics["barriers"] == 2 * 2
    assert statistics["shared_bytes"] == 32 * 4


def test_an_empty_grid_runs_nothing(emulator, ops):
    emulator.reset_statistics()
    assert ops.planted("copy_waited_for", True, torch.zeros(0, 128)).shape == (0, 128)
    assert emulator.statistics()["launches"] == 0


@pytest.mark.parametrize("threads", [0, 48, 1056])
def test_blocks_of_whole_warps_only(ops, threads):
    with pytest.raises(RuntimeError, match=f"a block of {threads} threads: expected a multiple of 32, at most 1024"):
        ops.planted_barriers(threads, 1, torch.zeros(1))


def test_no_more_shared_memory_than_every_architecture_has(ops):
    row = torch.zeros(32, dtype=torch.int32)
    most = torch.zeros(99 * 1024 // 2, dtype=torch.int16)
    assert not ops.probe_ldmatrix(most, row, 4, False).any()
    with pytest.raises(RuntimeError, match="101384 bytes of dynamic shared memory: at most 101376"):
        ops.probe_ldmatrix(torch.zeros(99 * 1024 // 2 + 4, dtype=torch.int16), row, 4, False)


def test_the_largest_block(emulator, ops):
    emulator.reset_statistics()
    out = torch.zeros(5)
    ops.planted_barriers(1024, 7, out)
    assert out.tolist() == [7.0] * 5
    assert emulator.statistics()["barriers"] == 5 * 7
