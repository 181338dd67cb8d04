"""The count of boxes that divides the losses, over two real processes."""

from __future__ import annotations

import socket

import pytest
import torch
from torch import distributed, multiprocessing

from sparse_rcnn.losses import HungarianMatcher, PackedTargets, SetCriterion
from tests.host_reads import forbid_host_reads

COUNTS = ((3, 1), (0, 2))  # of the two images of each of the two processes


def make_arguments(rank):
    generator = torch.Generator().manual_seed(rank)

    def boxes(*shape):
        corners = torch.rand(*shape, 2, generator=generator) * 60
        return torch.cat([corners, corners + 5 + torch.rand(*shape, 2, generator=generator) * 40], dim=-1)

    counts = COUNTS[rank]
    targets = PackedTargets(torch.zeros(2, max(counts)).long(), boxes(2, max(counts)), torch.tensor(counts))
    return torch.randn(2, 2, 5, 1, generator=generator), boxes(2, 2, 5), targets, torch.full((2, 2), 100.0)


def losses_of(rank):
    return SetCriterion(HungarianMatcher(), 1)(*make_arguments(rank))


def work(rank, port, folder):
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    try:
        arguments = make_arguments(rank)
        with forbid_host_reads():
            losses = SetCriterion(HungarianMatcher(), 1)(*arguments)
        torch.save(losses, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="PyTorch is built without torch.distributed")
def test_two_processes_divide_by_the_mean_of_their_counts(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=2)
    for rank, counts in enumerate(COUNTS):
        together, alone = torch.load(tmp_path / f"{rank}.pt"), losses_of(rank)
        assert together.keys() == alone.keys() and len(alone) == 6
        for name, value in alone.items():  # alone they divide by 4 and by 2, together both by 3
            assert together[name].item() == pytest.approx(value.item() * sum(counts) / 3, rel=1e-6), (rank, name)
