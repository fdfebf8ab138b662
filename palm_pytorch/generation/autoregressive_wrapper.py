"""Training loss and plain sampling for any of the models, with the arguments of older training scripts.

Shapes: b batch; n sequence length; v num_tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from palm_pytorch.generation.sampling import sample
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

        mask: (b, n) bool, False where x is padding, which is then never a target. Without it every token is
        one, whatever its value.
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

    @torch.no_grad()
    def generate(
        self,
        start_tokens: Tensor,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        **inputs: Any,
    ) -> Tensor:
        """Draws up to `seq_len` tokens after start_tokens (b, t); returns the new ones, (b, <= seq_len).

        eos_token: a row ends with the first one that it draws (those of the prompt do not count) and is
        then filled with
        `pad_value`; when all rows have ended, generation stops.
        temperature, filter_thres: as in `palm_pytorch.generation.sampling.sample`.
        inputs: passed to the net.

        Raises ValueError or TypeError naming the argument that does not fit.
        """
        expect_tensor("start_tokens", start_tokens)
        if start_tokens.dim() != 2 or 0 in start_tokens.shape:
            raise ValueError(
                "start_tokens: expected shape (batch, length), neither empty, "
                f"got {tuple(start_tokens.shape)}"
            )
        expect_integer("seq_len", seq_len, least=0)
        modes = {module: module.training for module in self.net.modules()}
        self.net.eval()
        try:
            tokens, written = start_tokens, start_tokens.new_empty(len(start_tokens), 0)
            ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
            for _ in range(seq_len):
                logits = self.net(tokens[:, -self.max_seq_len :], **inputs)[:, -1]
                drawn = sample(logits, temperature=temperature, filter_thres=filter_thres)
                drawn = drawn.to(tokens.dtype)[:, None]
                # The net goes on seeing what it drew: a pad value need not be a token.
                tokens = torch.cat([tokens, drawn], dim=1)
                written = torch.cat([written, drawn.masked_fill(ended[:, None], self.pad_value)], dim=1)
                if eos_token is not None:
                    ended |= drawn[:, 0] == eos_token
                    if ended.all():
                        break
            return written
        finally:
            for module, training in modes.items():
                module.training = training
