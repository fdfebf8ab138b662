"""What the four models have in common: token embedding, final norm, logits or loss, checks of their input.

Shapes: b batch; n sequence length; c model width; v num_tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_pytorch.layers.norm import L2Norm, LayerNorm, RMSNorm, make_norm
from palm_pytorch.layers.relative_bias import T5RelativeBias
from palm_pytorch.ops import linear_cross_entropy
from palm_pytorch.ops.arguments import expect_integer, expect_number, expect_tensor
from palm_pytorch.ops.attention import check_backend


class LanguageModel(nn.Module):
    """Base of the models. A subclass builds its layers and defines `hidden`.

    config: its constructor arguments; `type(model)(**model.config)` builds the same shape again.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = {name: value for name, value in config.items() if name not in ("self", "__class__")}
        check_config(self.config)
        num_tokens, dim = config["num_tokens"], config["dim"]
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.norm = make_norm(config["norm"], dim)
        self.to_logits = None if config["tie_embeddings"] else nn.Linear(dim, num_tokens, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(v, c), maps hidden states to logits. Tied models have no second tensor that could come apart."""
        return self.token_emb.weight if self.to_logits is None else self.to_logits.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialises every parameter, also after `to_empty` of a model built on the meta device.

        Kernels are normal with variance 1 / fan-in (PaLM, arXiv 2204.02311, section 5), so that a layer
        keeps the scale of its input; embeddings are normal with std 0.02 (GPT-2), so that tied logits start
        near zero; gains are one.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, RMSNorm | LayerNorm | L2Norm | T5RelativeBias):
                module.reset_parameters()

    @abstractmethod
    def hidden(self, tokens: Tensor) -> Tensor:
        """Final hidden states, normed: (b, n, c), or of the last positions only."""

    def forward(
        self,
        tokens: Tensor,
        *,
        labels: Tensor | None = None,
        ignore_index: int = -100,
        z_loss: float = 0.0,
        **inputs: Any,
    ) -> Tensor:
        """Logits (b, n, v) of tokens (b, n); with labels (b, n), their mean cross-entropy in nats, a scalar.

        Label `[.., t]` is what position t must predict; `ignore_index` marks labels that do not count.
        z_loss: weight of PaLM's auxiliary loss `log(Z)^2` (arXiv 2204.02311, section 5).
        With labels, logits are never held all at once.
        """
        check_tokens(tokens, self.config["num_tokens"], self.token_emb.weight.device)
        if labels is not None:
            expect_tensor("labels", labels)
            if labels.shape != tokens.shape:
                shapes = f"{tuple(tokens.shape)}, got {tuple(labels.shape)}"
                raise ValueError(f"labels: expected the shape of tokens, {shapes}")
        hidden = self.hidden(tokens, **inputs)
        if labels is None:
            return F.linear(hidden, self.head_weight)
        labels = labels[:, -hidden.shape[1] :]
        return linear_cross_entropy(
            hidden, self.head_weight, labels, ignore_index=ignore_index, z_loss=z_loss
        )


def check_config(config: dict[str, Any]) -> None:
    """Refuses constructor arguments that no model can be built with."""
    for name in ("num_tokens", "dim", "depth", "heads", "dim_head", "ff_mult", "kv_heads", "perceive_depth"):
        expect_integer(name, config.get(name, 1))
    for name, value in config.items():
        if "dropout" in name:
            expect_number(name, value, least=0, below=1)
    check_backend(config["attention_backend"])


def check_tokens(tokens: Tensor, num_tokens: int, device: torch.device) -> None:
    """Refuses what is no batch of token ids; values are read on the CPU only: it stalls others."""
    expect_tensor("tokens", tokens)
    if tokens.dtype not in (torch.long, torch.int):
        raise TypeError(f"tokens: expected torch.long or torch.int, got {tokens.dtype}")
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens: expected shape (batch, length), neither empty, got {tuple(tokens.shape)}")
    if tokens.device != device:
        raise ValueError(f"tokens: expected the model's device {device}, got {tokens.device}")
    if device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < num_tokens:
        found = f"from {int(tokens.min())} to {int(tokens.max())}"
        raise ValueError(f"tokens: expected ids in [0, {num_tokens}), got ids {found}")
