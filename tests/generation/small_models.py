"""Small models of every kind, with weights of a size that matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR
from palm_pytorch.models.language_model import LanguageModel

V, P = 37, 9  # tokens; of them Perceiver AR's prefix
SHAPE: dict[str, Any] = {"num_tokens": V, "dim": 24, "depth": 2, "heads": 6, "dim_head": 16, "ff_mult": 2}
Kind = Callable[..., LanguageModel]
Variant = tuple[Kind, dict[str, Any]]


def variants_of(longest: int) -> list[Variant]:
    """Two of each model, the first with its defaults; of Perceiver AR with a window of `longest` tokens."""
    lengths = {"max_seq_len": longest, "cross_attn_seq_len": P}
    return [
        (PaLM, {}),
        (PaLM, {"xpos": True, "xpos_scale_base": 20, "qk_norm": True, "norm": "layernorm"}),
        (PaLMLite, {}),
        (PaLMLite, {"qk_norm": True, "heads": 3, "tie_embeddings": False}),
        (LaMDA, {}),
        (LaMDA, {"kv_heads": 3, "num_buckets": 8, "max_distance": 12, "norm": "layernorm"}),
        (PerceiverAR, lengths),
        (PerceiverAR, {**lengths, "perceive_depth": 2, "kv_heads": 2, "dim_head": 48, "norm": "layernorm"}),
    ]


def each_of(variants: list[Variant]) -> pytest.MarkDecorator:
    """For a test of `kind` and `options`."""
    ids = [f"{kind.__name__}-{len(options)}" for kind, options in variants]
    return pytest.mark.parametrize(("kind", "options"), variants, ids=ids)


def build(kind: Kind, options: dict[str, Any], **more: Any) -> LanguageModel:
    """Every weight at a size that matters, every gain away from one."""
    net = kind(**{**SHAPE, **options, **more})
    for weight in net.parameters():
        nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.25)
    return net.eval()
