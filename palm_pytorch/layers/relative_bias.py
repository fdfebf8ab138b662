"""Learned relative position bias (T5, Raffel et al. 2020, arXiv 1910.10683, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from palm_pytorch.ops import RelativeBias
from palm_pytorch.ops.arguments import expect_integer
from palm_pytorch.ops.attention.bias import bucket_starts


class T5RelativeBias(nn.Module):
    """A number per bucket of distances and head; calling it gives the `RelativeBias` that attention takes.

    Causal buckets: half of them one distance wide, the rest growing up to `max_distance`, from where all
    share the last.
    scale: factor on the table's values.
    """

    def __init__(
        self, heads: int, num_buckets: int = 32, max_distance: int = 128, scale: float = 1.0
    ) -> None:
        super().__init__()
        expect_integer("heads", heads)
        bucket_starts(num_buckets, max_distance)  # refuses what gives no buckets
        self.max_distance, self.scale = max_distance, scale
        self.table = nn.Parameter(torch.empty(num_buckets, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small beside the scores of fresh queries and keys, whose size is about 1."""
        nn.init.normal_(self.table, std=0.02)

    def forward(self, at: Tensor | None = None) -> RelativeBias:
        """at: as of `RelativeBias`."""
        return RelativeBias(self.table, self.max_distance, self.scale, at)
