"""Conversations to fine-tune on: read from JSON lines, held out by hash, packed into rows.

Shapes: b rows of n tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from palm_pytorch.data.batch import IGNORED, Batch, HeldOut
from palm_pytorch.data.blocks import SHARES, SPLITS, split_of
from palm_pytorch.data.dialog import DialogTemplate, Message, Turn, latest, parse_conversation
from palm_pytorch.data.order import ROUNDS, epoch_draws, permute
from palm_pytorch.data.sources import JSON_LINES, first_record, kind_of, split_lines
from palm_pytorch.data.streams import list_files, read_files
from palm_pytorch.data.tokenizer import Tokenizer

LOOK_AHEAD = 64  # conversations that are tried for what is left of a row


class Packed(NamedTuple):
    """Conversations one after the other: tokens `(length,)`, which are labels, and where each ends."""

    tokens: np.ndarray
    counts: np.ndarray
    ends: np.ndarray


class DialogDataset:
    """The conversations in a file of JSON lines or all such of a folder, in rows of `seq_len` tokens.

    Rows are packed: conversations follow one another, attention stays inside each, and only what is left at
    the end of a row, too short for one of the next few, is padding. Only responses count. A conversation
    that is longer than a row keeps its latest turns, as it would in `palm chat`; `cut` is how many did.

    Every twentieth conversation is held out to validate on and another one to test on, as a hash of its
    text decides, wherever it is in the file. `passed_over` is how many files of a folder are of other kinds,
    as a README.

    Raises:
        ValueError: a record is no conversation, which is said with file and line, or there are too few.
        OSError: a file cannot be read.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer, seq_len: int) -> None:
        path = Path(path).expanduser()
        self.name, self.origin, self.tokenizer = path.resolve().name, str(path), tokenizer
        self.num_tokens, self.seq_len = tokenizer.num_tokens, seq_len
        self.template = DialogTemplate(tokenizer)
        digest = hashlib.sha256(f"dialog {tokenizer.fingerprint}".encode())
        found: dict[str, list[Turn]] = {split: [] for split in SPLITS}
        self.cut = 0
        files = list(json_lines_files(path))
        self.passed_over = len(list_files(path)) - len(files)
        for line, turns in self._read(files):
            digest.update(line)
            self.cut += sum(len(turn.tokens) for turn in turns) > seq_len + 1
            split = SPLITS[split_of(hashlib.sha256(line).digest(), SHARES)]
            found[split].append(latest(turns, seq_len + 1))
        self.fingerprint = digest.hexdigest()
        self.splits = {split: pack(conversations, tokenizer.dtype) for split, conversations in found.items()}
        for split, packed in self.splits.items():
            if len(packed.tokens) <= seq_len:
                raise ValueError(
                    f"{path} is too small: {len(packed.ends):,} of its conversations, {len(packed.tokens):,} "
                    f"tokens, fall to {split}; expected more than seq_len={seq_len} tokens"
                )

    def _read(self, files: Iterable[Path]) -> Iterator[tuple[bytes, list[Turn]]]:
        """Each line and its turns, up to the last response."""
        for where, line, messages in read_conversations(files):
            try:
                turns = [self.template.turn(message) for message in messages]
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            while not turns[-1].counts.any():
                turns.pop()
            yield line, turns

    def __str__(self) -> str:
        sizes = ", ".join(f"{split} {len(packed.ends):,}" for split, packed in self.splits.items())
        cut = f"; {self.cut:,} cut to their latest turns" if self.cut else ""
        others = f"; {self.passed_over:,} other files passed over" if self.passed_over else ""
        return f"{self.name}: {self.origin}; conversations to {sizes}{cut}{others}; {self.tokenizer}"

    def batch(self, *, seed: int, index: int, rows: range) -> Batch:
        """See `Dataset.batch`: each batch is packed from a random order of its own."""
        train = self.splits["train"]
        lengths = np.diff(train.ends, prepend=0) - 1
        return lay_out(train, pack_rows(lengths, self.seq_len, seed, index, rows), self.seq_len)

    def held_out(self, split: Literal["valid", "test"]) -> HeldOut:
        """The conversations of a split as one stream; its bytes are those of the responses."""
        tokens, counts, ends = self.splits[split]
        return Conversations(tokens, self.tokenizer.num_bytes(tokens[counts]), ends, counts)


