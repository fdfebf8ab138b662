"""PaLM-lite: PaLM's parallel blocks, with ALiBi for rotary and one projection as both key and value.

                 +--> q, kv --> attention + ALiBi --> attn_out --+
    x --> norm --+                                               +--> (+) --> x
    |            +--> value, gate --> SwiGLU --> ff_out ---------+     ^
    +------------------------------------------------------------------+

Shapes: b batch; n sequence length; h heads; d head dim; c model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from palm_pytorch.layers.alibi import alibi_slopes
from palm_pytorch.layers.attention import merge_heads, split_heads
from palm_pytorch.layers.feedforward import swiglu
from palm_pytorch.layers.kv_cache import NO_CACHE, NO_PAST, KVCache, LayerCache
from palm_pytorch.layers.norm import L2Norm, make_norm
from palm_pytorch.models.language_model import LanguageModel, check_document_ids
from palm_pytorch.ops import AlibiBias, attention


class ParallelLiteBlock(nn.Module):
    """`x + attn_out(attention(q, kv, kv)) + ff_out(swiglu(value, gate))`, the four from one projection."""

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
        self.widths = [heads * dim_head, dim_head, inner, inner]
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
        alibi: AlibiBias,
        past: LayerCache = NO_PAST,
        **keys: Any,
    ) -> Tensor:
        """keys: key_mask and document_ids, as `attention` has them."""
        q, kv, value, gate = self.fused_proj(self.norm(x)).split_with_sizes(self.widths, dim=-1)
        return x + self.out(self.attend(q, kv, alibi, past, **keys), swiglu(value, gate))

    def out(self, attended: Tensor, inner: Tensor) -> Tensor:
        """(b, n, h d) and (b, n, ff_mult c) -> (b, n, c)."""
        return self.attn_out(attended) + self.ff_out(self.ff_dropout(inner))

    def attend(self, q: Tensor, kv: Tensor, alibi: AlibiBias, past: LayerCache, **keys: Any) -> Tensor:
        """q (b, n, h d), kv (b, n, d) -> (b, n, h d)."""
        # Stored before the key's norm: one tensor, not two.
        q, (kv,) = split_heads(q, self.dim_head), past.append(kv.unsqueeze(1))
        out = attention(
            self.q_norm(q),
            self.k_norm(kv),
            kv,
            bias=alibi,
            **keys,
            dropout_p=self.attn_dropout if self.training else 0.0,
            backend=self.backend,
        )
        return merge_heads(out)


class PaLMLite(LanguageModel):
    """Decoder language model of parallel blocks with ALiBi (Press et al. 2022, arXiv 2108.12409).

    Arguments as for `PaLM`, less those of rotary. For weights of older models: norm "rmsnorm-clamped".

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
        tie_embeddings: bool = True,
        embedding_std: float = 0.02,
        logit_scale: float = 1.0,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__(locals())
        self.layers = nn.ModuleList(
            ParallelLiteBlock(
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
        alibi = AlibiBias(alibi_slopes(self.config["heads"], tokens.device), cache.at)
        for layer, past in zip(self.layers, cache, strict=False):
            x = layer(x, alibi, past, key_mask=key_mask, document_ids=document_ids)
        cache.advance()
        return self.norm(x)
