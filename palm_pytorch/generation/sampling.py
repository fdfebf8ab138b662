"""From logits to the next token.

Shapes: b batch; v num_tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """logits (b, v) with all but the k largest of each row at -inf; ties with the k-th stay."""
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def sample(logits: Tensor, *, temperature: float = 1.0, filter_thres: float = 0.0) -> Tensor:
    """One token (b,) for each row of logits (b, v), in float32 or better.

    temperature: divides the logits; 0 takes the most likely token.
    filter_thres: share of the vocabulary that is never drawn, the least likely; at least one token is left.
    """
    if temperature < 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
    if not 0 <= filter_thres <= 1:
        raise ValueError(f"filter_thres: expected 0 <= filter_thres <= 1, got {filter_thres}")
    if temperature == 0:
        return logits.argmax(dim=-1)
    # 1 - 0.9 is a rounding error below 0.1: without the allowance 10 of 100 tokens would be 9.
    k = max(1, int((1 - filter_thres) * logits.shape[-1] + 1e-6))
    logits = top_k_filter(logits.to(torch.promote_types(logits.dtype, torch.float32)), k)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1)[:, 0]
