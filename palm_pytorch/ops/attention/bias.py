"""Position biases added to attention scores, described by their few numbers and never by an (i, j) tensor.

Shapes: h query heads; i, j query and key length; f extra features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from palm_pytorch.ops.arguments import expect_floating, expect_integer
from palm_pytorch.ops.derivatives import transformed


@dataclass(frozen=True)
class AlibiBias:
    """ALiBi (Press et al. 2022, arXiv 2108.12409): adds `-slope * |distance|` to the scores of each head.

    slopes: (h,), constants of the model: they get no gradient.
    at: as of `RelativeBias`.
    """

    slopes: Tensor
    at: Tensor | None = None

    def __post_init__(self) -> None:
        expect_floating("slopes", self.slopes)
        if self.slopes.dim() != 1:
            raise ValueError(f"slopes: expected shape (heads,), got {tuple(self.slopes.shape)}")
        if self.slopes.requires_grad:
            raise ValueError("slopes: expected constants, got a tensor that requires grad")

    @property
    def per_head(self) -> Tensor:
        return self.slopes

    def values(self, i_len: int, j_len: int) -> Tensor:
        """The bias as a tensor (h, i, j); for the plain definition and for tests."""
        distance = key_distance(i_len, j_len, self.slopes.device, self.at)
        slopes = self.slopes.to(torch.promote_types(self.slopes.dtype, torch.float32))
        return -slopes[:, None, None] * distance.abs()


@dataclass(frozen=True)
class RelativeBias:
    """T5 relative bias (Raffel et al. 2020, arXiv 1910.10683, section 2.1), causal buckets.

    Adds `scale * table[bucket(distance), head]`; a key after the query counts as distance 0.
    table: (buckets, h), gets its gradient. max_distance: from here on every distance shares the last bucket.
    at: (1,) integer on the device: which key a single query is at, where that is not the last; a key mask has
    to hide those behind it. "reference" and "sdpa" always serve it, "triton" without gradients, "blockwise"
    without gradients and dropout, "flex" never; nor does it go with documents.
    """

    table: Tensor
    max_distance: int = 128
    scale: float = 1.0
    at: Tensor | None = None

    def __post_init__(self) -> None:
        expect_floating("table", self.table)
        if self.table.dim() != 2:
            raise ValueError(f"table: expected shape (buckets, heads), got {tuple(self.table.shape)}")
        bucket_starts(self.table.shape[0], self.max_distance)

    @property
    def per_head(self) -> Tensor:
        return self.table.T

    @property
    def wide(self) -> Tensor:
        """The table, in float32 or better."""
        return self.table.to(torch.promote_types(self.table.dtype, torch.float32))

    def buckets(self, distance: Tensor) -> Tensor:
        """Bucket of each distance (any shape, integer), in [0, buckets)."""
        plain = type(distance) is Tensor and not transformed() and not torch.compiler.is_compiling()
        starts = (_starts_once if plain else _starts)(distance.device, self.table.shape[0], self.max_distance)
        return torch.bucketize(distance.clamp(min=0), starts, right=True) - 1

    def reach(self, j_len: int) -> int:
        """The distance from which on the bias is the last bucket's, or there are no keys."""
        return min(bucket_starts(self.table.shape[0], self.max_distance)[-1], j_len)

    def offsets(self, j_len: int) -> Tensor:
        """How the bias at distance 0, 1 .. reach - 1 differs from the last bucket's, (h, reach),
        differentiable in `table`; further behind it does not, or there are no keys. Softmax ignores what all
        keys have in common, so this is all that attention needs to know.
        """
        table, reach = self.wide, self.reach(j_len)
        near = table[self.buckets(torch.arange(reach, device=table.device))]
        # No key is so far: the last bucket's gradient is 0, and not what rounding leaves of the others'.
        unseen = torch.is_grad_enabled() and reach == j_len
        return ((near - (table[-1].detach() if unseen else table[-1])) * self.scale).T

    def windows(self, i_len: int, j_len: int) -> Tensor:
        """`values` in float32 or better, as windows on those of all distances: the gradient of a look-up for
        each score, instead of each distance, takes seconds on a GPU."""
        distance = torch.arange(1 - i_len, j_len, device=self.table.device)
        by_distance = (self.wide[self.buckets(distance)] * self.scale).T
        return by_distance.unfold(1, j_len, 1).flip(-1)

    def values(self, i_len: int, j_len: int) -> Tensor:
        """The bias as a tensor (h, i, j), differentiable in `table`: the plain definition, in its dtype."""
        buckets = self.buckets(key_distance(i_len, j_len, self.table.device, self.at))
        # Of the wide table, so that what all scores have for a bucket is not summed in a half precision.
        return self.wide[buckets].to(self.table.dtype).permute(2, 0, 1) * self.scale


