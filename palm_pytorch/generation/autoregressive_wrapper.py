"""Training loss and sampling for any of the models, with the arguments of older training scripts.

Shapes: b batch; n sequence length; v num_tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from palm_pytorch.generation.decode import Context, check_eos_token, draw_tokens, prefix_length, stacked
from palm_pytorch.generation.sampling import sample
from palm_pytorch.models.inputs import check_tokens
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.ops.arguments import expect_integer, expect_mask, expect_tensor


class AutoregressiveWrapper(nn.Module):
    """net: a model of this library, `net(tokens)` -> logits and `net(tokens, labels=...)` -> loss.

    max_seq_len: tokens that the net is shown at most; generation goes on past it in a sliding window. None is
    the net's own limit, or 2048 where it has none.
    pad_value: token that fills rows after their end token.
    """

    def __init__(self, net: nn.Module, max_seq_len: int | None = None, pad_value: int = 0) -> None:
        super().__init__()
        limit = getattr(net, "max_seq_len", None)
        if max_seq_len is None:
            max_seq_len = limit or 2048
        expect_integer("max_seq_len", max_seq_len)
        self.net, self.pad_value = net, pad_value
        self.max_seq_len = min(max_seq_len, limit or max_seq_len)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Mean loss of x (b, n) in nats, each token but the first predicted from those before it.

        mask: (b, n) bool, False where x is never a target, as padding on the right. Without it every token
        is one, whatever its value. It hides nothing: of padding on the left, `key_mask=mask[:, :-1]` does.
        inputs: passed to the net.
        """
        expect_tensor("x", x)
        if x.dim() != 2 or x.shape[1] < 2:
            raise ValueError(f"x: expected shape (batch, length >= 2), got {tuple(x.shape)}")
        labels = x[:, 1:]
        if mask is not None:
            expect_mask("mask", mask, tuple(x.shape))
            labels = labels.masked_fill(~mask[:, 1:], -100)
        return self.net(x[:, :-1], labels=labels, **inputs)

    def generate(
        self,
        start_tokens: Tensor,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        *,
        stride: int = 1,
        prefix_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Draws up to `seq_len` tokens after start_tokens (b, t); returns the new ones, (b, <= seq_len).

        Models of this library remember the keys and values of past tokens, as long as these fit the window.

        eos_token: a row ends with the first one that it draws (those of the prompt do not count) and is then
        filled with `pad_value`; when all rows have ended, generation stops.
        temperature, filter_thres: as in `palm_pytorch.generation.sampling.sample`.
        stride: by how many tokens a full window moves on; it is read anew then, with every token if it is 1.
        prefix_mask: (b, p), Perceiver AR's, of the first window's prefix; it moves with the tokens.
        inputs: passed to the net, which then remembers nothing.

        Raises ValueError or TypeError naming the argument that does not fit.
        """
        net, window = self.net, self.max_seq_len
        if isinstance(net, LanguageModel):
            check_tokens(start_tokens, net.config["num_tokens"], net.token_emb.weight.device, "start_tokens")
            check_eos_token(eos_token, net.config["num_tokens"])
        else:
            expect_tensor("start_tokens", start_tokens)
            if start_tokens.dim() != 2 or 0 in start_tokens.shape:
                raise ValueError(
                    "start_tokens: expected shape (batch, length), neither empty, "
                    f"got {tuple(start_tokens.shape)}"
                )
        expect_integer("seq_len", seq_len, least=0)
        latents = window - prefix_length(net)
        if latents < 1:
            raise ValueError(
                f"max_seq_len: expected more than the net's prefix of {prefix_length(net)}, got {window}"
            )
        expect_integer("stride", stride)
        if stride > latents:
            raise ValueError(f"stride: expected at most {latents}, what a window can predict, got {stride}")
        if "key_mask" in inputs:
            raise ValueError("key_mask: expected none, for the window moves; the net's own `generate` can")
        mask = None
        if prefix_mask is not None:
            mask = self._token_mask(prefix_mask, start_tokens)
        context = Context(
            net,
            start_tokens,
            mask,
            room=seq_len,
            window=window,
            stride=stride,
            use_cache=not inputs,
            **inputs,
        )
        draw = partial(sample, temperature=temperature, filter_thres=filter_thres)
        drawn = draw_tokens(context, draw, seq_len, eos_token=eos_token, pad_token=self.pad_value)
        return stacked([each.tokens for each in drawn], len(start_tokens), start_tokens)

    def _token_mask(self, prefix_mask: Tensor, tokens: Tensor) -> Tensor:
        """The mask (b, t) of all tokens, given that of the prefix of the last window among them."""
        p, first = prefix_length(self.net), max(0, tokens.shape[1] - self.max_seq_len)
        expect_mask("prefix_mask", prefix_mask, (len(tokens), p))
        if tokens.shape[1] <= p:
            raise ValueError(
                f"prefix_mask: expected more than {p} start_tokens with it, got {tokens.shape[1]}"
            )
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, first : first + p] = prefix_mask
        return mask
