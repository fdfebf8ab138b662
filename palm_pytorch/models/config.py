"""The constructor arguments of a model, as it keeps them: what builds the same shape again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from palm_pytorch.ops.arguments import expect_integer, expect_number
from palm_pytorch.ops.attention import check_backend


def read_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's `locals()` without what is no argument; NumPy's numbers as Python's.

    Raises ValueError or TypeError naming an argument that no model can be built with.
    """
    config = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in arguments.items()
        if name not in ("self", "__class__")
    }
    for name in ("num_tokens", "dim", "depth", "heads", "dim_head", "ff_mult", "kv_heads", "perceive_depth"):
        expect_integer(name, config.get(name, 1))
    for name, value in config.items():
        if "dropout" in name:
            expect_number(name, value, least=0, below=1)
    for name in ("qk_norm", "xpos", "tie_embeddings", "final_norm", "gated", "bias", "prefix_bias"):
        if not isinstance(value := config.get(name, False), bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
    for name in ("embedding_std", "logit_scale"):
        expect_number(name, config[name], above=0)
    check_backend(config["attention_backend"], "attention_backend")
    return config
