"""What a run reads of one running text: splits by position, and training windows at random ones.

Shapes: b sequences (rows), each a window of n + 1 tokens: inputs are `[:, :-1]`, labels `[:, 1:]`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view


class Splits(NamedTuple):
    """Three consecutive parts of a stream of tokens, each `(length,)`."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def split_by_position(tokens: np.ndarray, seq_len: int, whose: str) -> Splits:
    """90% to train, then 5% to validate and 5% to test, as is customary on Enwik8.

    Raises:
        ValueError: they are too few for each split to hold a window of `seq_len + 1`; says `whose`.
    """
    _check_positive("seq_len", seq_len)
    length, needed = len(tokens), 20 * (seq_len + 1)
    if length < needed:
        raise ValueError(
            f"{whose} is too short: {length:,} tokens, and seq_len={seq_len} needs {needed:,}, for 5% to "
            "validate and 5% to test to hold a window each"
        )
    first, second = length * 90 // 100, length * 95 // 100
    return Splits(tokens[:first], tokens[first:second], tokens[second:])


def train_batch(tokens: np.ndarray, *, seq_len: int, seed: int, step: int, rows: range) -> torch.Tensor:
    """Training sequences of one optimizer step: `(b, seq_len + 1)` int64, windows at random positions.

    A row is a function of `(seed, step, row)` alone: its position is draw number `row` of a counter-based
    generator (Philox; Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the key
    `(seed, step)`. Neither what was read before, nor how many processes and workers read, nor how a step is
    cut into accumulation slices changes it. So a stopped run resumes with the same data from its step number;
    no state is saved.

    Args:
        tokens: `(length,)` the training split.
        seq_len: n, so that a window holds n + 1 tokens.
        seed: 0 to 2**64 - 1.
        step: of the optimizer, from 0.
        rows: the numbers, within the step, of the rows wanted. With `b` rows per accumulation slice over all
            processes, rank r of w takes of slice s `range(s * b + r * (b // w), s * b + (r + 1) * (b // w))`.

    Raises:
        ValueError: an argument is out of its range, or `tokens` are too few for one window.
    """
    windows = _windows(tokens, seq_len)
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name}={value}: expected 0 to 2**64 - 1")
    if not rows or min(rows) < 0:
        raise ValueError(f"rows={rows}: expected at least one row, from 0")
    # Raw draws, because numpy may change its distributions from version to version. The remainder's bias
    # towards early positions is below 1e-7 for any corpus under a terabyte.
    draws = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(max(rows) + 1)
    chosen = windows[draws[np.asarray(rows)] % np.uint64(len(windows))]
    return torch.from_numpy(chosen.astype(np.int64))


def _windows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Every window of `seq_len + 1` tokens, as a view: `(len(tokens) - seq_len, seq_len + 1)`."""
    _check_positive("seq_len", seq_len)
    if len(tokens) <= seq_len:
        raise ValueError(f"tokens: {len(tokens)} of them, expected at least seq_len + 1 = {seq_len + 1}")
    return sliding_window_view(tokens, seq_len + 1)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value}: expected at least 1")
