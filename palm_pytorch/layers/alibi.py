"""Slopes of ALiBi (Press et al. 2022, arXiv 2108.12409, section 3, and its authors' code)."""

from __future__ import annotations

import torch
from torch import Tensor

from palm_pytorch.ops.arguments import expect_integer


def alibi_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
    """One slope per head, (heads,) float32.

    `2^(-8 x / heads)` for x = 1..heads where heads is a power of two; else the slopes of the next smaller
    power of two, followed by every other slope of the next larger one.
    """
    expect_integer("heads", heads)
    power = 1 << (int(heads).bit_length() - 1)
    exponents = torch.arange(1, power + 1, device=device) * (8 / power)
    between = torch.arange(1, 2 * (heads - power) + 1, 2, device=device) * (4 / power)
    return torch.exp2(-torch.cat([exponents, between]).float())
