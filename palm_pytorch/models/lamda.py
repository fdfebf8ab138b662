"""LaMDA (Thoppilan et al. 2022, arXiv 2201.08239, section 3): T5 relative bias, gated-GELU feed-forward.

    x --> norm --> attention + T5 bias --> (+) --> norm --> GEGLU feed-forward --> (+) --> x
    |                                       ^ |                                     ^
    +---------------------------------------+ +-------------------------------------+

Shapes: b batch; n sequence length; h heads; d head dim; c model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from palm_pytorch.layers.attention import MultiQueryAttention
from palm_pytorch.layers.feedforward import GEGLU, FeedForward
from palm_pytorch.layers.kv_cache import NO_PAST, KVCache, LayerCache
from palm_pytorch.layers.norm import make_norm
from palm_pytorch.layers.relative_bias import T5RelativeBias
from palm_pytorch.models.inputs import usable_cache
from palm_pytorch.models.language_model import LanguageModel


class LaMDABlock(nn.Module):
    """Attention, then feed-forward, each on the norm of its input; every block has its own bias table."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        dim_head: int,
        kv_heads: int,
        ff_mult: int,
        dropout: float,
        num_buckets: int,
        max_distance: int,
        norm: str,
        bias: bool,
        attention_backend: str,
    ) -> None:
        super().__init__()
        self.attn_norm = make_norm(norm, dim)
        self.relative_bias = T5RelativeBias(heads, num_buckets, max_distance, scale=dim_head**0.5)
        self.attn = MultiQueryAttention(
            dim,
            heads=heads,
            dim_head=dim_head,
            kv_heads=kv_heads,
            dropout=dropout,
            out_bias=bias,
            attention_backend=attention_backend,
        )
        self.ff_norm = make_norm(norm, dim)
        self.ff = FeedForward(dim, ff_mult, GEGLU, dropout, bias)

    def forward(self, x: Tensor, past: LayerCache = NO_PAST, **keys: Any) -> Tensor:
        """keys: key_mask and document_ids, as `MultiQueryAttention` has them."""
        x = x + self.attn(self.attn_norm(x), bias=self.relative_bias(past.at), past=past, **keys)
        return x + self.ff(self.ff_norm(x))


class LaMDA(LanguageModel):
    """Decoder language model with learned relative positions.

    num_tokens, dim, depth, heads, dim_head: vocabulary, model width, blocks, query heads and their width.
    kv_heads: key/value heads, a divisor of heads; one by default, `heads` for the paper's full multi-head
    attention.
    ff_mult: inner width of the feed-forward, in multiples of dim.
    dropout: share of attention weights and of inner feed-forward features dropped in training.
    num_buckets, max_distance: of the T5 relative bias.  norm: "rmsnorm" or "layernorm" (without bias).
    embedding_std, logit_scale: as of `PaLM`.
    attention_backend: as in `palm_pytorch.ops.attention`.
    For weights of older models: bias, in the feed-forward, after attention and in an untied head; norm
    "layernorm-biased".

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
        kv_heads: int = 1,
        ff_mult: int = 4,
        dropout: float = 0.0,
        num_buckets: int = 32,
        max_distance: int = 128,
        norm: str = "rmsnorm",
        tie_embeddings: bool = True,
        embedding_std: float = 0.02,
        logit_scale: float = 1.0,
        bias: bool = False,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__(locals())
        self.layers = nn.ModuleList(
            LaMDABlock(
                dim,
                heads=heads,
                dim_head=dim_head,
                kv_heads=kv_heads,
                ff_mult=ff_mult,
                dropout=dropout,
                num_buckets=num_buckets,
                max_distance=max_distance,
                norm=norm,
                bias=bias,
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
        for layer, past in zip(self.layers, cache.pasts(len(self.layers)), strict=True):
            x = layer(x, past, key_mask=key_mask, document_ids=document_ids)
        cache.advance()
        return self.norm(x)

    if TYPE_CHECKING:
        # `palm_pytorch.generation` gives it this.
        def sample_and_rank(self, prompt: Tensor, max_new_tokens: int, **options: Any) -> Any: ...
