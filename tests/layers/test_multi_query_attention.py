"""`MultiQueryAttention` against its definition with the module's own weights, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from definitions import ANYWHERE, alibi_bias, error, heads_of, joined, plain_attention, t5_bias
from torch import Tensor

from palm_pytorch.layers import MultiQueryAttention, Rotary, T5RelativeBias, apply_rotary
from palm_pytorch.ops import AlibiBias

DIM, HEADS, D = 20, 6, 8


def module(kv_heads: int = 1, **options: Any) -> MultiQueryAttention:
    return MultiQueryAttention(DIM, heads=HEADS, dim_head=D, kv_heads=kv_heads, **options).double()


def inputs(i: int = 7, prefix: int = 0) -> tuple[Tensor, Tensor | None]:
    x = torch.randn(2, i, DIM, dtype=torch.float64)
    return x, torch.randn(2, prefix, DIM, dtype=torch.float64) if prefix else None


def definition(
    weights: Mapping[str, Tensor], x: Tensor, context: Tensor | None, *, rotary: Any = None, **options: Any
) -> Tensor:
    source = x if context is None else torch.cat([context, x], dim=1)
    width = weights["to_kv.weight"].shape[0] // 2
    q = heads_of(x @ weights["to_q.weight"].T, D)
    k = heads_of(source @ weights["to_kv.weight"][:width].T, D)
    v = heads_of(source @ weights["to_kv.weight"][width:].T, D)
    if rotary is not None:
        q, k = apply_rotary(q, rotary[0].last(x.shape[1])), apply_rotary(k, rotary[1])
    return joined(plain_attention(q, k, v, **options)) @ weights["to_out.weight"].T


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", [*ANYWHERE, "auto"])
def test_definition_and_gradients(kv_heads: int, prefix: int, causal: bool, backend: str) -> None:
    layer = module(kv_heads, causal=causal, attention_backend=backend)
    x, context = inputs(prefix=prefix)
    weights = dict(layer.named_parameters())
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "to_q.weight": (HEADS * D, DIM),
        "to_kv.weight": (2 * kv_heads * D, DIM),
        "to_out.weight": (DIM, HEADS * D),
    }
    found, wanted = layer(x, context), definition(weights, x, context, causal=causal)
    assert error(found, wanted) <= 1e-12
    leaves, grad = list(weights.values()), torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
    ):
        assert error(a, b) <= 1e-12


@pytest.mark.parametrize("prefix", [0, 5])
def test_biases_masks_and_positions(prefix: int) -> None:
    layer = module(2)
    x, context = inputs(prefix=prefix)
    weights, n = dict(layer.named_parameters()), 7 + prefix
    key_mask = torch.rand(2, n) > 0.3
    table = T5RelativeBias(HEADS, 8, 6, scale=2.0).double()
    slopes = torch.rand(HEADS, dtype=torch.float64)
    rotary = Rotary(4, xpos_scale_base=16)(torch.arange(n))
    given = [
        ({"bias": table()}, {"bias": t5_bias(table.table, 6, 2.0, 7, n)}),
        ({"bias": AlibiBias(slopes)}, {"bias": alibi_bias(slopes, 7, n)}),
        ({"key_mask": key_mask}, {"key_mask": key_mask}),
        ({"rotary": rotary, "key_mask": key_mask}, {"rotary": rotary, "key_mask": key_mask}),
    ]
    if not prefix:
        ids = torch.tensor([0, 0, 0, 1, 1, 2, 2]).expand(2, 7)
        given.append(({"document_ids": ids}, {"document_ids": ids}))
    for options, plainly in given:
        assert error(layer(x, context, **options), definition(weights, x, context, **plainly)) <= 1e-12, (
            options
        )


def test_dropout_is_for_training() -> None:
    layer = module(dropout=0.5)
    x, _ = inputs()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert error(layer(x), definition(dict(layer.named_parameters()), x, None)) <= 1e-12


def test_an_earlier_position_does_not_see_a_later_one() -> None:
    layer = module(causal=True)
    x, _ = inputs()
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.equal(layer(x)[:, :4], layer(changed)[:, :4])
    assert not torch.equal(layer(x)[:, 4:], layer(changed)[:, 4:])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kv_heads": 4}, "kv_heads: .*heads=6.*4"),
        ({"kv_heads": 0}, "kv_heads: .*0"),
        ({"kv_heads": 12}, "kv_heads: .*12"),
        ({"heads": 0}, "heads: .*0"),
        ({"dim_head": 0}, "dim_head: .*0"),
        ({"dropout": 1.5}, "dropout: .*1.5"),
        ({"attention_backend": "cudnn"}, "attention_backend: .*'cudnn'"),
    ],
)
def test_bad_arguments_are_refused_when_built(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"(^|\W|_){said}"):
        MultiQueryAttention(DIM, **{"heads": HEADS, "dim_head": D, **arguments})
