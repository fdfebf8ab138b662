"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and xPos (Sun et al. 2022, arXiv 2212.10554).

Shapes: b batch; h heads; n sequence length; d head dim; r rotated dims, the first of d.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from palm_pytorch.layers.kv_cache import NO_CACHE, KVCache
from palm_pytorch.ops import rotate
from palm_pytorch.ops.arguments import expect_number, readable

# xPos scales a dimension by at most (0.4 / 1.4) ** power on either side of the middle; past this power
# float32 has no number for it.
XPOS_MAX_POWER = 69


class RotaryTable(NamedTuple):
    """cos and sin of every angle, (n, r) or (b, n, r), float32, with xPos's scale multiplied in: both halves
    of r alike, but that sin is negated in the first."""

    cos: Tensor
    sin: Tensor

    def last(self, n: int) -> RotaryTable:
        """The table of the last n positions."""
        return RotaryTable(self.cos[..., -n:, :], self.sin[..., -n:, :])


class Rotary(nn.Module):
    """Tables for queries and keys; dims (x, x + r / 2) turn by the angle `position * base^(-2x / r)`.

    It holds no tensors: angles are computed in float64, so positions stay exact in models of any dtype and
    length.
    """

    def __init__(self, dim: int, base: float = 10000.0, xpos_scale_base: float | None = None) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim: expected an even number of dims to turn in pairs, got {dim}")
        expect_number("base", base, above=0)
        if xpos_scale_base is not None:
            expect_number("xpos_scale_base", xpos_scale_base, above=0)
        self.dim, self.base, self.xpos_scale_base = dim, base, xpos_scale_base

    def forward(self, positions: Tensor, cache: KVCache = NO_CACHE) -> tuple[RotaryTable, RotaryTable]:
        """Tables for queries and for keys. positions: (n,) or (b, n), integers or floats.

        cache: what the keys are going to, whose positions are then (n,) in a row; xPos has them fade there.
        """
        device = positions.device
        # Not every accelerator has float64; the tables are small.
        exact = positions.to("cpu" if device.type == "mps" else device, torch.float64)
        x = torch.arange(0, self.dim, 2, dtype=torch.float64, device=exact.device)
        angle = exact[..., None] * self.base ** (-x / self.dim)
        cos, sin = angle.cos(), angle.sin()
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        if self.xpos_scale_base is None:
            table = RotaryTable(cos.to(device, torch.float32), sin.to(device, torch.float32))
            return table, table
        longest = int(2 * XPOS_MAX_POWER * self.xpos_scale_base)
        if cache is not NO_CACHE:
            longest //= 2  # powers are measured from one end then, not from the middle
        extent = positions.shape[-1]  # of consecutive ones, as they are taken to be where they are not read
        if readable(positions) and extent > 1:
            extent = int((positions.amax(dim=-1) - positions.amin(dim=-1)).max()) + 1
        if extent > longest:
            raise ValueError(
                f"positions: expected at most {longest}, as far as float32 reaches for xPos with scale base "
                f"{self.xpos_scale_base}, got {extent}"
            )
        zeta = ((x + 0.4 * self.dim) / (1.4 * self.dim)).repeat(2)
        # Scores depend on the difference of two powers, so any origin will do. That of stored keys moves on
        # to the last position with every call, so that they only ever shrink; else the middle keeps powers
        # smallest.
        if cache is NO_CACHE:
            power = (exact - exact.mean(dim=-1, keepdim=True).floor()) / self.xpos_scale_base
            scale = zeta ** power[..., None]
            scales = (scale, 1 / scale)
        else:
            cache.fade_keys(zeta ** (1 / self.xpos_scale_base), len(positions), device)
            scale = zeta ** ((exact - exact[-1]) / self.xpos_scale_base)[:, None]
            scales = (scale, torch.ones_like(scale))
        query, key = (
            RotaryTable((cos * s).to(device, torch.float32), (sin * s).to(device, torch.float32))
            for s in scales
        )
        return query, key


def rotate_both(q: Tensor, k: Tensor, tables: tuple[RotaryTable, RotaryTable]) -> tuple[Tensor, Tensor]:
    """Queries (b, h, i, d) and keys (b, g, j, d), rotated by their tables for j positions: queries are at the
    last i of them."""
    i, j = q.shape[2], k.shape[2]
    # A token of a text, where each operation counts, until they are compiled into one.
    if i == j == 1 and tables[0].cos is tables[1].cos and not torch.compiler.is_compiling():
        q, k = apply_rotary(torch.cat([q, k], dim=1), tables[0]).split_with_sizes((q.shape[1], k.shape[1]), 1)
        return q, k
    return apply_rotary(q, tables[0] if i == j else tables[0].last(i)), apply_rotary(k, tables[1])


def apply_rotary(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotates the first r of d dims of x (b, h, n, d), computed in float32 or better, in the dtype of x.

    Half-split: dim x turns with dim x + r / 2.
    """
    cos, sin = (t if t.dim() == 2 else t[:, None] for t in table)
    if cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"table: turns {cos.shape[-1]} dims, and x has only {x.shape[-1]}")
    return rotate(x, cos, sin)
