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
from palm_pytorch.layers.feedforward import FeedForward, SwiGLU
from palm_pytorch.layers.kv_cache import KVCache
from palm_pytorch.layers.norm import make_norm
from palm_pytorch.layers.prefix_dropout import PrefixDropout
from palm_pytorch.layers.rotary import Rotary
from palm_pytorch.models.inputs import usable_cache
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.ops.arguments import expect_integer, expect_mask


class PerceiveBlock(nn.Module):
    """Latents attend causally to the prefix and to themselves, then go through a feed-forward."""

    def __init__(self, dim: int, *, norm: str, dropout: float, ff: dict[str, Any], **attention: Any) -> None:
        super().__init__()
        self.attn_norm, self.prefix_norm, self.ff_norm = (make_norm(norm, dim) for _ in range(3))
        self.attn = MultiQueryAttention(dim, dropout=dropout, **attention)
        self.ff = FeedForward(dim, dropout=dropout, **ff)

    def forward(self, x: Tensor, prefix: Tensor, **keys: Any) -> Tensor:
        """keys: as `MultiQueryAttention` has them."""
        x = x + self.attn(self.attn_norm(x), self.prefix_norm(prefix), **keys)
        return x + self.ff(self.ff_norm(x))


class LatentBlock(nn.Module):
    """Causal self-attention of the latents, then a feed-forward."""

    def __init__(self, dim: int, *, norm: str, dropout: float, ff: dict[str, Any], **attention: Any) -> None:
        super().__init__()
        self.attn_norm, self.ff_norm = (make_norm(norm, dim) for _ in range(2))
        self.attn = MultiQueryAttention(dim, dropout=dropout, **attention)
        self.ff = FeedForward(dim, dropout=dropout, **ff)

    def forward(self, x: Tensor, **keys: Any) -> Tensor:
        """keys: as `MultiQueryAttention` has them."""
        x = x + self.attn(self.attn_norm(x), **keys)
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
    cross_attn_dropout: share of the prefix left out in training, anew for each row and layer that sees it.
    ff_mult: inner width of the feed-forward, in multiples of dim.  norm: "rmsnorm" or bias-less "layernorm".
    embedding_std, logit_scale: as of `PaLM`.
    attention_backend: as in `palm_pytorch.ops.attention`.
    For weights of older models: norm "layernorm-biased"; final_norm=False; gated=False, a GELU feed-forward;
    prefix_bias, after attention to the prefix.

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
        embedding_std: float = 0.02,
        logit_scale: float = 1.0,
        final_norm: bool = True,
        gated: bool = True,
        prefix_bias: bool = False,
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
        self.prefix_len, self.drop_prefix = cross_attn_seq_len, PrefixDropout(cross_attn_dropout)
        shape: dict[str, Any] = {"heads": heads, "dim_head": dim_head, "kv_heads": kv_heads}
        shape |= {"norm": norm, "dropout": dropout, "attention_backend": attention_backend}
        shape["ff"] = {"ff_mult": ff_mult, "activation": SwiGLU if gated else nn.GELU}
        self.perceive_layers = nn.ModuleList(
            PerceiveBlock(dim, out_bias=prefix_bias, **shape) for _ in range(perceive_depth)
        )
        self.layers = nn.ModuleList(LatentBlock(dim, **shape) for _ in range(depth))
        self.init_weights()

    def hidden(
        self,
        tokens: Tensor,
        *,
        prefix_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Final hidden states of the latents, (b, m, c).

        prefix_mask: (b, p) bool, True where a prefix token may be attended to.
        key_mask: (b, n) bool, that of all tokens instead. Latents that may not be are padding on the left:
        the positions of a row begin with its first latent.
        document_ids: (b, n), as of the others. Positions are counted along the row, not in each document.
        cache: the first call with it brings the prefix, each further one the latents behind those it holds.
        """
        whole, cache = cache is not None, usable_cache(cache, tokens, document_ids)
        self._check(tokens, prefix_mask, cache, masked=key_mask is not None)
        (b, n), p = tokens.shape, 0 if cache.length else self.prefix_len
        padded = key_mask is not None or cache.mask is not None
        if prefix_mask is not None:
            key_mask = F.pad(prefix_mask, (0, n - p), value=True)
        key_mask = cache.begin(key_mask, b, n)
        at, latents_at = cache.positions(n, tokens.device).tensor_split([p])
        latent_mask = None
        if padded and key_mask is not None:
            latent_mask = key_mask[:, self.prefix_len :]
            counted = latent_mask.cumsum(dim=-1)[:, p - n :]
            latents_at = self.prefix_len - 1 + counted.clamp(min=1)
        prefix, x = self.token_emb(tokens).tensor_split([p], dim=1)
        prefix, x = prefix + self.pos_emb(at), x + self.pos_emb(latents_at)
        pasts = cache.pasts(len(self.perceive_layers) + len(self.layers))
        for layer, past in zip(self.perceive_layers, pasts[: len(self.perceive_layers)], strict=True):
            kept, kept_at, (seen, ids) = self.drop_prefix(prefix, at, key_mask, document_ids, whole=whole)
            rows = torch.broadcast_shapes(kept_at.shape[:-1], latents_at.shape[:-1])
            every = torch.cat([kept_at.expand(*rows, -1), latents_at.expand(*rows, -1)], dim=-1)
            x = layer(x, kept, rotary=self.rotary(every), key_mask=seen, document_ids=ids, past=past)
        rotary = self.rotary(latents_at)
        latent_ids = None if document_ids is None else document_ids[:, p:]
        for layer, past in zip(self.layers, pasts[len(self.perceive_layers) :], strict=True):
            x = layer(x, rotary=rotary, key_mask=latent_mask, document_ids=latent_ids, past=past)
        cache.advance()
        return self.norm(x)

    def _check(self, tokens: Tensor, prefix_mask: Tensor | None, cache: KVCache, *, masked: bool) -> None:
        b, n = tokens.shape
        if not self.prefix_len < cache.length + n <= self.max_seq_len:
            raise ValueError(
                f"tokens: expected a length above cross_attn_seq_len={self.prefix_len} and at most "
                f"max_seq_len={self.max_seq_len}, got {cache.length + n}"
            )
        if prefix_mask is not None:
            expect_mask("prefix_mask", prefix_mask, (b, self.prefix_len))
            if cache.length or masked:
                raise ValueError("prefix_mask: the cache or key_mask holds it already, so expected None")

    def new_cache(self, capacity: int = 256) -> KVCache:
        """As of the others, but that nothing goes past max_seq_len, and that the latents' layers hold no
        prefix.
        """
        capacity = min(max(capacity, self.prefix_len + 1), self.max_seq_len)
        cache = KVCache(len(self.perceive_layers) + len(self.layers), capacity)
        for layer in cache.layers[len(self.perceive_layers) :]:
            layer.capacity = capacity - self.prefix_len
        return cache
