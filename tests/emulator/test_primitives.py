"""The functions of csrc/common/cuda.cuh on the CPU, against numpy: layouts as the PTX ISA writes them down."""

import numpy as np
import pytest
import torch

ROWS_OF_D, COLUMNS = 16, 8
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32}


@pytest.fixture
def ops(emulator):
    emulator.set_seed(0)
    emulator.set_poison(0xFF)
    return torch.ops.sparse_rcnn_emulated


def registers(matrix: torch.Tensor, places: list) -> torch.Tensor:
    """[32, registers] int32: register r of lane l holds the elements ``places[r](l)`` of ``matrix``, low bits first."""
    lanes = [[torch.stack([matrix[at] for at in place(lane)]) for place in places] for lane in range(32)]
    return torch.stack([torch.cat(lane).view(torch.int32) for lane in lanes])


def pair(row: int, column: int, along_rows: bool = False) -> list:
    """Two neighbours, in one row or in one column."""
    return [(row, column), (row + 1, column) if along_rows else (row, column + 1)]


# mma.m16n8k16 and mma.m16n8k8 (tf32): "Matrix Fragments" of the PTX ISA, with groupID = lane / 4, thread = lane % 4.
A_PLACES_16BIT = [
    lambda lane: pair(lane // 4, lane % 4 * 2),
    lambda lane: pair(lane // 4 + 8, lane % 4 * 2),
    lambda lane: pair(lane // 4, lane % 4 * 2 + 8),
    lambda lane: pair(lane // 4 + 8, lane % 4 * 2 + 8),
]
B_PLACES_16BIT = [
    lambda lane: pair(lane % 4 * 2, lane // 4, along_rows=True),
    lambda lane: pair(lane % 4 * 2 + 8, lane // 4, along_rows=True),
]
A_PLACES_TF32 = [
    lambda lane: [(lane // 4, lane % 4)],
    lambda lane: [(lane // 4 + 8, lane % 4)],
    lambda lane: [(lane // 4, lane % 4 + 4)],
    lambda lane: [(lane // 4 + 8, lane % 4 + 4)],
]
B_PLACES_TF32 = [lambda lane: [(lane % 4, lane // 4)], lambda lane: [(lane % 4 + 4, lane // 4)]]


def d_place(lane: int, register: int) -> tuple[int, int]:
    return lane // 4 + register // 2 * 8, lane % 4 * 2 + register % 2


def mma(ops, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, type_name: str) -> torch.Tensor:
    """a @ b + d through one instruction of one warp."""
    tf32 = type_name == "tf32"
    own_d = torch.tensor([[d[d_place(lane, r)] for r in range(4)] for lane in range(32)], dtype=torch.float32)
    got = ops.probe_mma(
        registers(a, A_PLACES_TF32 if tf32 else A_PLACES_16BIT),
        registers(b, B_PLACES_TF32 if tf32 else B_PLACES_16BIT),
        own_d,
        type_name,
    )
    out = torch.full((ROWS_OF_D, COLUMNS), torch.nan)
    for lane in range(32):
        for r in range(4):
            out[d_place(lane, r)] = got[lane, r]
    return out


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("seed", range(5))
def test_mma_of_integers_is_exact(ops, type_name, seed):
    generator = torch.Generator().manual_seed(seed)
    depth = 8 if type_name == "tf32" else 16
    a, b, d = (
        torch.randint(-64, 65, shape, generator=generator).float()
        for shape in ((ROWS_OF_D, depth), (depth, COLUMNS), (ROWS_OF_D, COLUMNS))
    )
    got = mma(ops, a.to(TYPES[type_name]), b.to(TYPES[type_name]), d, type_name)
    np.testing.assert_array_equal(got.numpy(), a.numpy() @ b.numpy() + d.numpy())


@pytest.mark.parametrize("type_name", TYPES)
def test_mma_places_every_element(ops, type_name):
    """One product at a time: row i of A meets column j of B in the depth k and nowhere else."""
    depth = 8 if type_name == "tf32" else 16
    for k in range(depth):
        a = torch.zeros(ROWS_OF_D, depth)
        b = torch.zeros(depth, COLUMNS)
        a[:, k] = torch.arange(1, ROWS_OF_D + 1)
        b[k] = torch.arange(1, COLUMNS + 1) * 16
        got = mma(ops, a.to(TYPES[type_name]), b.to(TYPES[type_name]), torch.zeros(ROWS_OF_D, COLUMNS), type_name)
        np.testing.assert_array_equal(got.numpy(), np.outer(np.arange(1, 17), np.arange(1, 9) * 16))


@pytest.mark.parametrize("type_name", TYPES)
def test_mma_accumulates_in_float32(ops, type_name):
    generator = torch.Generator().manual_seed(0)
    depth = 8 if type_name == "tf32" else 16
    a, b, d = (
        torch.randn(shape, generator=generator)
        for shape in ((ROWS_OF_D, depth), (depth, COLUMNS), (ROWS_OF_D, COLUMNS))
    )
    if type_name == "tf32":
        a, b = (ops.probe_convert(x.flatten(), "tf32").view(torch.float32).view_as(x) for x in (a, b))
    else:
        a, b = a.to(TYPES[type_name]), b.to(TYPES[type_name])
    wanted = a.double().numpy() @ b.double().numpy() + d.double().numpy()
    np.testing.assert_allclose(mma(ops, a, b, d, type_name).numpy(), wanted, rtol=2e-6, atol=2e-6)


def test_mma_reads_only_the_bits_of_tf32(ops):
    a = torch.full((ROWS_OF_D, 8), 1 + 2**-10 + 2**-12)  # the last bit is beyond tf32's mantissa
    got = mma(ops, a, torch.ones(8, COLUMNS), torch.zeros(ROWS_OF_D, COLUMNS), "tf32")
    np.testing.assert_array_equal(got.numpy(), np.full((ROWS_OF_D, COLUMNS), 8 * (1 + 2**-10)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix(ops, matrices, transposed):
    rng = np.random.default_rng(matrices)
    memory = torch.from_numpy(rng.integers(-(2**15), 2**15, 1024, dtype=np.int16))
    row = torch.from_numpy(8 * rng.permutation(128)[:32].astype(np.int32))  # any rows of 16 bytes
    got = ops.probe_ldmatrix(memory, row, matrices, transposed).numpy().view(np.int16).reshape(32, matrices, 2)
    for matrix in range(matrices):
        tile = np.stack([memory.numpy()[row[matrix * 8 + i] :][:8] for i in range(8)])
        if transposed:
            tile = tile.T
        np.testing.assert_array_equal(got[:, matrix], tile.reshape(32, 2))  # lane l: row l / 4, columns 2 (l % 4)..


@pytest.mark.parametrize(("stride", "passes"), [(8, 1), (16, 2), (32, 4), (64, 8), (72, 1)])
def test_ldmatrix_conflicts_are_counted(emulator, ops, stride, passes):
    row = torch.arange(32, dtype=torch.int32) % 8 * stride
    emulator.reset_statistics()
    ops.probe_ldmatrix(torch.zeros(8 * stride, dtype=torch.int16), row, 4, False)
    assert emulator.statistics()["ldmatrix"] == 4
    assert emulator.statistics()["ldmatrix_conflicts"] == 4 * (passes - 1)


def test_ldmatrix_of_an_address_outside_shared_memory_is_reported(ops):
    row = torch.zeros(32, dtype=torch.int32)
    row[3] = 1024
    with pytest.raises(RuntimeError, match="ldmatrix: the address is not in shared memory"):
        ops.probe_ldmatrix(torch.zeros(1024, dtype=torch.int16), row, 4, False)


def test_to_tf32_rounds_to_nearest_away(ops):
    tie = 2.0**-11
    x = np.array([1 + tie, 1 + tie - 2**-23, 1 + 3 * tie, -1 - tie, 0.0, -0.0, np.inf, -np.inf, 1e-45, 3.4028235e38])
    wanted = np.array([1 + 2 * tie, 1, 1 + 4 * tie, -1 - 2 * tie, 0.0, -0.0, np.inf, -np.inf, 0.0, np.inf])
    got = ops.probe_convert(torch.from_numpy(x.astype(np.float32)), "tf32").view(torch.float32).numpy()
    np.testing.assert_array_equal(got.view(np.int32), wanted.astype(np.float32).view(np.int32))
    assert np.isnan(ops.probe_convert(torch.tensor([torch.nan]), "tf32").view(torch.float32).item())
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    exponent = torch.frexp(noise).exponent.double()
    wanted = (noise.double() * 2 ** (11 - exponent)).numpy()  # 11 bits of mantissa, the leading one included
    wanted = np.trunc(wanted + np.copysign(0.5, wanted)) * 2 ** (exponent.numpy() - 11)
    np.testing.assert_array_equal(ops.probe_convert(noise, "tf32").view(torch.float32).double().numpy(), wanted)


@pytest.mark.parametrize("type_name", ["bfloat16", "float16"])
def test_pack2_is_two_roundings_low_half_first(ops, type_name):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 100
    wanted = torch.stack([x, x.roll(-1)], dim=1).to(TYPES[type_name])
    got = ops.probe_convert(x, type_name).view(TYPES[type_name]).view(-1, 2)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [32, 96, 256, 1024])
def test_reductions(ops, dtype, threads):
    # Multiples of 2^-8 below 2^8: every order of summation gives the same.
    x = torch.randint(-(2**15), 2**15, (3, threads), generator=torch.Generator().manual_seed(threads)).to(dtype) / 2**8
    x[1] = x[1].abs() + 1  # where all() holds
    x[2] = -x[1]  # and where any() does not
    warps = x.view(3, -1, 32)
    got = ops.probe_reduce(x)

    def to_all(value: torch.Tensor, times: int) -> torch.Tensor:
        return value.repeat_interleave(times, dim=1)

    torch.testing.assert_close(got[0], to_all(x.view(3, -1, 8).sum(-1), 8), rtol=0, atol=0)
    torch.testing.assert_close(got[1], to_all(warps.sum(-1), 32), rtol=0, atol=0)
    torch.testing.assert_close(got[2], to_all(x.sum(1, keepdim=True), threads), rtol=0, atol=0)
    torch.testing.assert_close(got[3], to_all(warps.amax(-1), 32), rtol=0, atol=0)
    torch.testing.assert_close(got[4], to_all(warps[..., 5], 32), rtol=0, atol=0)
    votes = 2 * (warps > 0).all(-1).to(dtype) + (warps > 0).any(-1).to(dtype)
    torch.testing.assert_close(got[5], to_all(votes, 32), rtol=0, atol=0)


@pytest.mark.parametrize("width", [2, 4, 8, 16, 64])
def test_vectors(ops, width):
    x = torch.arange(320, dtype=torch.int32).to(torch.uint8)
    start = -x.data_ptr() % 16
    aligned = x[start : start + 256 + 16]
    torch.testing.assert_close(ops.probe_vectors(aligned, width, 0), aligned[:256], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=f"not a multiple of {min(width, 16)}"):
        ops.probe_vectors(aligned, width, 1)


@pytest.mark.parametrize("by_four", [False, True])
def test_reductions_in_global_memory_add(ops, by_four):
    x = torch.randint(-100, 100, (1000, 4), generator=torch.Generator().manual_seed(0)).float()
    total = torch.arange(4.0)
    ops.probe_red(x, by_four, total)
    torch.testing.assert_close(total, x.sum(0) + torch.arange(4.0), rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_asynchronous_copies_arrive_and_fill_with_zeros(emulator, ops, seed):
    emulator.set_seed(seed)
    x = torch.randint(-100, 100, (7, 5, 256), generator=torch.Generator().manual_seed(seed)).float()
    for valid in (0, 3, 5):
        torch.testing.assert_close(ops.probe_pipeline(x, valid), x[:, :valid].sum(1), rtol=0, atol=0)
