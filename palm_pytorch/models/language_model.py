"""What the four models have in common: token embedding, final norm, logits or loss, checks of their input.

Shapes: b batch; n sequence length; c model width; v num_tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_pytorch.layers.kv_cache import KVCache
from palm_pytorch.layers.norm import make_norm
from palm_pytorch.models.config import read_config
from palm_pytorch.models.inputs import check_tokens
from palm_pytorch.ops import linear_cross_entropy
from palm_pytorch.ops.arguments import expect_tensor
from palm_pytorch.ops.cross_entropy import cross_entropy

M = TypeVar("M", bound="LanguageModel")


class LanguageModel(nn.Module):
    """Base of the models. A subclass builds its layers and defines `hidden`.

    config: its constructor arguments; `type(model)(**model.config)` builds the same shape again.
    layers: its blocks, each of which keeps what a cache stores.
    """

    layers: nn.ModuleList

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = read_config(config)
        num_tokens, dim = config["num_tokens"], config["dim"]
        self.token_emb = nn.Embedding(num_tokens, dim)
        # `final_norm` and `bias` are options of the models whose older kin had none, or had it.
        self.norm = make_norm(config["norm"], dim) if config.get("final_norm", True) else nn.Identity()
        bias = config.get("bias", False)
        self.to_logits = None if config["tie_embeddings"] else nn.Linear(dim, num_tokens, bias=bias)

    @property
    def head_weight(self) -> Tensor:
        """(v, c), maps hidden states to logits. Tied models have no second tensor that could come apart."""
        return self.token_emb.weight if self.to_logits is None else self.to_logits.weight

    @property
    def head_bias(self) -> Tensor | None:
        """(v,), or None: only an untied head can have one."""
        return None if self.to_logits is None else self.to_logits.bias

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialises every parameter, also after `to_empty` of a model built on the meta device.

        Kernels are normal with variance 1 / fan-in (PaLM, arXiv 2204.02311, section 5), so that a layer
        keeps the scale of its input; embeddings are normal with std `embedding_std`, by default 0.02 (GPT-2),
        so that tied logits start near zero; gains are one (of `qk_norm`: see `L2Norm`), biases zero. PaLM's
        own embeddings have std 1, and a `logit_scale` of dim^-0.5 does for its logits what the small std does
        here.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config["embedding_std"])
            elif callable(reset := getattr(module, "reset_parameters", None)):  # norms and bias tables
                reset()

    @abstractmethod
    def hidden(
        self,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Final hidden states, normed: (b, n, c), or of the last positions only.

        key_mask: (b, n) bool, True where a token may be attended to; None for everywhere.
        document_ids: (b, n) integers; a token attends only to those that bear the same; None for all. Not
        with a cache.
        cache: of `new_cache`; tokens come after those it holds, attend to them too, and are added to it.
        """

    def new_cache(self, capacity: int = 256) -> KVCache:
        """An empty cache for `model(tokens, cache=cache)`, with room for `capacity` tokens at first."""
        return KVCache(len(self.layers), capacity)

    def forward(
        self,
        tokens: Tensor,
        *,
        labels: Tensor | None = None,
        ignore_index: int = -100,
        z_loss: float = 0.0,
        last_only: bool = False,
        **inputs: Any,
    ) -> Tensor:
        """Logits (b, n, v) of tokens (b, n); with labels (b, n), their mean cross-entropy in nats, a scalar.

        Label `[.., t]` is what position t must predict; `ignore_index` marks labels that do not count.
        z_loss: weight of PaLM's auxiliary loss `log(Z)^2` (arXiv 2204.02311, section 5).
        With labels, logits are never held all at once, unless they are more than the product with a weight:
        those of a subclass's `logits`, of another module as head, or of one with hooks.
        last_only: logits of the last position alone, (b, 1, v).
        inputs: of the model's `hidden`.
        """
        check_tokens(tokens, self.config["num_tokens"], self.token_emb.weight.device)
        if labels is not None:
            if last_only:
                raise ValueError("last_only: expected False with labels, whose loss is of all positions")
            expect_tensor("labels", labels)
            if labels.shape != tokens.shape:
                shapes = f"{tuple(tokens.shape)}, got {tuple(labels.shape)}"
                raise ValueError(f"labels: expected the shape of tokens, {shapes}")
        hidden = self.hidden(tokens, **inputs)
        if labels is None:
            return self.logits(hidden[:, -1:] if last_only else hidden)
        labels = labels[:, -hidden.shape[1] :]
        if not self.head_is_linear:
            return cross_entropy(self.logits(hidden), labels, ignore_index, z_loss)
        return linear_cross_entropy(
            self._scaled(hidden),
            self.head_weight,
            labels,
            bias=self.head_bias,
            ignore_index=ignore_index,
            z_loss=z_loss,
        )

    @property
    def head_is_linear(self) -> bool:
        """Whether logits are a product with `head_weight` and no more, as long as nobody has put something
        else there: a `logits` of one's own, another module, hooks, a weight that is no plain tensor."""
        if type(self).logits is not LOGITS or "logits" in self.__dict__:
            return False
        if (head := self.to_logits) is not None:
            if type(head).forward is not nn.Linear.forward or "forward" in head.__dict__:
                return False
            before, after = head._forward_pre_hooks, head._forward_hooks
            if before or after or head._backward_pre_hooks or head._backward_hooks:
                return False
        return type(self.head_weight) in (Tensor, nn.Parameter)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (.., c) -> (.., v)."""
        return self._head(self._scaled(hidden))

    def _scaled(self, hidden: Tensor) -> Tensor:
        scale = self.config["logit_scale"]
        return hidden if scale == 1 else hidden * scale

    def _head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.head_weight) if self.to_logits is None else self.to_logits(hidden)

    if TYPE_CHECKING:
        # `palm_pytorch.generation` stands above the models, and gives them these.
        def generate(self, prompt: Tensor, max_new_tokens: int, **options: Any) -> Any: ...
        def stream(self, prompt: Tensor, max_new_tokens: int, **options: Any) -> Iterator[Tensor]: ...

        # And `palm_pytorch.checkpoints` these.
        @classmethod
        def from_pretrained(
            cls: type[M],
            folder_or_hub_id: str | Path,
            *,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            revision: str | None = None,
            **config: Any,
        ) -> M: ...
        def save_pretrained(
            self, folder: str | Path, *, tokenizer: Any = None, max_shard_size: int = ...
        ) -> None: ...
        def push_to_hub(self, repo_id: str, *, tokenizer: Any = None, **options: Any) -> str: ...


LOGITS = LanguageModel.logits  # as it is here, whatever somebody makes of the class
