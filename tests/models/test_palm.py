"""PaLM against its definition in float64, with the model's own weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from definitions import (
    ANYWHERE,
    NORMS,
    error,
    heads_of,
    joined,
    l2_norm,
    plain_attention,
    silu,
    turned,
    xpos_zeta,
)
from torch import Tensor, nn

from palm_pytorch import PaLM

V, DIM, DEPTH, HEADS, D, INNER = 37, 24, 2, 3, 16, 48


def model(**options: Any) -> PaLM:
    """Small, in float64, every gain away from one."""
    net = PaLM(num_tokens=V, dim=DIM, depth=DEPTH, heads=HEADS, dim_head=D, ff_mult=2, **options).double()
    for weight in net.parameters():
        nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.3)
    return net


def definition(w: Mapping[str, Tensor], tokens: Tensor, config: dict[str, Any]) -> Tensor:
    norm, at = NORMS[config["norm"]], torch.arange(tokens.shape[1])
    x = w["token_emb.weight"][tokens]
    for layer in range(DEPTH):
        p = f"layers.{layer}."
        fused = norm(x, w[p + "norm.weight"]) @ w[p + "fused_proj.weight"].T
        q, k, v, value, gate = fused.split([HEADS * D, D, D, INNER, INNER], dim=-1)
        q, k, v = (heads_of(t, D) for t in (q, k, v))
        if config["qk_norm"]:
            q, k = l2_norm(q, w[p + "q_norm.weight"]), l2_norm(k, w[p + "k_norm.weight"])
        q, k = turned(q, at, D), turned(k, at, D)
        if config["xpos"]:
            power = at[:, None] / config["xpos_scale_base"]
            q, k = q * xpos_zeta(D) ** power, k * xpos_zeta(D) ** -power
        attended = joined(plain_attention(q, k, v)) @ w[p + "attn_out.weight"].T
        x = x + attended + (silu(gate) * value) @ w[p + "ff_out.weight"].T
    head = w["token_emb.weight"] if config["tie_embeddings"] else w["to_logits.weight"]
    return norm(x, w["norm.weight"]) @ head.T


@pytest.mark.parametrize("backend", [*ANYWHERE, "auto"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "layernorm"},
        {"qk_norm": True},
        {"xpos": True},
        {"xpos": True, "xpos_scale_base": 16, "qk_norm": True, "norm": "layernorm"},
        {"tie_embeddings": False},
    ],
    ids=str,
)
def test_logits_and_gradients(options: dict[str, Any], backend: str) -> None:
    net = model(attention_backend=backend, **options)
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
        net = PaLM(num_tokens=20000, dim=512, depth=12, heads=8, dim_head=64)
    assert sum(p.numel() for p in net.parameters()) == 55_073_280


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dim_head": 7}, "dim_head: .*7"),
        ({"dim_head": 1}, "dim_head: .*1"),
        ({"xpos": True, "xpos_scale_base": 0}, "xpos_scale_base: .*0"),
        ({"xpos": True, "xpos_scale_base": -512}, "xpos_scale_base: .*-512"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PaLM(**{"num_tokens": V, "dim": DIM, "depth": 1, **arguments})
