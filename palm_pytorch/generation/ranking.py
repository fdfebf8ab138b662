"""Sample-and-rank (LaMDA, Thoppilan et al. 2022, arXiv 2201.08239, section 3; Adiwardana et al. 2020, arXiv
2001.09977, section 2.7): the likeliest of several samples.

Shapes: b prompts; s candidates; n new tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from palm_pytorch.generation.decode import generate
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.ops.arguments import expect_integer


class Ranked(NamedTuple):
    """Candidates (b, s, n) of each prompt, the best first, and their log-likelihoods per token, (b, s)."""

    tokens: Tensor
    scores: Tensor


def sample_and_rank(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    num_candidates: int = 16,
    top_k: int | None = 40,
    temperature: float = 1.0,
    eos_token: int | None = None,
    **options: Any,
) -> Ranked:
    """Draws `num_candidates` continuations of each prompt (b, t), and ranks them by log-likelihood per token,
    the end token included. The defaults are the paper's: 16 candidates at top-k 40, without temperature.

    options: others of `generate`.

    Raises ValueError or TypeError naming the argument that does not fit.
    """
    for name in ("num_samples", "log_probs"):
        if name in options:
            raise TypeError(f"{name}: sample_and_rank decides that; num_candidates says how many samples")
    expect_integer("num_candidates", num_candidates)
    expect_integer("max_new_tokens", max_new_tokens)
    tokens, log_probs = generate(
        model,
        prompt,
        max_new_tokens,
        num_samples=num_candidates,
        top_k=top_k,
        temperature=temperature,
        eos_token=eos_token,
        log_probs=True,
        **options,
    )
    scores = log_probs.sum(dim=-1) / lengths(tokens, eos_token)
    tokens, scores = (rearrange(t, "(b s) ... -> b s ...", s=num_candidates) for t in (tokens, scores))
    scores, best = scores.sort(dim=-1, descending=True, stable=True)
    return Ranked(tokens.take_along_dim(best[..., None], dim=1), scores)


def lengths(tokens: Tensor, eos_token: int | None) -> Tensor:
    """How many of each row's tokens (.., n) come up to and including its end token: n where it has none."""
    n = tokens.shape[-1]
    ends = torch.zeros_like(tokens, dtype=torch.bool) if eos_token is None else tokens == eos_token
    return torch.where(ends.any(dim=-1), ends.int().argmax(dim=-1) + 1, n)
