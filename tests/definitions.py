"""The definitions that the package is compared with, written out plainly from the papers; nothing here calls it.

Shapes: b batch; h query heads; g key/value heads; i, j query and key length; d head dim.
"""

from __future__ import annotations

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
    """q (b, h, i, d); k, v (b, g, j, d); bias (h, i, j): a whole score matrix and a whole mask, one after the other."""
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
        visible = visible & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    scores = scores.where(visible, -torch.inf)
    highest = scores.detach().amax(dim=-1, keepdim=True)
    weights = (scores - highest.where(highest.isfinite(), 0)).exp()
    total = weights.sum(dim=-1, keepdim=True)
    return torch.einsum("bhij,bhjd->bhid", weights / total.where(total > 0, 1), v)


def alibi_bias(slopes: Tensor, i: int, j: int) -> Tensor:
    return -slopes[:, None, None] * distances(i, j).abs()


@cache
def t5_bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """T5's `exact + floor(log(distance / exact) / log(max_distance / exact) * exact)` in whole numbers: the largest
    step with `(max_distance / exact) ** step <= (distance / exact) ** exact`."""
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


def error(value: Tensor, exact: Tensor) -> float:
    """The Frobenius norm of the difference, as a share of that of `exact`."""
    difference = (value.double() - exact.double()).norm()
    return (difference / exact.double().norm().clamp(min=1e-3 * exact.numel() ** 0.5)).item()
