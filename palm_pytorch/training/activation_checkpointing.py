"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): what the backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recompute(block: Any, what: str) -> None:
    """Have a block of any of the models keep its inputs only, in place: those of all of it ("block"), of its
    attention ("attention"), or of nothing ("none").

    Dropout draws the same again. Names of parameters stay what they are.
    """
    if what == "block":
        block.forward = again(block.forward)
    elif what == "attention" and hasattr(block, "attend"):  # parallel blocks, whose projections are joint
        block.attend = again(block.attend)
    elif what == "attention":
        block.attn.forward = again(block.attn.forward)


def again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, computed again when its gradient is wanted."""
    recomputed = partial(checkpoint, forward, use_reentrant=False)
    return lambda *inputs, **options: (recomputed if torch.is_grad_enabled() else forward)(*inputs, **options)
