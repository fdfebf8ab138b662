"""The older projects' PaLM: PaLM-pytorch 0.2 and its palm_lite, PaLM-rlhf-pytorch, PaLM-flax.

All have the parallel block, one projection for query, key, value and feed-forward, and a tied head.

Shapes: h query heads; d head dim; c model width; f inner width of the feed-forward; v num_tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from palm_pytorch.checkpoints.reference.layout import (
    SOURCE,
    Layout,
    Line,
    Tensors,
    check_buffer,
    matrix,
    needed,
    ratio,
)
from palm_pytorch.models import PaLM, PaLMLite
from palm_pytorch.ops.arguments import expect_number

GAINS = ("gamma", "gamma+1")


def shape_of(weights: Tensors, narrow: int) -> dict[str, int]:
    """The sizes of a PaLM; `narrow` counts what the fused projection makes beside queries and feed-forward:
    one key and one value, or one that is both.
    """
    (v, c), depth = matrix(weights, "token_emb.weight"), sum(n.endswith("attn_out.weight") for n in weights)
    h_d, f = (matrix(weights, f"layers.0.{name}_out.weight")[1] for name in ("attn", "ff"))
    rest = matrix(weights, "layers.0.fused_proj.weight")[0] - h_d - 2 * f
    d = ratio("dim_head", rest, narrow, "a fused projection less queries and feed-forward")
    return {
        "num_tokens": v,
        "dim": c,
        "depth": depth,
        "heads": ratio("heads", h_d, d, "the width of the queries"),
        "dim_head": d,
        "ff_mult": ratio("ff_mult", f, c, "the feed-forward's inner width"),
    }


def check_buffers(buffers: Tensors, weights: Tensors, d: int) -> None:
    """Refuse what bias-less norms, rotary and a tied head cannot have been."""
    x, embedding = torch.arange(0, d, 2, dtype=torch.float64), weights["token_emb.weight"]
    expected = {
        "beta": torch.zeros(weights["norm.weight"].shape),
        "inv_freq": 10000 ** (-x / d),
        "scale": (x + 0.4 * d) / (1.4 * d),
    }
    for name, buffer in buffers.items():
        kind = name.rpartition(".")[2]
        if kind != "head":
            check_buffer(name, buffer, expected[kind])
        elif not buffer.is_meta and not torch.equal(buffer.to(embedding), embedding):
            raise ValueError(f"{SOURCE}: the head is not the token embedding, with which that code shares it")


# ------------------------------------------------------------------------------------------- PaLM-pytorch


def parallel_config(
    weights: Tensors, buffers: Tensors, given: Mapping[str, Any], *, narrow: int, norm: str
) -> dict[str, Any]:
    shape = shape_of(weights, narrow)
    check_buffers(buffers, weights, shape["dim_head"])
    return {**shape, "norm": norm, "tie_embeddings": True}


palm_config = partial(parallel_config, narrow=2, norm="layernorm")
palm_lite_config = partial(parallel_config, narrow=1, norm="rmsnorm-clamped")

PALM = Layout(
    project="PaLM-pytorch",
    mark=r"\d+\.fn\.norm\.gamma",
    model=PaLM,
    weights=(
        Line("token_emb.weight", "0.weight"),
        Line("layers.{i}.norm.weight", "{n}.fn.norm.gamma"),
        Line("layers.{i}.fused_proj.weight", "{n}.fn.fused_attn_ff_proj.weight"),
        Line("layers.{i}.attn_out.weight", "{n}.fn.attn_out.weight"),
        Line("layers.{i}.ff_out.weight", "{n}.fn.ff_out.1.weight"),
        Line("norm.weight", "{n}.gamma"),
    ),
    buffers=(
        Line("layers.{i}.beta", "{n}.fn.norm.beta"),
        Line("layers.{i}.inv_freq", "{n}.fn.rotary_emb.inv_freq"),
        Line("norm.beta", "{n}.beta"),
        Line("head", "{m}.weight"),
    ),
    config=palm_config,
)

PALM_LITE = Layout(
    project="palm_lite of PaLM-pytorch",
    mark=r"\d+\.fn\.norm\.g",
    model=PaLMLite,
    weights=(
        Line("token_emb.weight", "0.weight"),
        Line("layers.{i}.norm.weight", "{n}.fn.norm.g"),
        Line("layers.{i}.fused_proj.weight", "{n}.fn.fused_attn_ff_proj.weight"),
        Line("layers.{i}.attn_out.weight", "{n}.fn.attn_out.weight"),
        Line("layers.{i}.ff_out.weight", "{n}.fn.ff_out.1.weight"),
        Line("norm.weight", "{n}.g"),
    ),
    buffers=(Line("head", "{m}.weight"),),
    config=palm_lite_config,
)


# -------------------------------------------------------------------------------------- PaLM-rlhf-pytorch


def palm_rlhf_config(weights: Tensors, buffers: Tensors, given: Mapping[str, Any]) -> dict[str, Any]:
    """Its versions differ under the same names: in what a gain is, in whether logits are read off the normed
    stream, and early ones in the scale of normed queries.
    """
    shape = palm_config(weights, buffers, given)
    gains = {name: w for name, w in weights.items() if name == "norm.weight" or name.endswith(".norm.weight")}
    gain, final_norm = given.get("gain"), given.get("final_norm")
    if gain is None:
        gain = gain_of(gains)
    elif gain not in GAINS:
        raise ValueError(f"gain: expected one of {GAINS}, got {gain!r}")
    if gain == "gamma+1":
        weights |= {name: plus_one(tensor) for name, tensor in gains.items()}
    if final_norm is None:
        final_norm = gain == "gamma+1" or trained_final_norm(gains)
    if not final_norm:
        del weights["norm.weight"]

    qk_norm = "layers.0.q_norm.weight" in weights
    if given.get("qk_scale") is not None:  # ours scales by dim_head^-0.5
        expect_number("qk_scale", given["qk_scale"], above=0)
        if not qk_norm:
            raise ValueError("qk_scale: expected None, since these weights have no query-key norm")
        for name in [name for name in weights if name.endswith(".q_norm.weight")]:
            weights[name] = weights[name] * (given["qk_scale"] * shape["dim_head"] ** 0.5)

    if "layers.0.inv_freq" in buffers:
        xpos = "layers.0.scale" in buffers
    else:
        xpos = needed("xpos", given, "without the rotary buffers, nothing tells whether there was xPos")
    base = given.get("xpos_scale_base", 512)  # that code's default; it is saved nowhere
    config = {"qk_norm": qk_norm, "final_norm": final_norm, "xpos": xpos, "xpos_scale_base": base}
    return {**shape, **config}


def gain_of(gains: Tensors) -> str:
    """What the gains are, where that can be told: `gamma`, which starts at one and hardly ever crosses zero;
    or, from version 0.2.4 on, `gamma+1`, with a gamma that starts at zero and takes either sign.

    Raises:
        ValueError: they could be either.
    """
    flat = torch.cat([gain.flatten() for gain in gains.values()])
    if not flat.is_meta:
        middle, not_positive = flat.float().median().item(), (flat <= 0).float().mean().item()
        if not_positive > 0.1:
            return "gamma+1"
        if middle > 0.7 and not_positive < 0.01:
            return "gamma"
    raise ValueError(
        "gain: expected it to be given: by their values the norms' gains could be 'gamma' "
        "(PaLM-rlhf-pytorch up to 0.2.3) or 'gamma+1' (from 0.2.4 on)"
    )


def plus_one(gain: Tensor) -> Tensor:
    return (gain.to(torch.promote_types(gain.dtype, torch.float32)) + 1).to(gain.dtype)


def trained_final_norm(gains: Tensors) -> bool:
    """Whether logits come from the normed stream, as they do from 0.2.1 on: in training with earlier versions
    the last gain got no gradient, and is still all the same number when the others are not.
    """
    last, first = gains["norm.weight"], gains["layers.0.norm.weight"]
    return last.is_meta or bool((last != last[0]).any()) or not bool((first != first[0]).any())


PALM_RLHF = Layout(
    project="PaLM-rlhf-pytorch",
    mark=r"layers\.\d+\.fn\..*",
    model=PaLM,
    weights=(
        Line("token_emb.weight", "token_emb.weight"),
        Line("layers.{i}.norm.weight", "layers.{i}.fn.norm.gamma"),
        Line("layers.{i}.fused_proj.weight", "layers.{i}.fn.fused_attn_ff_proj.weight"),
        Line("layers.{i}.attn_out.weight", "layers.{i}.fn.attn_out.weight"),
        Line("layers.{i}.ff_out.weight", "layers.{i}.fn.ff_out.2.weight"),
        Line("norm.weight", "norm.gamma"),
    ),
    buffers=(
        Line("layers.{i}.beta", "layers.{i}.fn.norm.beta"),
        Line("layers.{i}.inv_freq", "layers.{i}.fn.rotary_emb.inv_freq"),
        Line("layers.{i}.scale", "layers.{i}.fn.rotary_emb.scale"),
        Line("norm.beta", "norm.beta"),
        Line("head", "to_logits.weight"),
    ),
    config=palm_rlhf_config,
    answers=("gain", "qk_scale"),
)

PALM_RLHF_QK_NORM = replace(
    PALM_RLHF,
    mark=r"layers\.\d+\.fn\.[qk]_scale",
    weights=(
        *PALM_RLHF.weights,
        Line("layers.{i}.q_norm.weight", "layers.{i}.fn.q_scale"),
        Line("layers.{i}.k_norm.weight", "layers.{i}.fn.k_scale"),
    ),
)


# ---------------------------------------------------------------------------------------------- PaLM-flax


def transposed(kernel: Tensor) -> Tensor:
    """(in, out) as PyTorch's (out, in)."""
    return kernel.transpose(0, -1)


FLAX_BLOCK = "ParallelTransformer_0/ParallelTransformerBlock_{i}"

PALM_FLAX = Layout(
    project="PaLM-flax",
    mark=r"ParallelTransformer_0/.*",
    model=PaLM,
    weights=(
        Line("token_emb.weight", "Embed_0/embedding"),
        Line("layers.{i}.norm.weight", "ParallelTransformer_0/PreNorm_{i}/LayerNorm_0/scale"),
        Line("layers.{i}.fused_proj.weight", FLAX_BLOCK + "/Dense_0/kernel", transposed),
        Line("layers.{i}.attn_out.weight", FLAX_BLOCK + "/Dense_1/kernel", transposed),
        Line("layers.{i}.ff_out.weight", FLAX_BLOCK + "/Dense_2/kernel", transposed),
        Line("norm.weight", "LayerNorm_0/scale"),
    ),
    config=palm_config,
)
