"""From logits to the next token.

Shapes: b batch; v num_tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from palm_pytorch.ops.arguments import expect_integer, expect_number

# As good as zero; float32 has no reciprocal of what is much smaller.
LEAST_TEMPERATURE = 1e-30


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """logits (b, v) with all but the k largest of each row at -inf; ties with the k-th stay."""
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """logits (b, v) with all at -inf but each row's likeliest tokens, as few as have together a probability
    of at least p (Holtzman et al. 2020, arXiv 1904.09751); ties with the last of them stay.
    """
    ordered = logits.sort(dim=-1, descending=True).values
    before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
    before[..., 0] = 0
    least = ordered.masked_fill(before >= p, math.inf).amin(dim=-1, keepdim=True)
    return logits.masked_fill(logits < least, -math.inf)


def min_p_filter(logits: Tensor, p: float) -> Tensor:
    """logits (b, v) with tokens at -inf whose probability is below p times that of the row's likeliest
    (Nguyen et al. 2024, arXiv 2407.01082)."""
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), -math.inf)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits (b, v), those of the tokens in `seen` (b, v) bool divided by the penalty, or multiplied with it
    where negative (Keskar et al. 2019, arXiv 1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. What is set applies in the order of the fields.

    repetition_penalty: above 1 makes tokens that were there already less likely.
    temperature: divides the logits; 0 takes the most likely token.
    top_k, top_p, min_p: only the k likeliest tokens; the likeliest that have probability p together; those
    that have at least p times the probability of the likeliest.

    Raises ValueError or TypeError naming the argument that does not fit.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        expect_number("repetition_penalty", self.repetition_penalty, above=0)
        expect_number("temperature", self.temperature, least=0)
        if self.top_k is not None:
            expect_integer("top_k", self.top_k)
        if self.top_p is not None:
            expect_number("top_p", self.top_p, above=0, most=1)
        if self.min_p is not None:
            expect_number("min_p", self.min_p, least=0, most=1)

    def draw(
        self, logits: Tensor, *, seen: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """One token (b,) for each row of logits (b, v), in float32 or better.

        seen: (b, v) bool, the tokens that were there already.  generator: of the draws, on the logits'
        device.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if seen is not None and self.repetition_penalty != 1:
            logits = penalise_repetition(logits, seen, self.repetition_penalty)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # From the largest down, so that no temperature, however low, makes a difference of infinities.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(self.temperature, LEAST_TEMPERATURE)
        if self.top_k is not None:
            logits = top_k_filter(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            logits = top_p_filter(logits, self.top_p)
        if self.min_p is not None:
            logits = min_p_filter(logits, self.min_p)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def top_k_of_share(filter_thres: float, num_tokens: int) -> int:
    """How many tokens are left when that share of the vocabulary, the least likely, is never drawn: at least
    one.
    """
    expect_number("filter_thres", filter_thres, least=0, most=1)
    # 1 - 0.9 is a rounding error below 0.1: without the allowance 10 of 100 tokens would be 9.
    return max(1, int((1 - filter_thres) * num_tokens + 1e-6))


def sample(logits: Tensor, *, temperature: float = 1.0, filter_thres: float = 0.0) -> Tensor:
    """One token (b,) for each row of logits (b, v), in float32 or better.

    temperature: divides the logits; 0 takes the most likely token.
    filter_thres: share of the vocabulary that is never drawn, the least likely; at least one token is left.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k_of_share(filter_thres, logits.shape[-1]))
    return sampling.draw(logits)
