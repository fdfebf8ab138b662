"""Integers that are no text, as pixels or notes: arrays of a stated vocabulary, from `.npy` and `.bin` files.

`(length,)`               one stream, split by position, trained on in windows at random positions
`(sequences, seq_len)`    sequences that are read whole, and held out by hash

A whole sequence is read after a token of its own, the one after all values: so each of its values is
predicted, the first one too, and a model draws a new sequence after that token alone.

Shapes: b rows of n = seq_len tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from palm_pytorch.data.batch import Batch, HeldOut
from palm_pytorch.data.blocks import SHARES, SPLITS, split_of
from palm_pytorch.data.corpus import fingerprint
from palm_pytorch.data.order import ROUNDS, epoch_draws, permute
from palm_pytorch.data.tokenizer import IntegerTokenizer
from palm_pytorch.data.windows import split_by_position, train_batch

DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
ARRAY_FILES = (".npy", ".bin")


def is_array(path: Path) -> bool:
    """Whether a path is that of an array, by its name."""
    return path.suffix in ARRAY_FILES and not path.is_dir()


def open_array(
    path: str | Path, num_values: int, *, seq_len: int, dtype: str | None = None
) -> StreamDataset | SequenceDataset:
    """The integers in a file, none of them held in memory.

    num_values: the vocabulary: each must be below it.  dtype: of a `.bin` file, as "uint16".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no array of such integers, or they are too few; says where the first wrong one is.
    """
    path = Path(path).expanduser()
    values = map_array(path, dtype)
    check_values(values, num_values, path)
    if values.ndim == 1:
        return StreamDataset(values, path, IntegerTokenizer(num_values), seq_len)
    return SequenceDataset(values, path, IntegerTokenizer(num_values), seq_len)


def map_array(path: Path, dtype: str | None) -> np.ndarray:
    """The array in a file, as a read-only memory map; raises as `open_array`."""
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist: expected a file of integers")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if path.suffix == ".bin":
        if dtype is None:
            raise ValueError(f"{path}: expected data_dtype beside it, as 'uint8': a .bin file does not tell")
        if dtype not in DTYPES:
            raise ValueError(f"data_dtype is {dtype!r}; expected integers: {', '.join(DTYPES)}")
        size = np.dtype(dtype).itemsize
        if path.stat().st_size % size:
            raise ValueError(f"{path}: {path.stat().st_size:,} bytes are no whole number of {dtype}")
        return np.memmap(path, dtype=dtype, mode="r")
    if dtype is not None:
        raise ValueError(f"data_dtype is {dtype!r}; expected none for {path}, which tells its own")
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged, or not a .npy file: {error}") from error
    if values.dtype.kind not in "iu" or values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(
            f"{path} holds {values.dtype} of shape {values.shape}; expected integers, (length,) or "
            "(sequences, length)"
        )
    return values


def check_values(values: np.ndarray, num_values: int, path: Path) -> None:
    """Raise a ValueError that names the first position whose value is not in the vocabulary."""
    rows = max(1, (1 << 22) // max(1, values[0].size))  # at a time
    for start in range(0, len(values), rows):
        part = values[start : start + rows]
        if part.min() < 0 or part.max() >= num_values:
            first = np.argwhere((part < 0) | (part >= num_values))[0]
            where = ", ".join(str(index) for index in (first[0] + start, *first[1:]))
            raise ValueError(
                f"{path}: the value at {where} is {part[tuple(first)]}; expected 0 to {num_values - 1}, as "
                f"num_tokens is {num_values}"
            )


class IntegerData:
    """What both kinds have of a `Dataset`."""

    def __init__(self, values: np.ndarray, path: Path, tokenizer: IntegerTokenizer, seq_len: int) -> None:
        self.values, self.path, self.tokenizer, self.seq_len = values, path, tokenizer, seq_len
        self.name, self.origin, self.num_tokens = path.name, str(path), tokenizer.num_tokens

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that is given it maps the file for itself."""
        dtype = str(self.values.dtype) if self.path.suffix == ".bin" else None
        return _reopen, (type(self), self.path, dtype, self.tokenizer, self.seq_len)

    @property
    def fingerprint(self) -> str:
        found = fingerprint(self.values.reshape(-1).view(np.uint8))
        return hashlib.sha256(f"{self.tokenizer} {self.values.shape} {found}".encode()).hexdigest()

    def describe(self, unit: str, splits: dict[str, np.ndarray]) -> str:
        parts = ", ".join(f"{split} {len(part):,}" for split, part in splits.items())
        return f"{self.name}: {self.origin}; {self.tokenizer}, {unit} to {parts}"


