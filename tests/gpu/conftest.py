from __future__ import annotations

import pytest
import torch


@pytest.fixture
def exact_float32(monkeypatch):
    """No TF32, whose rounding is that of a half type."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
