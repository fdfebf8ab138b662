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
from palm_pytorch.layers.attention import split_heads
from palm_pytorch.layers.feedforward import swiglu
from palm_pytorch.layers.kv_cache import NO_PAST, KVCache, LayerCache
from palm_pytorch.layers.parallel import ParallelBlock
from palm_pytorch.models.inputs import usable_cache
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.ops import AlibiBias


class PaLMLiteBlock(ParallelBlock):
    """`x + attn_out(attention(q, kv, kv)) + ff_out(swiglu(value, gate))`, the four from one projection."""

    narrow = 1

    def forward(self, x: Tensor, alibi: AlibiBias, past: LayerCache = NO_PAST, **keys: Any) -> Tensor:
        """keys: key_mask and document_ids, as `attention` has them."""
        q, kv, value, gate = self.project(x)
        return x + self.out(self.attend(q, kv, alibi, past, **keys), swiglu(value, gate))

    def attend(self, q: Tensor, kv: Tensor, alibi: AlibiBias, past: LayerCache, **keys: Any) -> Tensor:
        """q (b, n, h d), kv (b, n, d) -> (b, n, h d)."""
        # Stored before the key's norm: one tensor, not two.
        q, (kv,) = split_heads(q, self.dim_head), past.append(kv.unsqueeze(1))
        return self.attention(self.q_norm(q), self.k_norm(kv), kv, bias=alibi, **keys)


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
            PaLMLiteBlock(
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
        alibi = AlibiBias(alibi_slopes(self.config["heads"], tokens.device), cache.at)
        for layer, past in zip(self.layers, cache.pasts(len(self.layers)), strict=True):
            x = layer(x, alibi, past, key_mask=key_mask, document_ids=document_ids)
        cache.advance()
        return self.norm(x)
