"""Multi-head attention with one shared key/value head, or any number that divides the heads.

Shapes: b batch; n sequence length; i, j query and key length; h heads; g key/value heads; d head dim;
c model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from palm_pytorch.layers.kv_cache import NO_PAST, LayerCache
from palm_pytorch.layers.rotary import RotaryTable, rotate_both
from palm_pytorch.ops import AlibiBias, RelativeBias, attention
from palm_pytorch.ops.arguments import expect_integer, expect_number
from palm_pytorch.ops.attention import check_backend


# Without einops: four of these to a layer are a tenth of what a generated token costs besides its products.
def split_heads(x: Tensor, dim_head: int) -> Tensor:
    """(b, n, h d) -> (b, h, n, d)."""
    b, n, width = x.shape
    return x.view(b, n, width // dim_head, dim_head).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(b, h, n, d) -> (b, n, h d)."""
    return x.transpose(1, 2).flatten(2)


class MultiQueryAttention(nn.Module):
    """Attention (Vaswani et al. 2017) whose query heads share `kv_heads` key/value heads (Shazeer 2019, arXiv
    1911.02150, for one; Ainslie et al. 2023, arXiv 2305.13245, for more).

    Raises ValueError where `kv_heads` does not divide `heads`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        dim_head: int = 64,
        kv_heads: int = 1,
        causal: bool = True,
        dropout: float = 0.0,
        out_bias: bool = False,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("heads", heads), ("dim_head", dim_head), ("kv_heads", kv_heads)):
            expect_integer(name, size)
        expect_number("dropout", dropout, least=0, below=1)
        check_backend(attention_backend, "attention_backend")
        if heads % kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of heads={heads}, got {kv_heads}")
        self.dim_head, self.causal, self.dropout, self.backend = dim_head, causal, dropout, attention_backend
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=out_bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        rotary: tuple[RotaryTable, RotaryTable] | None = None,
        bias: AlibiBias | RelativeBias | None = None,
        key_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        past: LayerCache = NO_PAST,
    ) -> Tensor:
        """x (b, i, c) attends to itself, to `context` (b, n - i, c) before it if given, and to what `past`
        holds, which these n are added to: j keys in all. Gives (b, i, c).

        rotary: tables for the n positions of context and x.
        bias, key_mask and document_ids (b, j): as in `palm_pytorch.ops.attention`.
        """
        source = x if context is None else torch.cat([context, x], dim=1)
        q = split_heads(self.to_q(x), self.dim_head)
        k, v = (split_heads(t, self.dim_head) for t in self.to_kv(source).chunk(2, dim=-1))
        if rotary is not None:
            q, k = rotate_both(q, k, rotary)
        k, v = past.append(k, v)
        out = attention(
            q,
            k,
            v,
            causal=self.causal,
            bias=bias,
            key_mask=key_mask,
            document_ids=document_ids,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.to_out(merge_heads(out))
