"""Attention of one query, as generation asks for it: heads shared out over cores, and room behind the keys.

Shapes: h query heads; g key/value heads; j keys.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_problems import needs_interpreter
from definitions import error
from torch import Tensor

from palm_pytorch.ops import AlibiBias, RelativeBias, attention
from palm_pytorch.ops.attention.bias import Bias

# The package gives the function that name.
blockwise = import_module("palm_pytorch.ops.attention.blockwise")


def random_bias(kind: str, h: int) -> tuple[Bias | None, Bias | None]:
    """A bias, and the same in float64."""
    if kind == "alibi":
        slopes = torch.rand(h) * 0.1
        return AlibiBias(slopes), AlibiBias(slopes.double())
    if kind == "t5":
        table = torch.randn(32, h)
        return RelativeBias(table, 128, 4.0), RelativeBias(table.double(), 128, 4.0)
    return None, None


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return attention(q.double(), k.double(), v.double(), backend="reference", **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "alibi", "t5"])
@pytest.mark.parametrize(
    ("b", "g", "j", "threads", "shares"),
    [
        (1, 1, 64, 2, 2),
        (1, 1, 97, 5, 3),
        (3, 1, 131, 12, 3),
        (2, 3, 100, 99, 3),
        (9, 1, 17, 2, 1),
        (1, 1, 1, 64, 6),
    ],
)
@torch.no_grad()
def test_heads_are_shared_out_over_cores(
    b: int,
    g: int,
    j: int,
    threads: int,
    shares: int,
    kind: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many there are for a row; keys that are masked; a query that may see nothing."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    made: list[int] = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(
        blockwise.F,
        "scaled_dot_product_attention",
        lambda q, *args, **options: made.append(q.shape[1]) or kernel(q, *args, **options),
    )
    q, k, v = (torch.randn(b, heads, n, 24).to(dtype) for heads, n in ((6, 1), (g, j), (g, j)))
    bias, wide_bias = random_bias(kind, 6)
    masks = (torch.arange(j) >= j - 3, torch.arange(j) < 2, torch.rand(j) < 0.3, torch.zeros(j).bool())
    for mask in (None, *(mask.expand(b, -1) for mask in masks)):
        wanted = exact(q, k, v, bias=wide_bias, key_mask=mask)
        found = attention(q, k, v, bias=bias, key_mask=mask)
        plain = attention(q, k, v, bias=bias, key_mask=mask, backend="reference")
        allowed = 2 * error(plain, wanted) if dtype == torch.bfloat16 else 2e-6
        assert error(found, wanted) <= allowed
    assert made == [shares] * 5


@pytest.mark.parametrize(
    "backend", ["auto", "reference", "sdpa", "blockwise", pytest.param("triton", marks=needs_interpreter)]
)
@pytest.mark.parametrize("kind", ["alibi", "t5"])
@pytest.mark.parametrize("at", [0, 5, 140, 199])
def test_a_bias_is_measured_from_where_the_query_is(kind: str, at: int, backend: str) -> None:
    assert error(*measured_from(at, kind, backend, torch.float32, "cpu")) <= 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "blockwise", "triton"])
@pytest.mark.parametrize("kind", ["alibi", "t5"])
@pytest.mark.parametrize("at", [0, 5, 140, 199])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_so_it_is_on_a_gpu(dtype: torch.dtype, allowed: float, at: int, kind: str, backend: str) -> None:
    """Whose kernels took the numbers of a float32 bias for bfloat16 ones."""
    assert error(*measured_from(at, kind, backend, dtype, "cuda")) <= allowed


@torch.no_grad()
def measured_from(at: int, kind: str, backend: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """What is found and what is wanted of 200 keys, of which those behind `at` are not there yet."""
    q, k, v = (torch.randn(2, heads, n, 24).to(dtype) for heads, n in ((6, 1), (3, 200), (3, 200)))
    bias, wide_bias = random_bias(kind, 6)
    wanted = exact(q, k[:, :, : at + 1], v[:, :, : at + 1], bias=wide_bias)
    there = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in vars(bias).items()}
    bias = type(bias)(**{**there, "at": torch.tensor([at], device=device)})
    mask = (torch.arange(200, device=device) <= at).expand(2, -1)
    q, k, v = (t.to(device) for t in (q, k, v))
    return [attention(q, k, v, bias=bias, key_mask=mask, backend=backend).cpu(), wanted]


@pytest.mark.parametrize("more", [{}, {"dropout_p": 0.5}, {"grad": True}], ids=str)
def test_what_measures_from_elsewhere_is_always_served(more: dict[str, Any]) -> None:
    """By "sdpa", where the default of the device cannot."""
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 9, 16)
    mask, wanted = torch.arange(9)[None] <= 5, AlibiBias(torch.ones(2))
    bias, p = AlibiBias(torch.ones(2), at=torch.tensor([5])), more.get("dropout_p", 0.0)
    with torch.set_grad_enabled("grad" in more):
        found = torch.stack([attention(q, k, k, bias=bias, key_mask=mask, dropout_p=p) for _ in range(2000)])
    expected = exact(q, k[:, :, :6], k[:, :, :6], bias=wanted)
    assert error(found.mean(0), expected) <= (0.1 if p else 1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_what_measures_from_elsewhere_is_for_one_query(backend: str) -> None:
    """Of several, or with documents, backends differed, and some showed keys ahead."""
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 9, 16)
    bias = AlibiBias(torch.ones(2), at=torch.tensor([5]))
    with pytest.raises(ValueError, match=r"bias: `at` .* got 3 of them"):
        attention(q, k, k, bias=bias, backend=backend)
    with pytest.raises(ValueError, match=r"bias: `at` .* got document_ids"):
        attention(q[:, :, :1], k, k, bias=bias, document_ids=torch.zeros(1, 9).long(), backend=backend)


@pytest.mark.parametrize("backend", ["flex", pytest.param("triton", marks=needs_interpreter), "blockwise"])
def test_backends_that_measure_from_the_end_refuse(backend: str) -> None:
    """Blockwise does so where gradients are wanted."""
    q = torch.randn(1, 2, 1, 16)
    bias = AlibiBias(torch.ones(2), at=torch.tensor([0]))
    with pytest.raises(ValueError, match=f"{backend}.*bias.*at"):
        attention(q, q, q, bias=bias, backend=backend)
