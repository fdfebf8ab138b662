"""Chunked linear + cross-entropy against `F.cross_entropy` of all logits, in float64.

Shapes: t positions; c model width; v number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definitions import error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from palm_pytorch.ops import cross_entropy, linear_cross_entropy

T, C, V = 23, 12, 37


def inputs(t: int = T, v: int = V, c: int = C, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """hidden (t, c), weight (v, c), bias (v,)."""
    shapes = (t, c), (v, c), (v,)
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def labels_with(ignore_index: int, t: int = T, v: int = V) -> Tensor:
    labels = torch.randint(v, (t,))
    labels[::3] = ignore_index
    return labels


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Tensor:
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index)
    return loss + z_loss * torch.logsumexp(logits, dim=-1)[labels != ignore_index].square().mean()


def value_and_gradients(
    loss: Callable[..., Tensor], tensors: list[Tensor], factor: float = 1.0
) -> list[Tensor]:
    value = loss()
    return [value.detach(), *torch.autograd.grad(value * factor, tensors)]


@pytest.mark.parametrize("chunk_tokens", [None, 1, 7, T, 1000])
@pytest.mark.parametrize("ignore_index", [-100, 0, 5])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradients(
    chunk_tokens: int | None, ignore_index: int, z_loss: float, with_bias: bool
) -> None:
    hidden, weight, bias = inputs()
    b = bias if with_bias else None
    labels = labels_with(ignore_index)
    options: dict[str, Any] = {"ignore_index": ignore_index, "z_loss": z_loss}
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    found = value_and_gradients(
        lambda: linear_cross_entropy(hidden, weight, labels, bias=b, chunk_tokens=chunk_tokens, **options),
        leaves,
        factor=-2.5,
    )
    wanted = value_and_gradients(lambda: plain(hidden, weight, b, labels, **options), leaves, factor=-2.5)
    assert all(error(a, b) <= 1e-12 for a, b in zip(found, wanted, strict=True))


def test_on_paper() -> None:
    """Logits (0, ln 3): shares 1/4 and 3/4."""
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [1.0986122886681098]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((1.3862943611198906 + 0.2876820724517809) / 2)
    with_z = linear_cross_entropy(hidden, weight, torch.tensor([0, -100]), z_loss=0.5)
    assert with_z.item() == pytest.approx(1.3862943611198906 + 0.5 * 1.3862943611198906**2)


def test_labels_keep_the_leading_shape_of_hidden() -> None:
    hidden, weight, _ = inputs(24)
    labels = torch.randint(V, (24,))
    flat = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(linear_cross_entropy(hidden.view(2, 3, 4, C), weight, labels.view(2, 3, 4)), flat)
    strided = hidden.view(4, 6, C).transpose(0, 1)
    assert error(linear_cross_entropy(strided, weight, labels.view(4, 6).T), flat) < 1e-14


@pytest.mark.parametrize("wants", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_by_itself(wants: tuple[bool, ...]) -> None:
    tensors = inputs()
    for tensor, wants_gradient in zip(tensors, wants, strict=True):
        tensor.requires_grad_(wants_gradient)
    hidden, weight, bias = tensors
    labels = labels_with(-100)
    leaf = [t for t in tensors if t.requires_grad]
    found = value_and_gradients(
        lambda: linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_tokens=5), leaf
    )
    wanted = value_and_gradients(lambda: plain(hidden, weight, bias, labels), leaf)
    assert all(error(a, b) <= 1e-12 for a, b in zip(found, wanted, strict=True))


def test_tied_weight_sums_its_two_gradients() -> None:
    """The embedding that made `hidden` is the weight as well."""
    _, weight, _ = inputs()
    labels = labels_with(-100)
    found = value_and_gradients(lambda: linear_cross_entropy(weight[:T] * 2, weight, labels), [weight])
    wanted = value_and_gradients(lambda: plain(weight[:T] * 2, weight, None, labels), [weight])
    assert all(error(a, b) <= 1e-12 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_nothing_to_predict_is_a_loss_of_zero(z_loss: float) -> None:
    hidden, weight, bias = inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full((T,), -100), bias=bias, z_loss=z_loss)
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, [hidden, weight, bias]))


def test_backward_twice_over_one_graph() -> None:
    hidden, weight, _ = inputs()
    loss = linear_cross_entropy(hidden, weight, labels_with(-100))
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    again = torch.autograd.grad(loss * 3, [hidden, weight])
    assert all(error(b, 3 * a) <= 1e-12 for a, b in zip(first, again, strict=True))


def test_second_derivatives_are_refused() -> None:
    """Also where the gradient that comes in is a constant, and nothing else would tell."""
    hidden, weight, _ = inputs()
    loss = linear_cross_entropy(hidden, weight, labels_with(-100))
    with pytest.raises(RuntimeError, match="linear_cross_entropy: has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_what_does_not_count_may_be_no_number() -> None:
    hidden, weight, _ = inputs()
    labels = labels_with(-100)
    wanted = linear_cross_entropy(hidden, weight, labels)
    hidden = hidden.detach().masked_fill((labels == -100)[:, None], float("nan"))
    assert torch.equal(linear_cross_entropy(hidden, weight, labels), wanted)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, _ = inputs(dtype=torch.float32)
    labels = labels_with(-100)
    loss = linear_cross_entropy(hidden * 1e4, weight, labels)
    assert error(loss, plain(hidden.double() * 1e4, weight.double(), None, labels)) <= 1e-5
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [hidden, weight]))


# Precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errs_no_more_than_the_plain_computation_in_the_same_dtype(dtype: torch.dtype) -> None:
    hidden, weight, _ = inputs(300, 500, dtype=dtype)
    labels = labels_with(-100, 300, 500)
    leaves = [hidden, weight]
    found = value_and_gradients(lambda: linear_cross_entropy(hidden, weight, labels, chunk_tokens=64), leaves)
    same = value_and_gradients(lambda: F.cross_entropy((hidden @ weight.T).float(), labels), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = value_and_gradients(lambda: plain(wide[0], wide[1], None, labels), wide)
    assert found[0].dtype == torch.float32
    for f, s, x, name in zip(found, same, exact, ("loss", "dhidden", "dweight"), strict=True):
        assert error(f, x) <= 2 * error(s, x) + 1e-6, name


def test_loss_scaling_keeps_float16_gradients_from_vanishing() -> None:
    """Many positions and tokens make gradients too small for float16; a loss scale is what lifts them."""
    t, v, factor = 2048, 4096, 2.0**16
    hidden, weight, _ = inputs(t, v)
    with torch.no_grad():
        weight *= 0.1
    labels = torch.randint(v, (t,))
    exact = value_and_gradients(lambda: plain(hidden, weight, None, labels), [hidden, weight])
    h, w = (x.detach().half().requires_grad_() for x in (hidden, weight))
    found = value_and_gradients(lambda: linear_cross_entropy(h, w, labels), [h, w], factor)
    for f, x, name in zip(found[1:], exact[1:], ("dhidden", "dweight"), strict=True):
        assert error(f.double() / factor * t, x * t) <= 5e-3, name


def test_sums_over_many_positions_stay_within_float16() -> None:
    """A hidden feature of one sign and a frequent label: the sum over positions passes 65,504, its mean does
    not.
    """
    hidden = torch.full((4096, 1), 30.0, dtype=torch.float16)
    weight = torch.zeros(8, 1, dtype=torch.float16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.long)).backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx([-30 * 7 / 8] + [30 / 8] * 7, rel=1e-2)


def test_sums_over_many_chunks_stay_exact_in_bfloat16() -> None:
    """A bfloat16 running sum stops growing after some hundred terms of one size."""
    hidden = torch.ones(600, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(600, dtype=torch.long)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=1)
    assert loss.item() == pytest.approx(0.6931471805599453, rel=1e-4)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx([-0.5, 0.5], rel=1e-2)


@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast(backward_inside: bool) -> None:
    tensors = inputs(dtype=torch.float32)
    hidden, weight, bias = tensors
    labels = labels_with(-100)
    rounded = [t.detach().bfloat16().requires_grad_() for t in tensors]
    wanted = value_and_gradients(
        lambda: linear_cross_entropy(rounded[0], rounded[1], labels, bias=rounded[2]), rounded
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert loss.dtype == torch.float32
    for tensor, g in zip(tensors, wanted[1:], strict=True):
        assert tensor.grad is not None and tensor.grad.dtype == torch.float32
        assert error(tensor.grad, g) <= 2e-2


def test_autocast_to_float16_keeps_sums_in_float32() -> None:
    """They were cast to float16 again, where 65,536 positions of one label end at infinity."""
    hidden = torch.full((1 << 16, 1), 4.0)
    weight = torch.zeros(3, 1, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        linear_cross_entropy(hidden, weight, torch.zeros(1 << 16, dtype=torch.long)).backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx([-8 / 3, 4 / 3, 4 / 3], rel=1e-3)


def test_autocast_leaves_float64_alone() -> None:
    hidden, weight, bias = inputs(dtype=torch.float64)
    labels = labels_with(-100)
    wanted = linear_cross_entropy(hidden, weight, labels, bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, bias=bias), wanted)


def test_backward_inside_autocast_after_a_forward_outside() -> None:
    hidden, weight, _ = inputs(dtype=torch.float32)
    labels = labels_with(-100)
    loss = linear_cross_entropy(hidden, weight, labels)
    wanted = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# What it costs


class Record(TorchDispatchMode):
    """The largest tensor that is made, and how many matrix products."""

    largest = 0
    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func._schema.name in ("aten::mm", "aten::addmm", "aten::matmul", "aten::bmm")
        for tensor in result if isinstance(result, tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_logits_are_never_held_all_at_once() -> None:
    t, v, c, chunk = 512, 1024, 8, 16
    hidden, weight, _ = inputs(t, v, c)
    with Record() as record:
        linear_cross_entropy(hidden, weight, torch.randint(v, (t,)), chunk_tokens=chunk).backward()
    assert record.largest <= chunk * v
    assert record.products == 3 * t // chunk


def test_chunks_shrink_as_the_vocabulary_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 1 << 12)
    hidden, weight, _ = inputs(300, 1 << 9)
    with Record() as record:
        linear_cross_entropy(hidden, weight, labels_with(-100, 300, 1 << 9)).backward()
    assert record.largest <= 1 << 13


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_no_gradients(context: Callable[[], Any]) -> None:
    """Validation: one product a chunk, no gradient of the whole weight."""
    hidden, weight, _ = inputs()
    with context(), Record() as record:
        linear_cross_entropy(hidden, weight, labels_with(-100), chunk_tokens=T)
    assert record.products == 1


@settings(max_examples=40, deadline=None)
@given(
    t=st.integers(1, 30),
    v=st.integers(1, 30),
    c=st.integers(1, 10),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_any_shape(t: int, v: int, c: int, chunk: int, seed: int) -> None:
    torch.manual_seed(seed)
    hidden, weight, bias = inputs(t, v, c)
    labels = torch.randint(v, (t,))
    found = value_and_gradients(
        lambda: linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_tokens=chunk, z_loss=0.1),
        [hidden, weight, bias],
    )
    wanted = value_and_gradients(
        lambda: plain(hidden, weight, bias, labels, z_loss=0.1), [hidden, weight, bias]
    )
    assert all(error(a, b) <= 1e-11 for a, b in zip(found, wanted, strict=True))


# Bad input


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"hidden": torch.randn(T, C + 1)}, ValueError, r"hidden.*\(23, 13\)"),
        ({"hidden": torch.randn(C)}, ValueError, r"hidden.*\(12,\)"),
        ({"hidden": None}, TypeError, "hidden"),
        ({"hidden": torch.ones(T, C, dtype=torch.long)}, TypeError, "hidden.*int64"),
        ({"weight": torch.randn(V)}, ValueError, r"weight.*\(37,\)"),
        ({"weight": torch.randn(V, C, device="meta")}, ValueError, "weight.*meta"),
        ({"bias": torch.randn(V - 1)}, ValueError, r"bias: .*\(36,\)"),
        ({"bias": torch.randn(V, device="meta")}, ValueError, "bias: .*meta"),
        ({"labels": torch.zeros(T - 1, dtype=torch.long)}, ValueError, r"labels: .*\(22,\)"),
        ({"labels": torch.zeros(T)}, TypeError, "labels: .*float32"),
        ({"labels": [0] * T}, TypeError, "labels: "),
        ({"labels": torch.zeros(T, dtype=torch.long, device="meta")}, ValueError, "labels: .*meta"),
        ({"labels": torch.full((T,), V)}, ValueError, r"labels: .*\[0, 37\).*37"),
        ({"labels": torch.full((T,), -1)}, ValueError, r"labels: .*-1"),
        ({"labels": torch.full((T,), -100), "ignore_index": 0}, ValueError, r"labels: .*-100"),
        ({"z_loss": -1e-4}, ValueError, "z_loss: .*-0.0001"),
        ({"z_loss": float("nan")}, ValueError, "z_loss: .*nan"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens: .*0"),
        ({"chunk_tokens": 2.5}, (TypeError, ValueError), r"chunk_tokens: .*2\.5"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], kind: type[Exception], said: str) -> None:
    right: dict[str, Any] = {
        "hidden": torch.randn(T, C),
        "weight": torch.randn(V, C),
        "labels": torch.zeros(T, dtype=torch.long),
    }
    with pytest.raises(kind, match=said):
        linear_cross_entropy(**{**right, **changes})


def test_int32_labels_are_integers_too() -> None:
    hidden, weight, _ = inputs()
    labels = labels_with(-100)
    assert torch.equal(
        linear_cross_entropy(hidden, weight, labels.int()), linear_cross_entropy(hidden, weight, labels)
    )
