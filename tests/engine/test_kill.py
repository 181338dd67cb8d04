"""kill -9 at random moments: there is always a checkpoint to go on from, and going on ends where no kill would have."""

from __future__ import annotations

import os

import pytest
import torch

from tests.engine import killed
from tests.engine.conftest import TINY
from tests.engine.test_resume import assert_same_models, assert_same_runs

# Linux, where the suite runs, has it; Windows has no SIGKILL either.
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


def test_a_hundred_kills_while_saving_leave_whole_checkpoints(tiny_config):
    config = tiny_config(backbone="lcnet_035", set={**TINY, "num_stages": 1}, steps=1)  # few tensors, small files
    torch.multiprocessing.spawn(killed.kill_savers, (config, 100), nprocs=1)


def test_training_that_is_killed_ends_where_it_would_have(scenes, tmp_path):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    arguments = ["--data", str(scenes), "--val", str(scenes), "--backbone", "lcnet_035", "--backbone-weights", "none"]
    arguments += ["--steps", "16", "--checkpoint-every", "1", "--keep-every", "4", "--eval-every", "3"]
    arguments += ["--lr", "1e-3", "--log-every", "1", "--device", "cpu"]
    arguments += ["--set", *(f"{name}={value}" for name, value in TINY.items())]
    torch.multiprocessing.spawn(killed.kill_training, (arguments, whole, parts, 4), nprocs=1)
    assert_same_runs(whole, parts)
    for name in ("model", "best", "step_00000008.pt"):
        assert_same_models(f"{whole}/{name}", f"{parts}/{name}")