@dataclass(frozen=True)
class Conversations(HeldOut):
    """Conversations one after the other; windows hold whole ones, as many as fit, and padding."""

    def batches(self, seq_len: int, batch_size: int, max_windows: int | None = None) -> Iterator[Batch]:
        assert self.ends is not None and self.counts is not None
        packed = Packed(self.tokens, self.counts, self.ends)
        rows = self.rows(seq_len, max_windows)
        parts = (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
        return (lay_out(packed, part, seq_len) for part in parts)

    def positions(self, seq_len: int, max_windows: int | None = None) -> np.ndarray:
        assert self.ends is not None
        starts = np.concatenate([[0], self.ends[:-1]])
        return starts[[row[0] for row in self.rows(seq_len, max_windows)]]

    def rows(self, seq_len: int, max_windows: int | None) -> list[range]:
        """Which conversations are in each window, of at most so many that are evenly spread."""
        assert self.ends is not None
        rows, first, length = [], 0, 0
        for number, more in enumerate(np.diff(self.ends, prepend=0) - 1):
            if length + more > seq_len and number > first:
                rows.append(range(first, number))
                first, length = number, 0
            length += more
        rows.append(range(first, len(self.ends)))
        return rows[:: 1 if max_windows is None else max(1, len(rows) // max_windows)][:max_windows]


def lay_out(packed: Packed, rows: Sequence[Sequence[int]], seq_len: int) -> Batch:
    """Conversations by number as rows of `seq_len` tokens; of one that is longer than that, its end."""
    tokens = np.zeros((len(rows), seq_len), dtype=np.int64)
    labels, ids = np.full_like(tokens, IGNORED), np.zeros_like(tokens)
    for row, conversations in enumerate(rows):
        at = 0
        for number, conversation in enumerate(conversations):
            start, end = packed.ends[conversation - 1] if conversation else 0, packed.ends[conversation]
            whole = slice(max(start, end - seq_len - 1), end)
            text = packed.tokens[whole].astype(np.int64)  # in which IGNORED fits
            here = slice(at, at := at + len(text) - 1)
            tokens[row, here] = text[:-1]
            labels[row, here] = np.where(packed.counts[whole][1:], text[1:], IGNORED)
            ids[row, here] = number
        ids[row, at:] = len(conversations)  # padding keeps to itself
    return Batch(*(torch.from_numpy(array) for array in (tokens, labels, ids)))


def is_dialog(path: Path) -> bool:
    """Whether a file, or the first of a folder that is of JSON lines, begins with an object of "messages"."""
    record = next(map(first_record, json_lines_files(path)), None) if path.exists() else None
    return record is not None and "messages" in record


def json_lines_files(path: Path) -> Iterator[Path]:
    """A file, or those in a folder, if it is of JSON lines and not empty."""
    return (file for file in list_files(path) if kind_of(file) in JSON_LINES and file.stat().st_size)


def read_conversations(
    files: Iterable[Path], *, show: bool = True
) -> Iterator[tuple[str, bytes, list[Message]]]:
    """The conversations in files of JSON lines: where each is, its line, and its messages.

    Raises:
        ValueError: a line is no conversation. Every message names file and line.
        OSError: a file cannot be read.
    """
    for file in files:
        for number, line in enumerate(map(bytes.strip, split_lines(read_files([file], show=show))), 1):
            if not line:
                continue
            where = f"{file}, line {number:,}"
            try:
                messages = parse_conversation(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            yield where, line, messages


def pack(conversations: Sequence[Turn], dtype: np.dtype[Any]) -> Packed:
    """Conversations as one stream. The first token of each follows nothing, and is no label."""
    tokens, counts = [np.zeros(0, dtype)], [np.zeros(0, bool)]
    for conversation in conversations:
        tokens.append(conversation.tokens)
        counts.append(conversation.counts)
    ends = np.cumsum([len(conversation.tokens) for conversation in conversations], dtype=np.int64)
    packed = Packed(np.concatenate(tokens), np.concatenate(counts), ends)
    packed.counts[np.concatenate([[0], ends])[: len(ends)]] = False
    return packed


def pack_rows(lengths: np.ndarray, room: int, seed: int, index: int, rows: range) -> list[list[int]]:
    """Which conversations are in each of `rows` of the batch number `index`; of `lengths`, at most `room`.

    Rows are filled one after the other from a random order of all conversations, then another one. Each takes
    the next that fits, of the first few that wait, so those that wait stay in order.
    """
    order = random_order(len(lengths), seed, index)
    waiting: list[int] = []
    filled: list[list[int]] = []
    for _ in range(max(rows) + 1):
        row: list[int] = []
        left = room
        at = 0
        while at < LOOK_AHEAD and left > 0:
            if at == len(waiting):
                waiting.append(next(order))
            if lengths[waiting[at]] <= left:
                left -= int(lengths[waiting[at]])
                row.append(waiting.pop(at))
            else:
                at += 1
        filled.append(row)
    return [filled[row] for row in rows]


def random_order(count: int, seed: int, index: int) -> Iterator[int]:
    """All of `range(count)` in a random order, then in another, and so on: a function of its arguments."""
    # A batch rarely gets beyond the first, so the orders' keys are drawn from one stream, of this batch.
    turn, block = 0, 64
    while True:
        turn += 1
        keys = epoch_draws(seed, index, turn * ROUNDS)[-ROUNDS:]
        for start in range(0, count, block):
            yield from permute(np.arange(start, min(start + block, count)), count, keys).tolist()