def _reopen(kind: type[IntegerData], path: Path, dtype: str | None, *rest: Any) -> IntegerData:
    return kind(map_array(path, dtype), path, *rest)


class StreamDataset(IntegerData):
    """`(length,)`: 90% to train, then 5% to validate and 5% to test.

    Raises:
        ValueError: a split is too short for a window of `seq_len + 1` values.
    """

    def __init__(self, values: np.ndarray, path: Path, tokenizer: IntegerTokenizer, seq_len: int) -> None:
        super().__init__(values, path, tokenizer, seq_len)
        self.splits = split_by_position(values, seq_len, str(path))

    def __str__(self) -> str:
        return self.describe("values", self.splits._asdict())

    def batch(self, *, seed: int, index: int, rows: range) -> Batch:
        """See `Dataset.batch` and `train_batch`."""
        return Batch.of_windows(
            train_batch(self.splits.train, seq_len=self.seq_len, seed=seed, step=index, rows=rows)
        )

    def held_out(self, split: Literal["valid", "test"]) -> HeldOut:
        tokens = getattr(self.splits, split)
        return HeldOut(tokens, num_bytes=len(tokens) - 1)


class SequenceDataset(IntegerData):
    """`(sequences, seq_len)`: each is a row of a batch, whole. A twentieth is to validate, another to test.

    Raises:
        ValueError: the sequences are of another length, or too few.
    """

    def __init__(self, values: np.ndarray, path: Path, tokenizer: IntegerTokenizer, seq_len: int) -> None:
        super().__init__(values, path, tokenizer, seq_len)
        if values.shape[1] != seq_len:
            raise ValueError(
                f"seq_len is {seq_len}; expected {values.shape[1]}, the length of the sequences in {path}"
            )
        found = [split_of(hashlib.sha256(row.tobytes()).digest(), SHARES) for row in values]
        self.splits = {split: np.flatnonzero(np.equal(found, n)) for n, split in enumerate(SPLITS)}
        for split, numbers in self.splits.items():
            if len(numbers) == 0:
                raise ValueError(f"{path} is too small: none of {len(found):,} sequences falls to {split}")

    def __str__(self) -> str:
        return self.describe("sequences", self.splits)

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """The sequences of these numbers, each after the token that begins it: `(b, n + 1)`."""
        rows = np.full((len(numbers), self.seq_len + 1), self.tokenizer.eos_token, self.tokenizer.dtype)
        rows[:, 1:] = self.values[numbers]
        return rows

    def batch(self, *, seed: int, index: int, rows: range) -> Batch:
        """See `Dataset.batch`: each batch reads a random order of its own."""
        train = self.splits["train"]
        numbers = np.asarray(rows) % len(train)
        chosen = train[permute(numbers, len(train), epoch_draws(seed, index, ROUNDS))]
        return Batch.of_windows(torch.from_numpy(self.read(chosen).astype(np.int64)))

    def held_out(self, split: Literal["valid", "test"]) -> HeldOut:
        tokens = self.read(self.splits[split])
        counts = np.ones(tokens.shape, bool)
        counts[:, 0] = False
        values = int(counts.sum())
        return WholeSequences(tokens.reshape(-1), values, counts=counts.reshape(-1), length=tokens.shape[1])


@dataclass(frozen=True)
class WholeSequences(HeldOut):
    """Sequences of `length` tokens, one after the other; windows are these and no others."""

    length: int = 1

    def positions(self, seq_len: int, max_windows: int | None = None) -> np.ndarray:
        count = len(self.tokens) // self.length
        step = 1 if max_windows is None else max(1, count // max_windows)
        return np.arange(0, count, step)[:max_windows] * self.length
