"""From logits to the next token.

Shapes: b batch; v num_tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palm_pytorch.ops.arguments import expect_number

# As good as zero; float32 has no reciprocal of what is much smaller.
LEAST_TEMPERATURE = 1e-30


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
    expect_number("temperature", temperature, least=0)
    expect_number("filter_thres", filter_thres, least=0)
    if filter_thres > 1:
        raise ValueError(f"filter_thres: expected at most 1, got {filter_thres}")
    if temperature == 0:
        return logits.argmax(dim=-1)
    # 1 - 0.9 is a rounding error below 0.1: without the allowance 10 of 100 tokens would be 9.
    k = max(1, int((1 - filter_thres) * logits.shape[-1] + 1e-6))
    logits = top_k_filter(logits.to(torch.promote_types(logits.dtype, torch.float32)), k)
    # From the largest down, so that no temperature, however low, makes a difference of infinities.
    below = logits - logits.amax(dim=-1, keepdim=True)
    return torch.multinomial((below / max(temperature, LEAST_TEMPERATURE)).softmax(dim=-1), 1)[:, 0]
