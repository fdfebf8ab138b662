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

Sequences that are read whole, as pictures, are a window each, of which a Perceiver AR does not predict what
is in its prefix, as in training.

Shapes: b windows; n = seq_len; p prefix of a Perceiver AR, 0 for the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from palm_pytorch.data.arrays import WholeSequences
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
        ValueError: stride is out of its range, or there is nothing to predict.
    """

    num_positions: int
    seq_len: int
    stride: int
    prefix_len: int = 0

    def __post_init__(self) -> None:
        if self.num_positions < 1:
            raise ValueError("the text is too short; expected at least two tokens, one of them to predict")
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


@dataclass(frozen=True)
class Reading:
    """A text in windows, in which each token that counts is predicted once.

    Attributes:
        held_out: the text, in which nothing counts that is not predicted.
        stride: by which windows move on; None where they are whole sequences.
        count: of windows.
        length: of each, in tokens.
        batches: the windows, to be read once.
    """

    held_out: HeldOut
    stride: int | None
    count: int
    length: int
    batches: Iterable[Batch]

    def __str__(self) -> str:
        placed = "a whole sequence each" if self.stride is None else f"{self.stride:,} apart"
        cost = self.count * self.length / self.held_out.num_labels
        return (
            f"{self.count:,} of {self.length:,} tokens, {placed}: {cost:.1f} tokens go through the model for "
            "each that is scored"
        )


def read_all(
    held_out: HeldOut, *, seq_len: int, stride: int | None, batch_size: int, prefix_len: int = 0
) -> Reading:
    """All of a text in windows: sliding ones, or its sequences if these are whole.

    stride: by default half of what a window predicts; whole sequences have none.
    prefix_len: tokens at the start of a window at which a Perceiver AR predicts nothing.

    Raises:
        ValueError: as `SlidingWindows`; or there is a stride where there is none to be.
    """
    if isinstance(held_out, WholeSequences):
        if stride is not None:
            raise ValueError(f"stride is {stride}; expected none for sequences, which are read whole")
        held_out = without_prefix(held_out, prefix_len)
        count = len(held_out.positions(seq_len))
        return Reading(held_out, None, count, seq_len, held_out.batches(seq_len, batch_size))
    stride = stride or max(1, (seq_len - prefix_len) // 2)
    windows = SlidingWindows(len(held_out.tokens) - 1, seq_len, stride, prefix_len)
    return Reading(held_out, stride, len(windows), windows.length, slide(held_out, windows, batch_size))


def without_prefix(held_out: WholeSequences, prefix_len: int) -> WholeSequences:
    """The same sequences, of which only what comes after a Perceiver AR's prefix counts."""
    counts = np.ones((len(held_out.tokens) // held_out.length, held_out.length), bool)
    counts[:, : prefix_len + 1] = False  # the token that begins a sequence never does
    return replace(held_out, counts=counts.reshape(-1), num_bytes=int(counts.sum()))


def slide(held_out: HeldOut, windows: SlidingWindows, batch_size: int) -> Iterator[Batch]:
    """The windows in order; the last batch may have fewer."""
    for start in range(0, len(windows), batch_size):
        yield read_windows(held_out, windows, range(start, min(start + batch_size, len(windows))))


def read_windows(held_out: HeldOut, windows: SlidingWindows, indices: range) -> Batch:
    """The given windows as a batch, with only the labels that count."""
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
    seen = torch.arange(windows.prefix_len) >= torch.tensor(hidden)[:, None] if any(hidden) else None
    ids = torch.cat(documents) if documents else None
    return Batch(torch.cat(tokens), torch.cat(labels), ids, seen)


@torch.no_grad()
def score(model: LanguageModel, reading: Reading, precision: torch.dtype = torch.float32) -> Score:
    """Score all of a text under a progress bar; the model's mode is restored.

    The result does not depend on the size of batches, but for the rounding of the model's own products.

    Raises:
        KeyboardInterrupt: as it came, with a note of how much was done.
    """
    expected, device = reading.held_out.num_labels, model.token_emb.weight.device
    was_training = model.training
    total, counted = 0.0, 0
    bar: Any = tqdm(total=expected, unit="token", unit_scale=True, dynamic_ncols=True, leave=False)
    model.eval()
    try:
        with bar:
            for batch in reading.batches:
                loss, labels = nats(model, batch.to(device), precision)
                total, counted = total + loss, counted + labels
                bar.update(labels)
                bar.set_postfix_str(f"{total / math.log(2) / max(1, counted):.4f} bits per token", False)
    except KeyboardInterrupt as interrupt:
        interrupt.args = (f"{counted:,} of {expected:,} tokens were scored, and nothing written",)
        raise
    finally:
        model.train(was_training)
    return Score(total, counted, reading.held_out.num_bytes)
