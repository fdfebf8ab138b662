"""Tokens on disk: files of one integer type, where their documents end, and a manifest of both.

manifest.json                       what it was made of and how, counts, SHA-256 of each file
tokenizer.*                         the tokenizer, unless tokens are bytes
train-00000.bin, train-00000.ends   tokens, little-endian; ends of documents, int64, end tokens included
train-00001.bin ...
valid.bin, valid.ends, test.bin, test.ends
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from palm_pytorch.data.durable import file_digest, write_json

VERSION = 1
MANIFEST = "manifest.json"
HELD_OUT = ("valid", "test")
CHECKED_BYTES = 1 << 30  # of tokens that are read to check them when they are opened: a second or so
END_DTYPE = np.dtype("<i8")


@dataclass(frozen=True)
class Part:
    """A file of tokens and the file of its documents' ends, or the first part of them.

    Attributes:
        name: of the files, without `.bin` and `.ends`.
        tokens: how many, end tokens included.
        documents: how many end in it.
        bytes: of text that the tokens stand for.
        first_bytes: of these, what the first tokens of documents stand for, which cannot be predicted.
        sha256: of the tokens, in hexadecimal.
        ends_sha256: of the ends.
    """

    name: str
    tokens: int
    documents: int
    bytes: int
    first_bytes: int
    sha256: str
    ends_sha256: str

    def files(self, dtype: np.dtype[Any]) -> list[tuple[str, int, str]]:
        """Name, size in bytes and SHA-256 of both files."""
        return [
            (f"{self.name}.bin", self.tokens * dtype.itemsize, self.sha256),
            (f"{self.name}.ends", self.documents * END_DTYPE.itemsize, self.ends_sha256),
        ]


class PartWriter:
    """Appends documents to the files of a part: new ones, or those of an `earlier` one, cut to that."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], earlier: Part | None = None) -> None:
        self.name, self.dtype = name, dtype
        self.tokens = self.documents = self.bytes = self.first_bytes = 0
        if earlier is not None:
            self.tokens, self.documents = earlier.tokens, earlier.documents
            self.bytes, self.first_bytes = earlier.bytes, earlier.first_bytes
        sizes = (self.tokens * dtype.itemsize, self.documents * END_DTYPE.itemsize)
        self.files, self.digests = [], []
        for suffix, size in zip((".bin", ".ends"), sizes, strict=True):
            path = folder / f"{name}{suffix}"
            self.files.append(path.open("r+b" if earlier is not None else "w+b"))
            self.digests.append(file_digest(path, size))
            self.files[-1].truncate(size)
            self.files[-1].seek(size)

    def append(self, tokens: np.ndarray, ends: np.ndarray, num_bytes: int, first_bytes: int) -> None:
        """Add `tokens (n,)`, in which documents end at `ends (documents,)`, counted from the first token."""
        contents = (tokens.astype(self.dtype, copy=False), (ends + self.tokens).astype(END_DTYPE))
        for file, digest, content in zip(self.files, self.digests, contents, strict=True):
            digest.update(content.data)
            file.write(content.data)
        self.tokens += len(tokens)
        self.documents += len(ends)
        self.bytes += num_bytes
        self.first_bytes += first_bytes

    def part(self) -> Part:
        """What has been written, all of it on the disk."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        counts = (self.tokens, self.documents, self.bytes, self.first_bytes)
        return Part(self.name, *counts, *(digest.hexdigest() for digest in self.digests))

    def close(self) -> None:
        for file in self.files:
            file.close()


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds. `documents` False: one running text, whose parts follow one another."""

    name: str
    source: str
    tokenizer: str
    num_tokens: int
    dtype: str
    documents: bool
    options: dict[str, Any]
    dropped: dict[str, int]
    train: tuple[Part, ...]
    valid: Part
    test: Part
    version: int = VERSION

    @property
    def token_type(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    @property
    def fingerprint(self) -> str:
        """Of the tokens and their splits, wherever they came from."""
        parts = [(part.sha256, part.ends_sha256) for part in (*self.train, self.valid, self.test)]
        content = (self.version, self.tokenizer, self.dtype, self.documents, parts)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def totals(self, split: str) -> dict[str, int]:
        """Documents, tokens and bytes of a split."""
        parts: Sequence[Part] = self.train if split == "train" else [getattr(self, split)]
        return {name: sum(getattr(part, name) for part in parts) for name in ("documents", "tokens", "bytes")}

    def __str__(self) -> str:
        """Tokens, and documents if there are any, in each split, for people."""
        parts = []
        for split in ("train", *HELD_OUT):
            counts = self.totals(split)
            of = f" in {counts['documents']:,} documents" if self.documents else ""
            parts.append(f"{split} {counts['tokens']:,}{of}")
        dropped = [f"{count:,} {what}" for what, count in self.dropped.items() if count]
        return f"tokens to {', '.join(parts)}" + (f"; dropped {' and '.join(dropped)}" if dropped else "")

    def write(self, folder: Path) -> None:
        counts = {split: self.totals(split) for split in ("train", *HELD_OUT)}
        write_json(folder / MANIFEST, {**asdict(self), "counts": counts, "fingerprint": self.fingerprint})


def is_prepared(folder: Path) -> bool:
    """Whether a folder is of prepared data, of which even the first shard may be missing."""
    return (folder / MANIFEST).is_file() and any(
        (folder / f"{name}.bin").is_file() for name in ("train-00000", *HELD_OUT)
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"{path}: version {content['version']}, expected {VERSION}; {_again(folder)}")
        content.pop("counts")
        fingerprint = content.pop("fingerprint")
        content["train"] = tuple(Part(**part) for part in content["train"])
        manifest = Manifest(**{**content, "valid": Part(**content["valid"]), "test": Part(**content["test"])})
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{folder}: expected a folder of prepared data, found no {path}") from error
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, or not a manifest: {error!r}; {_again(folder)}") from error
    if manifest.fingerprint != fingerprint:
        raise ValueError(f"{path} is damaged: its fingerprint is not that of what it lists; {_again(folder)}")
    return manifest


def _again(folder: Path) -> str:
    return f"remove {folder} and prepare it again"


def verify(folder: Path, manifest: Manifest, *, limit: int | None = None) -> None:
    """Check that the files are those of the manifest: sizes always, SHA-256 up to `limit` bytes, all if None.

    Beyond the limit it is the held-out parts and evenly spread shards that are read.

    Raises:
        FileNotFoundError, ValueError: a file is missing, cut short or damaged; says which.
    """
    dtype = manifest.token_type
    parts = [manifest.valid, manifest.test, *manifest.train]
    for part in parts:
        for name, size, _ in part.files(dtype):
            path = folder / name
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is missing, which {folder / MANIFEST} lists; {_again(folder)}"
                )
            if path.stat().st_size != size:
                raise ValueError(
                    f"{path} is damaged: {path.stat().st_size:,} bytes, expected {size:,}; {_again(folder)}"
                )
    total = sum(size for part in parts for _, size, _ in part.files(dtype))
    step = 1 if limit is None else max(1, -(-total // limit))
    chosen = [manifest.valid, manifest.test, *manifest.train[::step]]
    files = [file for part in chosen for file in part.files(dtype)]
    with tqdm(
        total=sum(size for _, size, _ in files), desc="checking", unit="B", unit_scale=True, leave=False
    ) as bar:
        for name, size, expected in files:
            found = file_digest(folder / name, size).hexdigest()
            if found != expected:
                raise ValueError(
                    f"{folder / name} is damaged: its sha256 is {found}, not {expected}; {_again(folder)}"
                )
            bar.update(size)


def map_file(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """A file's numbers `(length,)`, read-only; a memory map unless it is empty."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


class TokenStream:
    """The tokens of several parts as one long array, of which any stretch can be read."""

    def __init__(self, folder: Path, parts: Sequence[Part], dtype: np.dtype[Any]) -> None:
        self.tokens = [map_file(folder / f"{part.name}.bin", dtype) for part in parts]
        self.ends = [map_file(folder / f"{part.name}.ends", END_DTYPE) for part in parts]
        self.starts = np.cumsum([0, *(part.tokens for part in parts)])

        self.files = (folder, parts, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that is given it maps the files for itself."""
        return TokenStream, self.files

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """The tokens `(length,)` from `start` on; after the last comes the first again."""
        pieces = [tokens[a:b] for tokens, _, a, b, _ in self._stretches(start, length)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def read_ends(self, start: int, length: int) -> np.ndarray:
        """Where documents end among these tokens, counted from `start`: ends in `1 ... length - 1`."""
        found = []
        for _, ends, a, b, offset in self._stretches(start, length):
            first, last = np.searchsorted(ends, [a, b], side="right")
            found.append(np.asarray(ends[first:last]) - a + offset)
        ends = found[0] if len(found) == 1 else np.concatenate(found)
        return ends[ends < length]

    def _stretches(self, start: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray, int, int, int]]:
        """Tokens and ends of each part that is touched, from where to where, and what was read before it."""
        done = 0
        while done < length:
            at = (start + done) % len(self)
            number = int(np.searchsorted(self.starts, at, side="right")) - 1
            first = at - int(self.starts[number])
            last = min(first + length - done, len(self.tokens[number]))
            yield self.tokens[number], self.ends[number], first, last, done
            done += last - first
