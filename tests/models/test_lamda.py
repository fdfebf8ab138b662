"""LaMDA against its definition in float64, with the model's own weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from definitions import ANYWHERE, NORMS, error, gelu, heads_of, joined, plain_attention, t5_bias
from torch import Tensor, nn

from palm_pytorch import LaMDA

V, DIM, DEPTH, HEADS, D, INNER = 37, 24, 2, 6, 16, 48


def model(**options: Any) -> LaMDA:
    """Small, in float64, every gain away from one, tables large."""
    net = LaMDA(num_tokens=V, dim=DIM, depth=DEPTH, heads=HEADS, dim_head=D, ff_mult=2, **options).double()
    for name, weight in net.named_parameters():
        nn.init.normal_(weight, mean=float(weight.dim() == 1), std=1.0 if "table" in name else 0.3)
    return net


def definition(w: Mapping[str, Tensor], tokens: Tensor, config: dict[str, Any]) -> Tensor:
    norm, n = NORMS[config["norm"]], tokens.shape[1]
    width = config["kv_heads"] * D
    x = w["token_emb.weight"][tokens]
    for layer in range(DEPTH):
        p = f"layers.{layer}."
        y = norm(x, w[p + "attn_norm.weight"])
        kv = y @ w[p + "attn.to_kv.weight"].T
        q, k, v = (
            heads_of(t, D) for t in (y @ w[p + "attn.to_q.weight"].T, kv[..., :width], kv[..., width:])
        )
        bias = t5_bias(w[p + "relative_bias.table"], config["max_distance"], D**0.5, n, n)
        x = x + joined(plain_attention(q, k, v, bias=bias)) @ w[p + "attn.to_out.weight"].T
        inner = norm(x, w[p + "ff_norm.weight"]) @ w[p + "ff.0.weight"].T
        x = x + (gelu(inner[..., INNER:]) * inner[..., :INNER]) @ w[p + "ff.3.weight"].T
    head = w["token_emb.weight"] if config["tie_embeddings"] else w["to_logits.weight"]
    return norm(x, w["norm.weight"]) @ head.T


@pytest.mark.parametrize("backend", [*ANYWHERE, "auto"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 2, "norm": "layernorm"},
        {"kv_heads": 6, "tie_embeddings": False},
        {"num_buckets": 8, "max_distance": 20},
    ],
    ids=str,
)
def test_logits_and_gradients(options: dict[str, Any], backend: str) -> None:
    """At 150 positions distances reach T5's last bucket."""
    net = model(attention_backend=backend, **options)
    weights, tokens = dict(net.named_parameters()), torch.randint(V, (2, 150))
    found, wanted = net(tokens), definition(weights, tokens, net.config)
    assert found.shape == (2, 150, V)
    assert error(found, wanted) <= 1e-10
    grad = torch.randn_like(found)
    gradients = (torch.autograd.grad(out, list(weights.values()), grad) for out in (found, wanted))
    for name, a, b in zip(weights, *gradients, strict=True):
        assert error(a, b) <= 1e-10, name


def test_every_layer_has_a_table_of_its_own() -> None:
    net = model()
    tables = [t for name, t in net.named_parameters() if name.endswith("table")]
    assert [tuple(t.shape) for t in tables] == [(32, HEADS)] * DEPTH
    assert tables[0] is not tables[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kv_heads": 4}, "kv_heads: .*heads=6.*4"),
        ({"kv_heads": 0}, "kv_heads: .*0"),
        ({"num_buckets": 7}, "num_buckets: .*7"),
        ({"num_buckets": 0}, "num_buckets: .*0"),
        ({"max_distance": 16}, "max_distance: .*16"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LaMDA(**{"num_tokens": V, "dim": DIM, "depth": 1, "heads": HEADS, **arguments})
