"""A prepared folder to train on: documents packed without padding, in an order that is computed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from palm_pytorch.data.batch import Batch, HeldOut, cut_windows
from palm_pytorch.data.order import ROUNDS, epoch_draws, permute
from palm_pytorch.data.shards import (
    CHECKED_BYTES,
    END_DTYPE,
    HELD_OUT,
    TokenStream,
    map_file,
    read_manifest,
    verify,
)
from palm_pytorch.data.tokenizer import ByteTokenizer, Tokenizer, expect_tokenizer, stored_tokenizer


class PackedDataset:
    """The documents of a prepared folder, one after the other, cut into sequences of `seq_len` tokens.

    In an epoch each token but the first is a label once: the stream is cut into consecutive chunks, from a
    place that the epoch chooses among the first `seq_len`, and they are read in an order that it chooses too.
    What the last chunk has beyond the whole comes from its beginning, and does not count.

    `documents="inside"`: attention stays inside a document, and the first token of a document, which nothing
    before it foretells, is no label; the end token is one. `"across"`: rows are plain running text, as PaLM's
    authors pack (Chowdhery et al. 2022, section 5), and every token is a label.

    Row `row` of batch `index` is chunk number `index * rows_per_batch + row` of all epochs.

    Args:
        folder: of `prepare`.
        seq_len: n.
        rows_per_batch: of a global batch; `batch` gives rows below it.
        documents: see above; a running text, which has none, is read as "across" is.
        tokenizer: the one that the tokens must be of; None: whichever they are of.
        verify_all: check the SHA-256 of every file. Otherwise those of the held-out parts and of evenly
            spread shards, about a gibibyte together, and the sizes of all.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged or of another tokenizer, or a split is too
            short for a sequence.
    """

    def __init__(
        self,
        folder: str | Path,
        seq_len: int,
        *,
        rows_per_batch: int,
        documents: Literal["inside", "across"] = "inside",
        tokenizer: Tokenizer | None = None,
        verify_all: bool = False,
    ) -> None:
        for name, value in (("seq_len", seq_len), ("rows_per_batch", rows_per_batch)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        self.folder, self.seq_len, self.rows_per_batch = Path(folder), seq_len, rows_per_batch
        self.manifest = read_manifest(self.folder)
        self.tokenizer = stored_tokenizer(self.folder) or ByteTokenizer()
        expect_tokenizer(self.tokenizer, self.manifest.tokenizer, str(self.folder))
        if tokenizer is not None:
            expect_tokenizer(tokenizer, self.manifest.tokenizer, str(self.folder))
        verify(self.folder, self.manifest, limit=None if verify_all else CHECKED_BYTES)
        for split in ("train", *HELD_OUT):
            length = self.manifest.totals(split)["tokens"]
            if length <= seq_len:
                raise ValueError(
                    f"{self.folder} is too short: {length:,} tokens to {split}, expected at least "
                    f"{seq_len + 1:,} for seq_len={seq_len}"
                    + ("" if split == "train" else f"; prepare it with a larger {split}_share")
                )
        self.inside = documents == "inside" and self.manifest.documents
        self.stream = TokenStream(self.folder, self.manifest.train, self.manifest.token_type)
        self.num_chunks = -(-len(self.stream) // seq_len)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def origin(self) -> str:
        return f"{self.manifest.source} ({self.folder})"

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @cached_property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def __str__(self) -> str:
        return f"{self.name}: {self.origin}; {self.tokenizer}; {self.manifest}"

    def batch(self, *, seed: int, index: int, rows: range) -> Batch:
        """See `Dataset.batch`.

        Raises:
            ValueError: an argument is out of its range.
        """
        if not rows or not 0 <= min(rows) <= max(rows) < self.rows_per_batch:
            raise ValueError(f"rows={rows}: expected some of 0 to {self.rows_per_batch - 1}")
        if index < 0 or not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed}, index={index}: expected 0 to 2**64 - 1, and at least 0")
        n, total = self.seq_len, len(self.stream)
        numbers = index * self.rows_per_batch + np.asarray(rows)
        epochs, chunks = numbers // self.num_chunks, numbers % self.num_chunks
        starts, windows = np.empty_like(chunks), np.empty((len(rows), n + 1), dtype=np.int64)
        ends, counts = [], np.ones((len(rows), n), dtype=bool)
        for epoch in np.unique(epochs):
            phase, *keys = epoch_draws(seed, int(epoch), 1 + ROUNDS)
            chosen = np.flatnonzero(epochs == epoch)
            chunks[chosen] = permute(chunks[chosen], self.num_chunks, np.array(keys, dtype=np.uint64))
            starts[chosen] = (chunks[chosen] * n + int(phase % np.uint64(n))) % total
        for row, (chunk, start) in enumerate(zip(chunks.tolist(), starts.tolist(), strict=True)):
            windows[row] = self.stream.read(start, n + 1)
            counts[row, total - chunk * n :] = False  # what the first chunk reads
            counts[row, total - 1 - start :: total] = False  # nothing comes after the last token
            if self.inside:
                ends.append(self.stream.read_ends(start, n + 1))
        return cut_windows(windows, ends if self.inside else None, counts)

    def held_out(self, split: Literal["valid", "test"]) -> HeldOut:
        """The documents that were held out, in one stream."""
        part = self.manifest.valid if split == "valid" else self.manifest.test
        tokens = map_file(self.folder / f"{split}.bin", self.manifest.token_type)
        if not self.inside:
            return HeldOut(tokens, part.bytes - self.tokenizer.num_bytes(tokens[:1]))
        ends = map_file(self.folder / f"{split}.ends", END_DTYPE)
        return HeldOut(tokens, part.bytes - part.first_bytes, ends)
