"""Gated feed-forward layers against their formulas with literal halves."""

from __future__ import annotations

import pytest
import torch
from definitions import error, gelu, silu
from torch import nn

from palm_pytorch.layers import GEGLU, FeedForward, SwiGLU

GATES = [(SwiGLU, silu), (GEGLU, gelu)]
gates = pytest.mark.parametrize(("activation", "gate"), GATES, ids=["swiglu", "geglu"])


@pytest.mark.parametrize(
    ("activation", "expected"),
    # silu(2) = 2 / (1 + e^-2);  gelu(2) = 2 Phi(2)
    [(SwiGLU, 1.7615941559557649), (GEGLU, 1.9544997361036416)],
)
def test_first_half_is_the_value_and_second_the_gate(activation: type[nn.Module], expected: float) -> None:
    x = torch.tensor([[3.0, -5.0, 2.0, 2.0]], dtype=torch.float64)
    assert activation()(x).tolist() == [pytest.approx([3 * expected, -5 * expected])]


@gates
def test_activation_and_gradient(activation: type[nn.Module], gate: object) -> None:
    x = torch.randn(2, 5, 14, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 5, 7, dtype=torch.float64)
    found, wanted = activation()(x), x[..., :7] * gate(x[..., 7:])  # type: ignore[operator]
    assert error(found, wanted) <= 1e-14
    assert error(torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(wanted, x, grad)[0]) <= 1e-14
    torch.autograd.gradcheck(activation(), x)


@gates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(activation: type[nn.Module], gate: object, dtype: torch.dtype) -> None:
    x = (torch.randn(100, 64) * 3).to(dtype)
    found, wide = activation()(x), x.double()
    assert found.dtype == dtype
    assert error(found, wide[:, :32] * gate(wide[:, 32:])) <= torch.finfo(dtype).eps  # type: ignore[operator]


@gates
def test_slices_of_a_fused_projection(activation: type[nn.Module], gate: object) -> None:
    x = torch.randn(2, 5, 30, dtype=torch.float64)[..., 8:22]
    before = x.clone()
    assert error(activation()(x), x[..., :7] * gate(x[..., 7:])) <= 1e-14  # type: ignore[operator]
    assert torch.equal(x, before)


@gates
@pytest.mark.parametrize("width", [1, 3, 7])
def test_odd_widths_are_refused(activation: type[nn.Module], gate: object, width: int) -> None:
    with pytest.raises(ValueError, match=f"{width}"):
        activation()(torch.randn(2, width))


@gates
def test_feed_forward(activation: type[nn.Module], gate: object) -> None:
    module = FeedForward(6, 3, activation).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    shapes = [tuple(w.shape) for w in module.parameters()]
    assert shapes == [(36, 6), (6, 18)]
    inner, outer = module.parameters()
    projected = x @ inner.T
    assert error(module(x), (projected[..., :18] * gate(projected[..., 18:])) @ outer.T) <= 1e-13  # type: ignore[operator]


def test_without_a_gate_and_with_biases() -> None:
    module = FeedForward(6, 3, nn.GELU, bias=True).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    inner, inner_bias, outer, outer_bias = module.parameters()
    assert [tuple(w.shape) for w in module.parameters()] == [(18, 6), (18,), (6, 18), (6,)]
    assert error(module(x), gelu(x @ inner.T + inner_bias) @ outer.T + outer_bias) <= 1e-13


def test_dropout_is_for_training() -> None:
    module, x = FeedForward(6, dropout=0.5), torch.randn(3, 6)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