Bias = AlibiBias | RelativeBias


def key_distance(i_len: int, j_len: int, device: torch.device, at: Tensor | None = None) -> Tensor:
    """How far key j lies behind query i, (i, j) integers, the last query aligned with the last key or that
    which is `at`.
    """
    i = torch.arange(j_len - i_len, j_len, device=device)
    if at is not None:
        i = i + (at - (j_len - 1))
    return i[:, None] - torch.arange(j_len, device=device)


def _starts(device: torch.device, num_buckets: int, max_distance: int) -> Tensor:
    """`bucket_starts` as a tensor."""
    with torch.inference_mode(False):
        return torch.tensor(bucket_starts(num_buckets, max_distance), device=device)


# Copied to a device once: no step waits for it, and a CUDA graph can be recorded. Not beside tensors that
# have no numbers, or stand for many.
_starts_once = cache(_starts)


def bucket_starts(num_buckets: int, max_distance: int) -> list[int]:
    """The smallest distance of each T5 bucket: half of them one distance wide, the others growing by a
    constant ratio up to `max_distance`.

    Integer starts instead of a logarithm per distance: exact, whatever the dtype.
    """
    expect_integer("num_buckets", num_buckets, least=2)
    expect_integer("max_distance", max_distance)
    exact = num_buckets // 2
    if num_buckets % 2:
        raise ValueError(f"num_buckets: expected an even number, got {num_buckets}")
    if max_distance <= exact:
        raise ValueError(f"max_distance: expected more than num_buckets // 2 = {exact}, got {max_distance}")
    ratio = max_distance / exact
    wide = (exact * ratio ** (step / exact) for step in range(exact))
    # What is an integer on paper may come out a rounding error above it.
    return [*range(exact), *(math.ceil(start - 1e-9) for start in wide)]


def alibi_features(
    slopes: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Query features (i, *slopes.shape, f) and key features (j, f) whose dot product is
    `slope * (key - query)`: causal ALiBi inside the product q k^T itself.

    A half precision holds neither slopes nor positions exactly, so slopes are split into three parts and
    positions into base-256 digits, each of which it does hold; the products are exact and are summed in the
    kernel's float32.

    slopes: any shape, already divided by the factor that the scores will be multiplied with.
    queries, keys: positions (i,) and (j,), integers. The sums round at the size of `slope * position`:
    measure positions from a place near the queries.
    """
    shift = -slopes * queries.view(-1, *[1] * slopes.dim())
    ones = torch.ones_like(keys)
    if dtype.itemsize >= 4:
        query = torch.stack([slopes.expand_as(shift), shift], dim=-1)
        return query.to(dtype), torch.stack([keys, ones], dim=-1).to(dtype)
    slope_parts = _exact_parts(slopes, dtype).expand(*shift.shape, 3)
    sign, size = keys.sign(), keys.abs()
    # 16 ** digit on either side: neither leaves float16's range.
    slope_digits = [slope_parts * 16**digit for digit in range(3)]
    key_digits = [sign * (size >> 8 * digit & 255) * 16**digit for digit in range(3)]
    query = torch.cat([*slope_digits, _exact_parts(shift, dtype)], dim=-1)
    return query, torch.stack([*key_digits, ones], dim=-1).repeat_interleave(3, dim=-1).to(dtype)


def _exact_parts(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Three numbers of a half precision that sum to x in float32, (..., 3)."""
    parts, rest = [], x.float()
    for _ in range(3):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return torch.stack(parts, dim=-1)
