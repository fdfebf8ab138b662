"""What a step reads and what a model is scored on: batches, data sets, and the tokens held out of training.

Shapes: b sequences (rows) of n tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # a label that does not count; PyTorch's own number for it


class Batch(NamedTuple):
    """Sequences and what each of their positions must predict.

    Attributes:
        tokens: `(b, n)` int64.
        labels: `(b, n)` int64; `IGNORED` where nothing is to be predicted.
        document_ids: `(b, n)` int64, equal for tokens of one document, counted from 0 in each row; None where
            attention may reach across the whole row.
        prefix_mask: `(b, p)` bool, True for tokens of a Perceiver AR's prefix that may be attended to; None
            for all.
    """

    tokens: Tensor
    labels: Tensor
    document_ids: Tensor | None = None
    prefix_mask: Tensor | None = None

    @classmethod
    def of_windows(cls, windows: Tensor) -> Batch:
        """Windows `(b, n + 1)` of running text: each token but the first is predicted."""
        return cls(windows[:, :-1], windows[:, 1:])

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """The same batch on a device."""
        return Batch._make(None if t is None else t.to(device, non_blocking=non_blocking) for t in self)


@dataclass(frozen=True)
class HeldOut:
    """Text that is never trained on, as one stream of tokens.

    Attributes:
        tokens: `(length,)` of any integer type, often a memory map.
        num_bytes: how many bytes of text `tokens[1:]`, its labels, stand for. An end token stands for none.
        ends: `(documents,)`, rising: where each document ends, its end token included; None where the stream
            is one text, or attention may reach across documents.
        counts: `(length,)` bool: which tokens are to be predicted, as the responses of a dialog; None: all.
    """

    tokens: np.ndarray
    num_bytes: int
    ends: np.ndarray | None = None
    counts: np.ndarray | None = None

    @property
    def num_labels(self) -> int:
        """How many tokens are to be predicted: all that count, but the first of the stream or document.

        A mean loss in nats per label is, in bits per byte, `loss / ln 2 * num_labels / num_bytes`.
        """
        if self.ends is None:
            return len(self.tokens) - 1 if self.counts is None else int(self.counts[1:].sum())
        starts = np.concatenate([[0], self.ends[self.ends < len(self.tokens)]])
        if self.counts is None:
            return len(self.tokens) - len(starts)
        return int(self.counts.sum()) - int(self.counts[starts].sum())

    def positions(self, seq_len: int, max_windows: int | None = None) -> np.ndarray:
        """Where windows of `seq_len` tokens start: as many as fit, but at most `max_windows`, evenly spread.

        No token is a label in two of them.

        Raises:
            ValueError: there are too few tokens for one window, or an argument is not positive.
        """
        for name, value in (("seq_len", seq_len), ("max_windows", max_windows)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        fitting = len(self.tokens) - seq_len  # windows, at any position
        if fitting < 1:
            raise ValueError(f"tokens: {len(self.tokens)}, expected at least seq_len + 1 = {seq_len + 1}")
        spacing = seq_len if max_windows is None else max(seq_len, fitting // max_windows)
        return np.arange(0, fitting, spacing)[:max_windows]

    def batches(self, seq_len: int, batch_size: int, max_windows: int | None = None) -> Iterator[Batch]:
        """The windows at `positions`, in order; the last batch may have fewer rows.

        Raises:
            ValueError: as `positions`, at once; or `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        places = self.positions(seq_len, max_windows)
        parts = (places[start : start + batch_size] for start in range(0, len(places), batch_size))
        return (self.batch(part, seq_len) for part in parts)

    def batch(self, positions: Sequence[int] | np.ndarray, seq_len: int) -> Batch:
        """The windows of `seq_len` tokens that start at `positions`, and their labels."""
        length = seq_len + 1
        return cut_windows(
            np.stack([self.tokens[at : at + length] for at in positions]),
            None if self.ends is None else [ends_within(self.ends, at, length) for at in positions],
            None
            if self.counts is None
            else np.stack([self.counts[at + 1 : at + length] for at in positions]),
        )


def ends_within(ends: np.ndarray, start: int, length: int) -> np.ndarray:
    """Those of the rising `ends` that lie in `(start, start + length)`, counted from `start`."""
    first, last = np.searchsorted(ends, [start, start + length - 1], side="right")
    return np.asarray(ends[first:last]).astype(np.int64) - start


def cut_windows(
    windows: np.ndarray, ends: Sequence[np.ndarray] | None, counts: np.ndarray | None = None
) -> Batch:
    """The batch of `windows` `(b, n + 1)`, whose documents end where `ends` says for each row.

    The first token of a document cannot be predicted from the one before it, and is no label.
    counts: `(b, n)` bool: which of the labels count; None: all.
    """
    wide = torch.from_numpy(windows.astype(np.int64))
    tokens, labels = wide[:, :-1], wide[:, 1:]
    if ends is None and counts is None:
        return Batch(tokens, labels)
    labels = labels.clone()
    if counts is not None:
        labels[torch.from_numpy(~counts)] = IGNORED
    if ends is None:
        return Batch(tokens, labels)
    marks = np.zeros(windows.shape, dtype=np.int64)
    for row, places in zip(marks, ends, strict=True):
        row[places] = 1
    first = torch.from_numpy(marks)
    labels[first[:, 1:] == 1] = IGNORED
    return Batch(tokens, labels, first.cumsum(1)[:, :-1])


class Dataset(Protocol):
    """Tokens to train on, cut into sequences, and those to validate and test on.

    Which tokens a row holds is a function of `(seed, index, row)` alone. Neither what was read before, nor
    how many processes and workers read, nor how a step is cut into slices changes it: a stopped run goes on
    with the same data from its step's number. PaLM's authors trained so (Chowdhery et al. 2022, section 5).
    """

    @property
    def name(self) -> str:
        """For people: `"enwik8"` for its exact bytes."""

    @property
    def origin(self) -> str:
        """One line that tells people where the tokens came from."""

    @property
    def fingerprint(self) -> str:
        """Recognises the same tokens, in the same splits, again."""

    @property
    def tokenizer(self) -> Any:
        """What made tokens of the text."""

    @property
    def num_tokens(self) -> int:
        """The vocabulary: every token is below it."""

    def __str__(self) -> str:
        """Name, origin and the sizes of the splits, for people."""

    def batch(self, *, seed: int, index: int, rows: range) -> Batch:
        """The given rows, from 0, of the global batch number `index`."""

    def held_out(self, split: Literal["valid", "test"]) -> HeldOut:
        """The tokens of a split that is not trained on."""
