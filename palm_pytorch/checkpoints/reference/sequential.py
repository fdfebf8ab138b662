"""The older projects' LaMDA and Perceiver AR: LaMDA-pytorch and perceiver-ar-pytorch.

Both have attention and feed-forward one after the other, and layer norms with bias.

Shapes: h heads; d head dim; c model width; f inner width of the feed-forward; v num_tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from palm_pytorch.checkpoints.reference.layout import (
    Layout,
    Line,
    Tensors,
    check_buffer,
    matrix,
    needed,
    ratio,
)
from palm_pytorch.models import LaMDA, PerceiverAR

# ------------------------------------------------------------------------------------------ LaMDA-pytorch


def lamda_config(weights: Tensors, buffers: Tensors, given: Mapping[str, Any]) -> dict[str, Any]:
    """Heads and their width are read off the tensors: that code's `heads` is the width, its `dim_head` the
    number.
    """
    (v, c), (_, f) = matrix(weights, "token_emb.weight"), matrix(weights, "layers.0.ff.3.weight")
    buckets, h = matrix(weights, "layers.0.relative_bias.table")
    return {
        "num_tokens": v,
        "dim": c,
        "depth": sum(name.endswith("relative_bias.table") for name in weights),
        "heads": h,
        "dim_head": ratio(
            "dim_head", matrix(weights, "layers.0.attn.to_kv.weight")[0], 2, "a key and a value"
        ),
        "kv_heads": 1,
        "ff_mult": ratio("ff_mult", f, c, "the feed-forward's inner width"),
        "num_buckets": buckets,
        "max_distance": 128,  # a constant of that code
        "norm": "layernorm-biased",
        "bias": True,
        "tie_embeddings": False,
    }


T5_TABLE = "rel_pos_bias.relative_attention_bias.weight"

LAMDA = Layout(
    project="LaMDA-pytorch",
    mark=r"transformer\.layers\.\d+\.[01]\.fn\..*",
    model=LaMDA,
    weights=(
        Line("token_emb.weight", "token_emb.weight"),
        Line("layers.{i}.attn_norm.weight", "transformer.layers.{i}.0.fn.norm.weight"),
        Line("layers.{i}.attn_norm.bias", "transformer.layers.{i}.0.fn.norm.bias"),
        Line("layers.{i}.attn.to_q.weight", "transformer.layers.{i}.0.fn.fn.to_q.weight"),
        Line("layers.{i}.attn.to_kv.weight", "transformer.layers.{i}.0.fn.fn.to_kv.weight"),
        Line("layers.{i}.attn.to_out.weight", "transformer.layers.{i}.0.fn.fn.to_out.weight"),
        Line("layers.{i}.attn.to_out.bias", "transformer.layers.{i}.0.fn.fn.to_out.bias"),
        Line("layers.{i}.relative_bias.table", "transformer.layers.{i}.0.fn.fn." + T5_TABLE),
        Line("layers.{i}.ff_norm.weight", "transformer.layers.{i}.1.fn.norm.weight"),
        Line("layers.{i}.ff_norm.bias", "transformer.layers.{i}.1.fn.norm.bias"),
        Line("layers.{i}.ff.0.weight", "transformer.layers.{i}.1.fn.fn.net.0.weight"),
        Line("layers.{i}.ff.0.bias", "transformer.layers.{i}.1.fn.fn.net.0.bias"),
        Line("layers.{i}.ff.3.weight", "transformer.layers.{i}.1.fn.fn.net.3.weight"),
        Line("layers.{i}.ff.3.bias", "transformer.layers.{i}.1.fn.fn.net.3.bias"),
        Line("norm.weight", "to_logits.0.weight"),
        Line("norm.bias", "to_logits.0.bias"),
        Line("to_logits.weight", "to_logits.1.weight"),
        Line("to_logits.bias", "to_logits.1.bias"),
    ),
    config=lamda_config,
)


# ----------------------------------------------------------------------------------- perceiver-ar-pytorch


def perceiver_ar_config(weights: Tensors, buffers: Tensors, given: Mapping[str, Any]) -> dict[str, Any]:
    (v, c), (_, f) = matrix(weights, "token_emb.weight"), matrix(weights, "layers.0.ff.3.weight")
    _, h_d = matrix(weights, "layers.0.attn.to_out.weight")
    d = dim_head_of(h_d, buffers.get("inv_freq"), given)
    h = ratio("heads", h_d, d, "the width of the queries")
    why = "which positions are the prefix leaves no trace in the tensors"
    return {
        "num_tokens": v,
        "dim": c,
        "depth": sum(name.startswith("layers.") and name.endswith("to_q.weight") for name in weights),
        "perceive_depth": sum(name.endswith("prefix_norm.weight") for name in weights),
        "max_seq_len": matrix(weights, "pos_emb.weight")[0],
        "cross_attn_seq_len": needed("cross_attn_seq_len", given, why),
        "heads": h,
        "dim_head": d,
        "kv_heads": h,
        "ff_mult": ratio("ff_mult", f, c, "the feed-forward's inner width"),
        "norm": "layernorm-biased",
        "final_norm": False,
        "gated": False,
        "prefix_bias": True,
        "tie_embeddings": False,
    }


def dim_head_of(h_d: int, inv_freq: Tensor | None, given: Mapping[str, Any]) -> int:
    """The width of heads that are h_d wide together; the first `max(32, d // 2)` dims of each are rotated."""
    fitting = [d for d in range(32, h_d + 1, 2) if h_d % d == 0]
    if inv_freq is not None:
        rotated = 2 * len(inv_freq)
        exponent = torch.arange(0, rotated, 2, dtype=torch.float64) / rotated
        check_buffer("rotary_pos_emb.inv_freq", inv_freq, 10000**-exponent)
        fitting = [d for d in fitting if max(32, d // 2) == rotated]
    if len(fitting) == 1:
        return fitting[0]
    d = needed("dim_head", given, f"with heads {h_d} wide together it could be any of {fitting}")
    if d not in fitting:
        raise ValueError(f"dim_head: expected one of {fitting}, as these weights have it, got {d!r}")
    return d


def queries(q_k_v: Tensor) -> Tensor:
    """The first third of (3 h d, c)."""
    return q_k_v[: len(q_k_v) // 3]


def keys_and_values(q_k_v: Tensor) -> Tensor:
    """The other two thirds of (3 h d, c)."""
    return q_k_v[len(q_k_v) // 3 :]


PERCEIVER_AR = Layout(
    project="perceiver-ar-pytorch",
    mark=r"(perceive_)?layers\.\d+\.0\.(norm|to_).*",
    model=PerceiverAR,
    weights=(
        Line("token_emb.weight", "token_emb.weight"),
        Line("pos_emb.weight", "pos_emb.weight"),
        Line("perceive_layers.{i}.attn_norm.weight", "perceive_layers.{i}.0.norm.weight"),
        Line("perceive_layers.{i}.attn_norm.bias", "perceive_layers.{i}.0.norm.bias"),
        Line("perceive_layers.{i}.prefix_norm.weight", "perceive_layers.{i}.0.context_norm.weight"),
        Line("perceive_layers.{i}.prefix_norm.bias", "perceive_layers.{i}.0.context_norm.bias"),
        Line("perceive_layers.{i}.attn.to_q.weight", "perceive_layers.{i}.0.to_q.weight"),
        Line("perceive_layers.{i}.attn.to_kv.weight", "perceive_layers.{i}.0.to_kv.weight"),
        Line("perceive_layers.{i}.attn.to_out.weight", "perceive_layers.{i}.0.to_out.weight"),
        Line("perceive_layers.{i}.attn.to_out.bias", "perceive_layers.{i}.0.to_out.bias"),
        Line("perceive_layers.{i}.ff_norm.weight", "perceive_layers.{i}.1.0.weight"),
        Line("perceive_layers.{i}.ff_norm.bias", "perceive_layers.{i}.1.0.bias"),
        Line("perceive_layers.{i}.ff.0.weight", "perceive_layers.{i}.1.1.weight"),
        Line("perceive_layers.{i}.ff.3.weight", "perceive_layers.{i}.1.4.weight"),
        Line("layers.{i}.attn_norm.weight", "layers.{i}.0.norm.weight"),
        Line("layers.{i}.attn_norm.bias", "layers.{i}.0.norm.bias"),
        Line("layers.{i}.attn.to_q.weight", "layers.{i}.0.to_qkv.weight", queries),
        Line("layers.{i}.attn.to_kv.weight", "layers.{i}.0.to_qkv.weight", keys_and_values),
        Line("layers.{i}.attn.to_out.weight", "layers.{i}.0.to_out.weight"),
        Line("layers.{i}.ff_norm.weight", "layers.{i}.1.0.weight"),
        Line("layers.{i}.ff_norm.bias", "layers.{i}.1.0.bias"),
        Line("layers.{i}.ff.0.weight", "layers.{i}.1.1.weight"),
        Line("layers.{i}.ff.3.weight", "layers.{i}.1.4.weight"),
        Line("to_logits.weight", "to_logits.weight"),
    ),
    buffers=(Line("inv_freq", "rotary_pos_emb.inv_freq"),),
    config=perceiver_ar_config,
)
