"""dynamic_conv against an einsum in float64 with a LayerNorm written out."""

from __future__ import annotations

import pytest
import torch

from sparse_rcnn.ops import dynamic_conv


def make_arguments(R=3, P=4, C=6, D=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(R, P, C), draw(R, 2 * C * D), draw(D), draw(D), draw(C), draw(C)


def normalise(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def expected_conv(roi, parameters, w1, b1, w2, b2, eps=1e-5):
    R, P, C = roi.shape
    D = len(w1)
    out = torch.empty(R, P, C, dtype=roi.dtype)
    for r in range(R):
        first = torch.stack([parameters[r, c * D : (c + 1) * D] for c in range(C)])  # rows of [C, D]
        second = torch.stack([parameters[r, C * D + d * C : C * D + (d + 1) * C] for d in range(D)])  # rows of [D, C]
        hidden = normalise(torch.einsum("pc,cd->pd", roi[r], first), w1, b1, eps).clamp(min=0)
        out[r] = normalise(torch.einsum("pd,dc->pc", hidden, second), w2, b2, eps).clamp(min=0)
    return out


@pytest.mark.parametrize(
    ("R", "P", "C", "D"), [(1, 1, 2, 1), (3, 4, 6, 5), (2, 49, 32, 8), (5, 9, 7, 16), (0, 49, 6, 5), (3, 0, 6, 5)]
)
def test_equals_einsum(R, P, C, D):
    arguments = make_arguments(R, P, C, D)
    torch.testing.assert_close(dynamic_conv(*arguments), expected_conv(*arguments), rtol=1e-10, atol=1e-10)


def test_float32():
    arguments = make_arguments(4, 49, 32, 8)
    actual = dynamic_conv(*(a.float() for a in arguments))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected_conv(*arguments), rtol=1e-4, atol=1e-4)


def test_the_first_parameters_are_the_first_weight_row_by_row():
    C, D = 3, 2
    roi = torch.tensor([[[1.0, 0, 0]]], dtype=torch.float64)  # picks the first row of [C, D]
    parameters = torch.zeros(1, 2 * C * D, dtype=torch.float64)
    parameters[0, 1] = 4.0  # first[0, 1]: the hidden values are (0, 4), normalised to (-1, 1), so ReLU leaves (0, 1)
    parameters[0, C * D + 1 * C + 2] = 5.0  # second[1, 2]: the result is (0, 0, 5) before its LayerNorm
    ones, zeros = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    out = dynamic_conv(roi, parameters, ones[:D], zeros[:D], ones, zeros, 1e-12)
    expected = torch.tensor([0, 0, 2**0.5], dtype=torch.float64)
    torch.testing.assert_close(out[0, 0], expected, rtol=1e-9, atol=1e-9)


def test_eps_is_used_in_both_norms():
    arguments = make_arguments()
    for eps in (1e-5, 0.5):
        torch.testing.assert_close(dynamic_conv(*arguments, eps), expected_conv(*arguments, eps))
    assert not torch.allclose(dynamic_conv(*arguments, 0.5), dynamic_conv(*arguments))


def test_non_contiguous_roi_features():
    roi, *rest = make_arguments()
    transposed = roi.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(dynamic_conv(transposed, *rest), dynamic_conv(roi, *rest))


def test_gradcheck():
    arguments = [a.requires_grad_() for a in make_arguments(2, 3, 4, 3)]
    assert torch.autograd.gradcheck(dynamic_conv, arguments)


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(3, 4), ValueError, r"roi_features: expected shape \[R, P, C\], got \[3, 4\]"),
        (0, [1.0], TypeError, "roi_features: expected a tensor, got list"),
        (0, torch.zeros(3, 4, 6, dtype=torch.int64), TypeError, "roi_features: expected a floating-point tensor"),
        (1, torch.zeros(3, 59), ValueError, r"parameters: expected shape \[3, 60\], got \[3, 59\]"),
        (1, torch.zeros(2, 60), ValueError, r"parameters: expected shape \[3, 60\], got \[2, 60\]"),
        (1, torch.zeros(3, 60, dtype=torch.int32), TypeError, "parameters: expected a floating-point tensor"),
        (1, torch.zeros(3, 60, device="meta"), ValueError, "parameters: expected it on cpu like roi_features"),
        (2, torch.zeros(5, 1), ValueError, r"norm1_weight: expected shape \[D\], got \[5, 1\]"),
        (3, torch.zeros(4), ValueError, r"norm1_bias: expected shape \[5\], got \[4\]"),
        (4, torch.zeros(5), ValueError, r"norm2_weight: expected shape \[6\], got \[5\]"),
        (5, torch.zeros(7), ValueError, r"norm2_bias: expected shape \[6\], got \[7\]"),
    ],
)
def test_argument_errors(index, value, error, message):
    arguments = list(make_arguments(dtype=torch.float32))
    arguments[index] = value
    with pytest.raises(error, match=message):
        dynamic_conv(*arguments)
