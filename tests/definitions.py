"""The definitions that the package is compared with, written out plainly from the papers.

Shapes: b batch; h query heads; g key/value heads; i, j query and key length; d head dim.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# The ALiBi paper's slopes for 1, 2, 8 and 16 heads; for others, its authors' rule by hand.
ALIBI_SLOPES = {
    1: [2**-8],
    2: [2**-4, 2**-8],
    3: [2**-4, 2**-8, 2**-2],
    6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3],
    8: [2**-x for x in (1, 2, 3, 4, 5, 6, 7, 8)],
    12: [2**-x for x in (1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5)],
    16: [2**-x for x in (0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8)],
}


# The attention backends that serve any call on any device.
ANYWHERE = ("reference", "sdpa", "blockwise")


def distances(i: int, j: int) -> Tensor:
    """How far key j lies behind query i, the last of both aligned, (i, j)."""
    return (torch.arange(i) + j - i)[:, None] - torch.arange(j)[None, :]


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """q (b, h, i, d); k, v (b, g, j, d); bias (h, i, j): all scores, then a whole mask, then the softmax."""
    (b, h, i, d), (g, j) = q.shape, k.shape[1:3]
    k, v = (t.repeat_interleave(h // g, dim=1) for t in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (d**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    visible = torch.ones(b, 1, i, j, dtype=torch.bool)
    if causal:
        visible = visible & (distances(i, j) >= 0)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    if document_ids is not None:
        visible = visible & (document_ids[:, None, j - i :, None] == document_ids[:, None, None, :])
    scores = scores.where(visible, -torch.inf)
    highest = scores.detach().amax(dim=-1, keepdim=True)
    weights = (scores - highest.where(highest.isfinite(), 0)).exp()
    total = weights.sum(dim=-1, keepdim=True)
    return torch.einsum("bhij,bhjd->bhid", weights / total.where(total > 0, 1), v)


def alibi_bias(slopes: Tensor, i: int, j: int) -> Tensor:
    return -slopes[:, None, None] * distances(i, j).abs()


@cache
def t5_bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """T5's `exact + floor(log(distance / exact) / log(max_distance / exact) * exact)` in whole numbers.

    That is the largest step with `(max_distance / exact) ** step <= (distance / exact) ** exact`.
    """
    exact = num_buckets // 2
    if distance < exact:
        return max(0, distance)
    steps = range(exact)
    power = distance**exact
    return exact + max(s for s in steps if max_distance**s * exact**exact <= power * exact**s)


def t5_bias(table: Tensor, max_distance: int, scale: float, i: int, j: int) -> Tensor:
    """table (buckets, h) -> (h, i, j)."""
    buckets = torch.tensor([t5_bucket(x, table.shape[0], max_distance) for x in range(j)])
    return table[buckets[distances(i, j).clamp(min=0)]].permute(2, 0, 1) * scale


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight


def l2_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / x.square().sum(dim=-1, keepdim=True).sqrt() * weight


NORMS = {"rmsnorm": rms_norm, "layernorm": layer_norm}


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def turned(x: Tensor, positions: Tensor, rotated: int, base: float = 10000.0) -> Tensor:
    """Rotary in float64. Dims m and m + rotated / 2 of x (b, h, n, d) are one complex number, which turns by
    the angle `position * base^(-2 m / rotated)`.
    """
    half = rotated // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:rotated].double())
    frequency = torch.tensor([base ** (-2 * m / rotated) for m in range(half)], dtype=torch.float64)
    angle = positions.double()[..., None] * frequency
    angle = angle if positions.dim() == 1 else angle[:, None]
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag, x[..., rotated:].double()], dim=-1)


def xpos_zeta(d: int) -> Tensor:
    """The decay of each of d dims; a score at distance x gets `zeta ** (x / scale_base)`."""
    return torch.tensor([(2 * m + 0.4 * d) / (1.4 * d) for m in range(d // 2)] * 2, dtype=torch.float64)


def heads_of(x: Tensor, d: int) -> Tensor:
    """(b, n, h d), head after head, as (b, h, n, d)."""
    return torch.stack(x.split(d, dim=-1), dim=1)


def joined(x: Tensor) -> Tensor:
    """(b, h, n, d) as (b, n, h d)."""
    return torch.cat(list(x.unbind(dim=1)), dim=-1)


def error(value: Tensor, exact: Tensor) -> float:
    """The Frobenius norm of the difference, as a share of that of `exact`."""
    difference = (value.double() - exact.double()).norm()
    return (difference / exact.double().norm().clamp(min=1e-3 * exact.numel() ** 0.5)).item()
