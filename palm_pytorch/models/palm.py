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

from palm_pytorch.layers.attention import split_heads
from palm_pytorch.layers.feedforward import swiglu
from palm_pytorch.layers.kv_cache import NO_PAST, KVCache, LayerCache
from palm_pytorch.layers.parallel import ParallelBlock
from palm_pytorch.layers.rotary import Rotary, RotaryTable, rotate_both
from palm_pytorch.models.inputs import usable_cache
from palm_pytorch.models.language_model import LanguageModel


class PaLMBlock(ParallelBlock):
    """`x + attn_out(attention(q, k, v)) + ff_out(swiglu(value, gate))`, the five from one projection."""

    narrow = 2

    def forward(
        self, x: Tensor, rotary: tuple[RotaryTable, RotaryTable], past: LayerCache = NO_PAST, **keys: Any
    ) -> Tensor:
        """keys: key_mask and document_ids, as `attention` has them."""
        q, k, v, value, gate = self.project(x)
        return x + self.out(self.attend(q, k, v, rotary, past, **keys), swiglu(value, gate))

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
        return self.attention(q, k, v, **keys)


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
            PaLMBlock(
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
        cache = usable_cache(cache, tokens, document_ids)
        key_mask = cache.begin(key_mask, *tokens.shape)
        x = self.token_emb(tokens)
        rotary = self.rotary(cache.positions(tokens.shape[1], tokens.device), cache)
        for layer, past in zip(self.layers, cache.pasts(len(self.layers)), strict=True):
            x = layer(x, rotary, past, key_mask=key_mask, document_ids=document_ids)
        cache.advance()
        return self.norm(x)
