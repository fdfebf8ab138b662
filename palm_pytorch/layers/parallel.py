"""PaLM's parallel block (Chowdhery et al. 2022, arXiv 2204.02311, section 2), but for what attention makes of
positions: that is a model's own.

Shapes: b batch; n sequence length; h heads; d head dim; c model width.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from palm_pytorch.layers.attention import merge_heads
from palm_pytorch.layers.norm import L2Norm, make_norm
from palm_pytorch.ops import attention


class ParallelBlock(nn.Module):
    """A norm, one projection that makes everything of the normed input, and two ways out.

    narrow: what the projection makes of width d beside the queries: 2 are a key and a value, 1 is both. All
    query heads share them.
    """

    narrow: ClassVar[int]

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        dim_head: int,
        ff_mult: int,
        norm: str,
        qk_norm: bool,
        attn_dropout: float,
        ff_dropout: float,
        attention_backend: str,
    ) -> None:
        super().__init__()
        self.dim_head, self.attn_dropout, self.backend = dim_head, attn_dropout, attention_backend
        inner = ff_mult * dim
        self.widths = [heads * dim_head, *[dim_head] * self.narrow, inner, inner]
        self.norm = make_norm(norm, dim)
        self.fused_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.q_norm = L2Norm(dim_head) if qk_norm else nn.Identity()
        self.k_norm = L2Norm(dim_head) if qk_norm else nn.Identity()
        self.attn_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff_dropout = nn.Dropout(ff_dropout)
        self.ff_out = nn.Linear(inner, dim, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(b, n, c) -> queries (b, n, h d), `narrow` of (b, n, d), value and gate (b, n, ff_mult c)."""
        return self.fused_proj(self.norm(x)).split_with_sizes(self.widths, dim=-1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """q (b, h, n, d), k and v (b, 1, j, d) -> (b, n, h d); options as of `palm_pytorch.ops.attention`."""
        dropout_p = self.attn_dropout if self.training else 0.0
        return merge_heads(attention(q, k, v, **options, dropout_p=dropout_p, backend=self.backend))

    def out(self, attended: Tensor, inner: Tensor) -> Tensor:
        """(b, n, h d) and (b, n, ff_mult c) -> (b, n, c)."""
        return self.attn_out(attended) + self.ff_out(self.ff_dropout(inner))
