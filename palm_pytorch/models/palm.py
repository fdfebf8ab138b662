"""PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 2): parallel blocks, multi-query attention, rotary.

                 +--> q, k, v --> rotary --> attention --> attn_out --+
    x --> norm --+                                                    +--> (+) --> x
    |            +--> value, gate --> SwiGLU --> ff_out --------------+     ^
    +-----------------------------------------------------------------------+

Shapes: b batch; n sequence length; h heads; d head dim; c model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from palm_pytorch.layers.attention import merge_heads, split_heads
from palm_pytorch.layers.feedforward import swiglu
from palm_pytorch.layers.kv_cache import NO_CACHE, NO_PAST, KVCache, LayerCache
from palm_pytorch.layers.norm import L2Norm, make_norm
from palm_pytorch.layers.rotary import Rotary, RotaryTable, rotate_both
from palm_pytorch.models.language_model import LanguageModel, check_document_ids
from palm_pytorch.ops import attention


class ParallelBlock(nn.Module):
    """`x + attn_out(attention(q, k, v)) + ff_out(swiglu(value, gate))`, the five from one projection.

    The one key/value head serves all query heads.
    """

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
        self.widths = [heads * dim_head, dim_head, dim_head, inner, inner]
        self.norm = make_norm(norm, dim)
        self.fused_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.q_norm = L2Norm(dim_head) if qk_norm else nn.Identity()
        self.k_norm = L2Norm(dim_head) if qk_norm else nn.Identity()
        self.attn_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff_dropout = nn.Dropout(ff_dropout)
        self.ff_out = nn.Linear(inner, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[RotaryTable, RotaryTable],
        past: LayerCache = NO_PAST,
        **keys: Any,
    ) -> Tensor:
        """keys: key_mask and document_ids, as `attention` has them."""
        q, k, v, value, gate = self.fused_proj(self.norm(x)).split_with_sizes(self.widths, dim=-1)
        return x + self.out(self.attend(q, k, v, rotary, past, **keys), swiglu(value, gate))

    def out(self, attended: Tensor, inner: Tensor) -> Tensor:
        """(b, n, h d) and (b, n, ff_mult c) -> (b, n, c)."""
        return self.attn_out(attended) + self.ff_out(self.ff_dropout(inner))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[RotaryTable, RotaryTable],
        past: LayerCache,
        **keys: Any,
    ) -> Tensor:
        """q (b, n, h d), k and v (b, n, d) -> (b, n, h d)."""
        q, k, v = split_heads(q, self.dim_head), k.unsqueeze(1), v.unsqueeze(1)
        q, k = rotate_both(self.q_norm(q), self.k_norm(k), rotary)
        k, v = past.append(k, v)
        dropout_p = self.attn_dropout if self.training else 0.0
        return merge_heads(attention(q, k, v, **keys, dropout_p=dropout_p, backend=self.backend))


class PaLM(LanguageModel):
    """Decoder language model of parallel blocks; embedding and logits share their weight by default.

    num_tokens, dim, depth, heads, dim_head: vocabulary, model width, blocks, query heads and their width.
    ff_mult: inner width of the feed-forward, in multiples of dim.
    norm: "rmsnorm" or "layernorm" (without bias).  qk_norm: unit-length queries and keys with learned gains.
    xpos, xpos_scale_base: length-extrapolating decay on top of rotary (Sun et al. 2022, arXiv 2212.10554).
    attn_dropout, ff_dropout: share of attention weights and of inner feed-forward features dropped in
    training.
    embedding_std: of the embeddings at first.  logit_scale: a constant factor of the logits. The paper has 1
    and dim^-0.5.
    attention_backend: as in `palm_pytorch.ops.attention`.
    For weights of older models: final_norm=False reads logits off the un-normed stream.

    Raises ValueError or TypeError naming the argument that does not fit.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        ff_mult: int = 4,
        norm: str = "rmsnorm",
        qk_norm: bool = False,
        xpos: bool = False,
        xpos_scale_base: int = 512,
        tie_embeddings: bool = True,
        embedding_std: float = 0.02,
        logit_scale: float = 1.0,
        final_norm: bool = True,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__(locals())
        if dim_head % 2:
            raise ValueError(
                f"dim_head: rotary turns pairs of dims, so expected an even number, got {dim_head}"
            )
        self.rotary = Rotary(dim_head, xpos_scale_base=xpos_scale_base if xpos else None)
        self.layers = nn.ModuleList(
            ParallelBlock(
                dim,
                heads=heads,
                dim_head=dim_head,
                ff_mult=ff_mult,
                norm=norm,
                qk_norm=qk_norm,
                attn_dropout=attn_dropout,
                ff_dropout=ff_dropout,
                attention_backend=attention_backend,
            )
            for _ in range(depth)
        )
        self.init_weights()

    def hidden(
        self,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        check_document_ids(document_ids, tokens, cache)
        cache = cache or NO_CACHE
        key_mask = cache.begin(key_mask, *tokens.shape)
        x = self.token_emb(tokens)
        rotary = self.rotary(cache.positions(tokens.shape[1], tokens.device), cache)
        for layer, past in zip(self.layers, cache, strict=False):
            x = layer(x, rotary, past, key_mask=key_mask, document_ids=document_ids)
        cache.advance()
        return self.norm(x)
