"""One running text, byte by byte: trained on in windows at random positions, split by position."""

from __future__ import annotations

from typing import Any, Literal

from palm_pytorch.data.batch import Batch, HeldOut
from palm_pytorch.data.corpus import Corpus
from palm_pytorch.data.tokenizer import ByteTokenizer
from palm_pytorch.data.windows import split_by_position, train_batch


class TextDataset:
    """A corpus that is one text, such as Enwik8, cut into sequences of `seq_len` bytes.

    Training reads windows at random positions rather than a permutation of fixed chunks: a text this small is
    read many times, and then no two readings of it are cut at the same places.

    Raises:
        ValueError: the corpus is too short for each split to hold a window.
    """

    def __init__(self, corpus: Corpus, seq_len: int) -> None:
        self.corpus, self.seq_len = corpus, seq_len
        self.name, self.origin, self.fingerprint = corpus.name, corpus.origin, corpus.fingerprint
        self.tokenizer, self.num_tokens = ByteTokenizer(), ByteTokenizer.num_tokens
        self.splits = split_by_position(corpus.tokens, seq_len, f"corpus {corpus.name!r} ({corpus.origin})")

    def __reduce__(self) -> tuple[Any, ...]:
        return TextDataset, (self.corpus, self.seq_len)

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {len(part):,}" for name, part in self.splits._asdict().items())
        return f"{self.name}: {self.origin}; bytes to {sizes}"

    def batch(self, *, seed: int, index: int, rows: range) -> Batch:
        """See `Dataset.batch` and `train_batch`."""
        return Batch.of_windows(
            train_batch(self.splits.train, seq_len=self.seq_len, seed=seed, step=index, rows=rows)
        )

    def held_out(self, split: Literal["valid", "test"]) -> HeldOut:
        """The bytes of a split, and before them the one that precedes it in the text: with it as context for
        the first, every byte of the split is a label.
        """
        before = {"valid": len(self.splits.train), "test": len(self.corpus.tokens) - len(self.splits.test)}
        size = len({"valid": self.splits.valid, "test": self.splits.test}[split])
        return HeldOut(self.corpus.tokens[before[split] - 1 : before[split] + size], num_bytes=size)
