"""Perceiver AR (Hawthorne et al. 2022, arXiv 2202.07765, section 3): few latents read a long causal prefix.

    tokens --> embedding + position --> | prefix | latents |
                                            |         |
                                            +----+----+
                                                 |
          perceive_depth x (latents attend to prefix and latents, causally --> feed-forward)
                                                 |
                   depth x (latents attend to latents, causally --> feed-forward) --> logits

Shapes: b batch; n sequence length; p prefix length (cross_attn_seq_len); m = n - p latents; c model width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_pytorch.layers.attention import MultiQueryAttention
from palm_pytorch.layers.feedforward import FeedForward
from palm_pytorch.layers.norm import make_norm
from palm_pytorch.layers.rotary import Rotary, RotaryTable
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.ops.arguments import expect_integer, expect_mask


class PerceiveBlock(nn.Module):
    """Latents attend causally to the prefix and to themselves, then go through a feed-forward."""

    def __init__(self, dim: int, *, norm: str, ff_mult: int, dropout: float, **attention: Any) -> None:
        super().__init__()
        self.attn_norm, self.prefix_norm, self.ff_norm = (make_norm(norm, dim) for _ in range(3))
        self.attn = MultiQueryAttention(dim, dropout=dropout, **attention)
        self.ff = FeedForward(dim, ff_mult, dropout=dropout)

    def forward(
        self, x: Tensor, prefix: Tensor, rotary: tuple[RotaryTable, RotaryTable], key_mask: Tensor | None
    ) -> Tensor:
        x = x + self.attn(self.attn_norm(x), self.prefix_norm(prefix), rotary=rotary, key_mask=key_mask)
        return x + self.ff(self.ff_norm(x))


class LatentBlock(nn.Module):
    """Causal self-attention of the latents, then a feed-forward."""

    def __init__(self, dim: int, *, norm: str, ff_mult: int, dropout: float, **attention: Any) -> None:
        super().__init__()
        self.attn_norm, self.ff_norm = (make_norm(norm, dim) for _ in range(2))
        self.attn = MultiQueryAttention(dim, dropout=dropout, **attention)
        self.ff = FeedForward(dim, ff_mult, dropout=dropout)

    def forward(self, x: Tensor, rotary: tuple[RotaryTable, RotaryTable]) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rotary=rotary)
        return x + self.ff(self.ff_norm(x))


class PerceiverAR(LanguageModel):
    """Decoder language model whose cost grows with the prefix in its first layers only.

    num_tokens, dim, depth, heads, dim_head: vocabulary, model width, self-attention layers, heads and their
    width.
    max_seq_len: longest sequence, prefix and latents together.
    cross_attn_seq_len: p, the prefix; a sequence is longer than that and its first p positions predict
    nothing.
    kv_heads: key/value heads, a divisor of heads; None for as many as heads.
    perceive_depth: layers that attend to the prefix, ahead of the `depth` others.
    dropout: share of attention weights and of inner feed-forward features dropped in training.
    cross_attn_dropout: share of the prefix left out in training, drawn anew for each row and layer that
    attends to it.
    ff_mult: inner width of the feed-forward, in multiples of dim.  norm: "rmsnorm" or "layernorm" (without
    bias).
    attention_backend: as in `palm_pytorch.ops.attention`.

    Raises ValueError or TypeError naming the argument that does not fit.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        max_seq_len: int,
        cross_attn_seq_len: int,
        heads: int = 8,
        dim_head: int = 64,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        cross_attn_dropout: float = 0.0,
        ff_mult: int = 4,
        perceive_depth: int = 1,
        norm: str = "rmsnorm",
        tie_embeddings: bool = True,
        attention_backend: str = "auto",
    ) -> None:
        kv_heads = heads if kv_heads is None else kv_heads
        super().__init__(locals())
        for name, length in (("max_seq_len", max_seq_len), ("cross_attn_seq_len", cross_attn_seq_len)):
            expect_integer(name, length)
        if cross_attn_seq_len >= max_seq_len:
            raise ValueError(
                f"cross_attn_seq_len: expected less than max_seq_len={max_seq_len}, got {cross_attn_seq_len}"
            )
        self.pos_emb = nn.Embedding(max_seq_len, dim)
        # Only part of each head turns, so that the rest can attend by content alone, at any distance.
        if dim_head % 2:
            raise ValueError(
                f"dim_head: rotary turns pairs of dims, so expected an even number, got {dim_head}"
            )
        self.rotary = Rotary(min(dim_head, max(32, dim_head // 4 * 2)))
        self.max_seq_len = max_seq_len
        self.prefix_len, self.prefix_dropout = cross_attn_seq_len, cross_attn_dropout
        shape: dict[str, Any] = {
            "norm": norm,
            "ff_mult": ff_mult,
            "dropout": dropout,
            "heads": heads,
            "dim_head": dim_head,
            "kv_heads": kv_heads,
            "attention_backend": attention_backend,
        }
        self.perceive_layers = nn.ModuleList(PerceiveBlock(dim, **shape) for _ in range(perceive_depth))
        self.layers = nn.ModuleList(LatentBlock(dim, **shape) for _ in range(depth))
        self.init_weights()

    def hidden(self, tokens: Tensor, *, prefix_mask: Tensor | None = None) -> Tensor:
        """Final hidden states of the latents, (b, m, c).

        prefix_mask: (b, p) bool, True where a prefix token may be attended to.
        """
        self._check(tokens, prefix_mask)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        prefix, x = (self.token_emb(tokens) + self.pos_emb(positions)).tensor_split([self.prefix_len], dim=1)
        at, latents_at = positions.tensor_split([self.prefix_len])
        for layer in self.perceive_layers:
            kept, kept_at, kept_mask = self._drop_prefix(prefix, at, prefix_mask)
            rotary = self.rotary(torch.cat([kept_at, latents_at.expand(*kept_at.shape[:-1], -1)], dim=-1))
            key_mask = None if kept_mask is None else F.pad(kept_mask, (0, x.shape[1]), value=True)
            x = layer(x, kept, rotary, key_mask)
        rotary = self.rotary(latents_at)
        for layer in self.layers:
            x = layer(x, rotary)
        return self.norm(x)

    def _drop_prefix(
        self, prefix: Tensor, at: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The prefix, its positions and mask; in training a random part of it in order, positions (b, p')."""
        dropped = int(self.prefix_len * self.prefix_dropout)
        if not self.training or dropped == 0:
            return prefix, at, mask
        b, p, c = prefix.shape
        kept = torch.rand(b, p, device=prefix.device).argsort(dim=-1)[:, dropped:].sort(dim=-1).values
        prefix = prefix.gather(1, kept[..., None].expand(-1, -1, c))
        return prefix, kept, None if mask is None else mask.gather(1, kept)

    def _check(self, tokens: Tensor, prefix_mask: Tensor | None) -> None:
        b, n = tokens.shape
        if not self.prefix_len < n <= self.max_seq_len:
            raise ValueError(
                f"tokens: expected a length above cross_attn_seq_len={self.prefix_len} and at most "
                f"max_seq_len={self.max_seq_len}, got {n}"
            )
        if prefix_mask is not None:
            expect_mask("prefix_mask", prefix_mask, (b, self.prefix_len))
