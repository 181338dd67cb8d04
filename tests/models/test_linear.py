import pytest
import torch

from sparse_rcnn import onednn, ops
from sparse_rcnn.models.linear import Linear

SHAPES = [(2, 30, 24), (7, 24), (24,), (0, 24)]


@pytest.fixture(autouse=True)
def plain_calls(monkeypatch):
    """How often ``F.linear`` was called."""
    calls = []
    plain = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: calls.append(1) or plain(*args))
    return calls


def differentiate(layer, x, weights):
    """A linear layer's output, and the gradients of its weighted sum."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])]


@pytest.mark.skipif(not onednn.has_onednn(torch.float32), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients(shape, bias, plain_calls):
    torch.manual_seed(3)
    layer = Linear(24, 40, bias=bias)
    x, weights = torch.randn(shape[::-1]).permute(*range(len(shape))[::-1]), torch.randn(*shape[:-1], 40)  # x is a view
    found = differentiate(layer, x, weights)
    assert bool(plain_calls) == (x.numel() == 0)
    expected = differentiate(layer.double(), x.double(), weights.double())
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not onednn.has_onednn(torch.float32), reason="this PyTorch has no oneDNN")
def test_what_wants_no_gradient_gets_none():
    x, layer = torch.randn(3, 8), Linear(8, 4)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is None
    assert layer.bias.grad.tolist() == [3.0] * 4
    assert not layer.requires_grad_(False)(x).requires_grad


def test_the_rest_is_pytorchs_own(plain_calls):
    x, layer = torch.randn(3, 8), Linear(8, 4)
    expected = torch.nn.Linear.forward(layer, x)
    with ops.backend("reference"):
        assert torch.equal(layer(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    assert len(plain_calls) == 4
