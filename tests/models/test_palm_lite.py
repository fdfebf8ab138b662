"""PaLM-lite against its definition in float64, with the model's own weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from definitions import (
    ALIBI_SLOPES,
    ANYWHERE,
    NORMS,
    alibi_bias,
    error,
    heads_of,
    joined,
    l2_norm,
    plain_attention,
    silu,
)
from torch import Tensor, nn

from palm_pytorch import PaLMLite

V, DIM, DEPTH, D, INNER = 37, 24, 2, 16, 48


def model(heads: int, **options: Any) -> PaLMLite:
    """Small, in float64, every gain away from one."""
    net = PaLMLite(num_tokens=V, dim=DIM, depth=DEPTH, heads=heads, dim_head=D, ff_mult=2, **options).double()
    for weight in net.parameters():
        nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.3)
    return net


def definition(w: Mapping[str, Tensor], tokens: Tensor, config: dict[str, Any]) -> Tensor:
    norm, n = NORMS[config["norm"]], tokens.shape[1]
    bias = alibi_bias(torch.tensor(ALIBI_SLOPES[config["heads"]], dtype=torch.float64), n, n)
    x = w["token_emb.weight"][tokens]
    for layer in range(DEPTH):
        p = f"layers.{layer}."
        fused = norm(x, w[p + "norm.weight"]) @ w[p + "fused_proj.weight"].T
        q, kv, value, gate = fused.split([config["heads"] * D, D, INNER, INNER], dim=-1)
        q, k, v = heads_of(q, D), heads_of(kv, D), heads_of(kv, D)
        if config["qk_norm"]:
            q, k = l2_norm(q, w[p + "q_norm.weight"]), l2_norm(k, w[p + "k_norm.weight"])
        attended = joined(plain_attention(q, k, v, bias=bias)) @ w[p + "attn_out.weight"].T
        x = x + attended + (silu(gate) * value) @ w[p + "ff_out.weight"].T
    head = w["token_emb.weight"] if config["tie_embeddings"] else w["to_logits.weight"]
    return norm(x, w["norm.weight"]) @ head.T


@pytest.mark.parametrize("backend", [*ANYWHERE, "auto"])
@pytest.mark.parametrize("heads", [1, 3, 6, 8])
@pytest.mark.parametrize(
    "options", [{}, {"norm": "layernorm", "qk_norm": True, "tie_embeddings": False}], ids=str
)
def test_logits_and_gradients(options: dict[str, Any], heads: int, backend: str) -> None:
    net = model(heads, attention_backend=backend, **options)
    weights, tokens = dict(net.named_parameters()), torch.randint(V, (2, 45))
    found, wanted = net(tokens), definition(weights, tokens, net.config)
    assert found.shape == (2, 45, V)
    assert error(found, wanted) <= 1e-6
    grad = torch.randn_like(found)
    gradients = (torch.autograd.grad(out, list(weights.values()), grad) for out in (found, wanted))
    for name, a, b in zip(weights, *gradients, strict=True):
        assert error(a, b) <= 1e-6, name


def test_parameter_count() -> None:
    with torch.device("meta"):
        net = PaLMLite(num_tokens=20000, dim=512, depth=12, heads=8, dim_head=64)
    assert sum(p.numel() for p in net.parameters()) == 54_680_064
