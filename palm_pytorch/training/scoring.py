"""The score of a whole text: every token predicted exactly once, from a context that slides along.

A window of `seq_len` tokens advances by `stride`, and of each only the last `stride` predictions count: they
are those with the longest context. The first window has nothing before it, and all of its predictions count.

    stride 2, seq_len 5:   predicts  . = not counted
        tokens  a b c d e f g h i
                [a b c d e]             b c d e f
                    [c d e f g]         . . . g h
                      [d e f g h]       . . . . i      the last one is moved back, so as to be full

A smaller stride gives each token more context, at least `seq_len - stride + 1` tokens of it, and costs
`seq_len / stride` tokens through the model for each token that is scored. A Perceiver AR predicts at its
latents alone, so its stride is at most their number; its first windows have no prefix yet, or half of one,
and are padded on the left with tokens that it cannot see.

Shapes: b windows; n = seq_len; p prefix of a Perceiver AR, 0 for the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from palm_pytorch.data.batch import IGNORED, Batch, HeldOut
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.training.evaluate import bits_per_byte, nats


@dataclass(frozen=True)
class Score:
    """What a model made of a text: the sum of its losses in nats, over how many tokens, and which text.

    num_bytes: of the text that these tokens stand for.
    """

    nats: float
    num_labels: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nats / self.num_bytes)

    @property
    def perplexity(self) -> float:
        """Per token (infinite where a float cannot hold it)."""
        mean = self.nats / self.num_labels
        return math.exp(mean) if mean < 700 else math.inf


class Window(NamedTuple):
    """The tokens before `end`, as many as there is room for; predictions count from position `first` on."""

    first: int
    end: int


@dataclass(frozen=True)
class SlidingWindows:
    """The windows of a text whose positions 0 to `num_positions - 1` each predict the next token.

    Raises:
        ValueError: stride or seq_len is out of its range, or there is nothing to predict.
    """

    num_positions: int
    seq_len: int
    stride: int
    prefix_len: int = 0

    def __post_init__(self) -> None:
        if self.num_positions < 1:
            raise ValueError("the text is too short; expected at least two tokens, one of them to predict")
        if self.seq_len <= self.prefix_len:
            raise ValueError(
                f"seq_len is {self.seq_len}; expected more than the prefix of {self.prefix_len} tokens, at "
                "which nothing is predicted"
            )
        predicting = self.seq_len - self.prefix_len
        if not 1 <= self.stride <= predicting:
            latents = f", the {predicting} latents" if self.prefix_len else ""
            raise ValueError(
                f"stride is {self.stride}; expected 1 to {predicting}{latents}, or tokens would be left out"
            )

    @property
    def positions(self) -> int:
        """At most how many positions of a window predict; a text may be shorter than that."""
        return min(self.seq_len - self.prefix_len, self.num_positions)

    @property
    def length(self) -> int:
        """Tokens in a window, the same for all."""
        return self.prefix_len + self.positions

    def __len__(self) -> int:
        return 1 + -(-(self.num_positions - self.positions) // self.stride)

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < len(self):
            raise IndexError(index)
        last = self.positions + index * self.stride
        first = last - self.stride if index else 0
        return Window(first, min(last, self.num_positions))

    @property
    def cost(self) -> float:
        """Tokens that go through the model for each one that is scored."""
        return len(self) * self.length / self.num_positions


def read_windows(
    held_out: HeldOut, windows: SlidingWindows, indices: range
) -> tuple[Batch, dict[str, Tensor]]:
    """The given windows as a batch, with only the labels that count, and what else the model needs."""
    tokens, labels, documents, hidden = [], [], [], []
    for index in indices:
        first, end = windows[index]
        start = max(0, end - windows.length)
        row, padding = held_out.batch([start], end - start), windows.length - (end - start)
        counted_before = torch.arange(start, end) < first
        tokens.append(F.pad(row.tokens, (padding, 0)))
        labels.append(F.pad(row.labels.masked_fill(counted_before, IGNORED), (padding, 0), value=IGNORED))
        hidden.append(padding)
        if row.document_ids is not None:
            documents.append(F.pad(row.document_ids, (padding, 0), value=-1))
    batch = Batch(torch.cat(tokens), torch.cat(labels), torch.cat(documents) if documents else None)
    if not any(hidden):
        return batch, {}
    seen = torch.arange(windows.prefix_len) >= torch.tensor(hidden)[:, None]
    return batch, {"prefix_mask": seen}


@torch.no_grad()
def score(
    model: LanguageModel,
    held_out: HeldOut,
    *,
    seq_len: int,
    stride: int,
    batch_size: int,
    precision: torch.dtype = torch.float32,
) -> Score:
    """Score all of `held_out` with sliding context, under a progress bar; the model's mode is restored.

    The result does not depend on `batch_size`, but for the rounding of the model's own products.

    Raises:
        ValueError: as `SlidingWindows`.
        KeyboardInterrupt: as it came, with a note of how much was done.
    """
    prefix_len = getattr(model, "prefix_len", 0)
    windows = SlidingWindows(len(held_out.tokens) - 1, seq_len, stride, prefix_len)
    device = model.token_emb.weight.device
    was_training = model.training
    total, counted = 0.0, 0
    bar: Any = tqdm(total=held_out.num_labels, unit="token", unit_scale=True, dynamic_ncols=True, leave=False)
    model.eval()
    try:
        with bar:
            for start in range(0, len(windows), batch_size):
                indices = range(start, min(start + batch_size, len(windows)))
                batch, inputs = read_windows(held_out, windows, indices)
                inputs = {name: mask.to(device) for name, mask in inputs.items()}
                loss, labels = nats(model, batch.to(device), precision, **inputs)
                total, counted = total + loss, counted + labels
                bar.update(labels)
                bar.set_postfix_str(f"{total / math.log(2) / max(1, counted):.4f} bits per token", False)
    except KeyboardInterrupt as interrupt:
        interrupt.args = (f"{counted:,} of {held_out.num_labels:,} tokens were scored, and nothing written",)
        raise
    finally:
        model.train(was_training)
    return Score(total, counted, held_out.num_bytes)
