"""Norms against their formulas in float64; half precisions against the rounding of the exact result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from definitions import error, l2_norm, layer_norm, rms_norm
from torch import Tensor, nn

from palm_pytorch.layers import L2Norm, LayerNorm, RMSNorm
from palm_pytorch.layers.norm import BiasedLayerNorm, ClampedRMSNorm, make_norm

C = 24


def clamped_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / x.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-8) * weight


FORMULAS = [
    (RMSNorm, rms_norm),
    (LayerNorm, layer_norm),
    (L2Norm, l2_norm),
    (ClampedRMSNorm, clamped_rms_norm),
]
norms = pytest.mark.parametrize(("norm", "formula"), FORMULAS, ids=[n.__name__ for n, _ in FORMULAS])
Norm = type[RMSNorm] | type[LayerNorm] | type[L2Norm] | type[ClampedRMSNorm]
Formula = Callable[[Tensor, Tensor], Tensor]


def with_gain(norm: Norm, dtype: torch.dtype) -> RMSNorm | LayerNorm | L2Norm | ClampedRMSNorm:
    module = norm(C).to(dtype)
    nn.init.normal_(module.weight, mean=1.0)
    return module


@norms
@pytest.mark.parametrize("shape", [(C,), (5, C), (2, 3, 1, C)], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_formula_and_gradients(norm: Norm, formula: Formula, shape: tuple[int, ...], size: float) -> None:
    module = with_gain(norm, torch.float64)
    x = (torch.randn(shape, dtype=torch.float64) * size).requires_grad_()
    leaves = [x, module.weight]
    grad = torch.randn(shape, dtype=torch.float64)
    found, wanted = module(x), formula(x, module.weight)
    assert error(found, wanted) <= 1e-12
    for a, b in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
    ):
        assert error(a * size, b * size) <= 1e-10


@norms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_once(norm: Norm, formula: Formula, dtype: torch.dtype) -> None:
    """Squares of 1,000 leave float16's range, and a mean of bfloat16 squares has 8 bits."""
    module = with_gain(norm, dtype)
    x = (torch.randn(500, C) * 1000 + 300).to(dtype).requires_grad_()
    grad = torch.randn(500, C).to(dtype)
    found = module(x)
    wide, weight = x.detach().double().requires_grad_(), module.weight.detach().double().requires_grad_()
    exact = formula(wide, weight)
    ulp = torch.finfo(dtype).eps
    with torch.no_grad():  # as generation has it, which takes another way
        without = module(x)
    for each in (found, without):
        assert each.dtype == dtype
        assert ((each.double() - exact).abs() <= ulp * exact.abs() + ulp * 1e-2).all()
    found_grads = torch.autograd.grad(found, [x, module.weight], grad)
    exact_grads = torch.autograd.grad(exact, [wide, weight], grad.double())
    assert error(found_grads[0] * 1000, exact_grads[0] * 1000) <= ulp
    assert error(found_grads[1], exact_grads[1]) <= ulp


@norms
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_second_derivatives(norm: Norm, formula: Formula, size: float) -> None:
    """At 1e-3 the epsilon of RMSNorm is as large as the mean square beside it."""
    module = norm(C).double()
    x, gain, grad, *along = (torch.randn(3, C, dtype=torch.float64) for _ in range(5))
    leaves = [(x * size).requires_grad_(), gain[0].clone().requires_grad_()]

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    def second(function: Formula) -> tuple[Tensor, ...]:
        dx, dw = torch.autograd.grad(function(*leaves), leaves, grad, create_graph=True)
        return torch.autograd.grad([dx * size, dw], leaves, [along[0], along[1][0]])

    for found, wanted in zip(second(normed), second(formula), strict=True):
        assert error(found * size, wanted * size) <= 1e-10


@norms
@pytest.mark.parametrize("gain", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("error")
def test_the_result_keeps_the_dtype_of_its_input(
    norm: Norm, formula: Formula, dtype: torch.dtype, gain: torch.dtype
) -> None:
    module = with_gain(norm, gain)
    x = torch.randn(5, C, dtype=dtype)
    found = module(x)
    assert found.dtype == dtype
    assert error(found, formula(x.double(), module.weight.double())) <= 2 * torch.finfo(dtype).eps + 1e-6


@norms
def test_zeros_stay_zeros(norm: Norm, formula: Formula) -> None:
    x = torch.zeros(2, C, requires_grad=True)
    found = norm(C)(x)
    assert (found == 0).all()
    found.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@norms
def test_one_gain_and_no_bias(norm: Norm, formula: Formula) -> None:
    module = norm(C)
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == {"weight": (C,)}
    first = C**0.5 if norm is L2Norm else 1.0
    assert (module.weight == first).all()
    nn.init.zeros_(module.weight)
    module.reset_parameters()
    assert (module.weight == first).all()


@pytest.mark.parametrize("d", [16, 64, 80])
@torch.no_grad()
def test_scores_of_normed_queries_and_keys_tell_keys_apart_at_first(d: int) -> None:
    """With gains of 1 all were within 1 / sqrt(d) of zero: a model that copies did not learn to."""
    q, k = L2Norm(d)(torch.randn(200, d)), L2Norm(d)(torch.randn(300, d))
    assert (q @ k.T * d**-0.5).std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_with_bias(dtype: torch.dtype) -> None:
    module, x = BiasedLayerNorm(C).to(dtype), (torch.randn(50, C) * 1000 + 300).to(dtype)
    assert (module.weight == 1).all() and (module.bias == 0).all()
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=1.0)
    exact = layer_norm(x.double(), module.weight.double()) + module.bias.double()
    assert module(x).dtype == dtype
    assert error(module(x), exact) <= torch.finfo(dtype).eps + 1e-12


def test_a_row_next_to_zero_is_not_blown_up() -> None:
    x = torch.full((1, C), 1e-12, dtype=torch.float64)
    assert error(ClampedRMSNorm(C).double()(x), x * 1e8) <= 1e-12


def test_norm_by_name() -> None:
    assert type(make_norm("rmsnorm", 3)) is RMSNorm
    assert type(make_norm("layernorm", 3)) is LayerNorm
    assert type(make_norm("layernorm-biased", 3)) is BiasedLayerNorm
    assert type(make_norm("rmsnorm-clamped", 3)) is ClampedRMSNorm
    with pytest.raises(ValueError, match=r"norm: .*'batchnorm'"):
        make_norm("batchnorm", 3)
