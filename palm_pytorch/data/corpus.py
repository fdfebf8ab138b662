"""A corpus: the bytes of a text, wherever they come from, as one read-only memory map.

No corpus is ever held in memory. A plain file is mapped in place; a compressed one is streamed, once, into a
plain copy under the data folder.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import sysconfig
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from palm_pytorch.data.streams import (
    MAGIC,
    Expected,
    compression,
    download,
    list_files,
    publish,
    read_files,
)

# What not every installation of the same Python carries, or what is hardly source code.
NOT_EVERYWHERE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3"}
CHUNK = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """A text as bytes.

    Attributes:
        name: `"enwik8"` for its exact bytes, wherever they lie; otherwise the name of the file.
        tokens: `(length,)` uint8, a read-only memory map; one token per byte.
        path: the plain file behind the map. `open_corpus(corpus.path, ...)` gives the same tokens.
        origin: one line that tells people where the bytes came from.
        fingerprint: recognises the same bytes again, see `fingerprint`.
    """

    name: str
    tokens: np.ndarray
    path: Path
    origin: str
    fingerprint: str

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that is given it maps the file for itself."""
        return _reopen, (self.name, self.path, self.origin, self.fingerprint)


@dataclass(frozen=True)
class Published:
    """A corpus whose bytes are known, and the addresses, in the order to try, of a zip archive of it.

    alphabet: the bytes that occur in it, for one whose SHA-256 is not known.
    """

    name: str
    urls: tuple[str, ...]
    archive: Expected
    content: Expected
    alphabet: bytes | None = None

    def check(self, corpus: Corpus) -> None:
        """Raise a ValueError unless `corpus` is this one."""
        size, sha256 = self.content.size, self.content.sha256
        right = len(corpus.tokens) == size and sha256 in (None, corpus.fingerprint)
        if right and self.alphabet is not None:
            found: set[int] = set()
            for start in range(0, size, CHUNK):  # of each byte numpy makes eight
                found.update(np.flatnonzero(np.bincount(corpus.tokens[start : start + CHUNK])).tolist())
            right = found == set(self.alphabet)
        if not right:
            what = f"sha256 {sha256}" if sha256 else f"of {len(self.alphabet or b'')} different ones"
            raise ValueError(
                f"{corpus.path} ({len(corpus.tokens):,} bytes) is not {self.name} ({size:,} bytes, {what}); "
                f"remove it, or train on it with --data {corpus.path}"
            )


ENWIK8 = Published(
    name="enwik8",
    urls=("https://mattmahoney.net/dc/enwik8.zip", "https://data.deepai.org/enwik8.zip"),
    archive=Expected(36_445_475, "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
    content=Expected(100_000_000, "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"),
)
# Letters and spaces alone. Of its SHA-256 there is no authoritative record.
TEXT8 = Published(
    name="text8",
    urls=("https://mattmahoney.net/dc/text8.zip",),
    archive=Expected(31_344_016),
    content=Expected(100_000_000),
    alphabet=b" abcdefghijklmnopqrstuvwxyz",
)


def find_published(source: str | Path | None) -> Published | None:
    """The corpus that a string names, if it names one; a `Path` names a file."""
    named = (
        published for published in (ENWIK8, TEXT8) if isinstance(source, str) and source == published.name
    )
    return next(named, None)


def open_corpus(source: str | Path | None, data_dir: str | Path) -> Corpus:
    """Opens the corpus that `source` names, after checking all that can be checked before training starts.

    Args:
        source: a file of text, plain or compressed (`.gz`, `.bz2`, `.xz`, `.zip`, `.zst`); the string
            `"enwik8"` or `"text8"` for these and nothing else; None for Enwik8 or, where it can be neither
            found nor downloaded, the source code of the running Python's standard library, after a loud
            message.
        data_dir: where downloads and plain copies are looked for and kept.

    Several processes may open the same corpus at once, but each then unpacks it for itself: let one go first.

    Raises:
        FileNotFoundError: `source` does not exist, or a corpus by name can be neither found nor downloaded.
        ValueError: a file is damaged, cut short, empty, a device, a pipe or a folder, or not what its name
            says.
        ModuleNotFoundError: a `.zst` file, and nothing is installed that reads it.
        OSError: a file cannot be read, or `data_dir` cannot be written. Every message names the file.
    """
    data_dir = Path(data_dir)
    if source is not None:
        published = find_published(source)
        return find_or_download(published, data_dir) if published else _open_path(source, data_dir)
    try:
        return find_or_download(ENWIK8, data_dir)
    except FileNotFoundError as error:
        corpus = _open_standard_library(data_dir)
        rule = "=" * 100
        print(
            f"{rule}\nWARNING: this run does not train on Enwik8.\n{error}\n\n"
            f"Until then it trains on {corpus.origin} ({len(corpus.tokens):,} bytes):\n"
            "its scores cannot be compared with those on Enwik8. With --data enwik8 it would stop here.\n"
            f"{rule}",
            file=sys.stderr,
            flush=True,
        )
        return corpus


def find_or_download(published: Published, data_dir: Path) -> Corpus:
    """A published corpus, from `data_dir` (plain, or compressed with its suffix added) or from its addresses.

    Raises:
        FileNotFoundError: it is not there and no address gave it; says what was tried and what to do.
        ValueError: what is there under its name is not it.
    """
    plain = data_dir / published.name
    origin = str(plain)
    if not plain.exists():
        packed = next((path for suffix in MAGIC if (path := Path(f"{plain}{suffix}")).exists()), None)
        origin = str(packed)
        if packed is None:
            packed = Path(f"{plain}.zip")
            origin = _download_archive(published, packed)
        try:
            publish(read_files([packed]), plain, published.content)
        except ValueError as error:
            raise ValueError(f"{packed} does not hold {published.name}; remove it. ({error})") from error
    corpus = _map(plain, published.name, origin)
    published.check(corpus)
    return corpus


def fingerprint(tokens: np.ndarray) -> str:
    """A SHA-256, in hexadecimal, that recognises a corpus; a second's work however long that is.

    Up to 128 MiB it is the hash of all bytes. Beyond, it is that of the length and of 128 evenly spread
    blocks of 1 MiB, first and last included: an edit between them that keeps the length goes unseen.
    """
    block, blocks = 1 << 20, 1 << 7
    if len(tokens) <= block * blocks:
        return hashlib.sha256(tokens.data).hexdigest()
    digest = hashlib.sha256(str(len(tokens)).encode())
    for start in np.linspace(0, len(tokens) - block, blocks, dtype=np.int64):
        digest.update(tokens[start : start + block].data)
    return digest.hexdigest()


def _reopen(name: str, path: Path, origin: str, known: str) -> Corpus:
    return Corpus(name, np.memmap(path, dtype=np.uint8, mode="r"), path, origin, known)


def _map(path: Path, name: str, origin: str) -> Corpus:
    if path.stat().st_size == 0:
        raise ValueError(f"{origin} is empty")
    tokens = np.memmap(path, dtype=np.uint8, mode="r")
    found = fingerprint(tokens)
    return Corpus(ENWIK8.name if found == ENWIK8.content.sha256 else name, tokens, path, origin, found)


def _download_archive(published: Published, target: Path) -> str:
    """Downloads to `target` from the first address that gives the right bytes, and returns that address."""
    failures = []
    for url in published.urls:
        try:
            publish(download(url, published.archive.size), target, published.archive)
        except (OSError, HTTPException, ValueError) as error:
            failures.append(f"  {url}: {error or type(error).__name__}\n")
        else:
            return url
    raise FileNotFoundError(
        f"{target.with_suffix('')} does not exist (nor with {', '.join(MAGIC)} after it), "
        f"and no address gave it:\n{''.join(failures)}"
        f"Download {published.urls[0]} ({published.archive.size:,} bytes) where that works and put it at\n"
        f"{target.resolve()}, or train on another text with --data PATH."
    )


def _open_path(source: str | Path, data_dir: Path) -> Corpus:
    path = Path(source).expanduser()
    if source == "" or not path.exists():
        raise FileNotFoundError(f"{str(source)!r} does not exist: expected a file, 'enwik8' or 'text8'")
    if list_files(path) != [path]:
        raise ValueError(f"{path} is a folder; expected a file, 'enwik8' or 'text8'")
    name = path.resolve().name
    if not compression(path):
        return _map(path, name, str(path))
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)]
    key = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
    # Hidden, so that it is no part of a folder of text in which the data folder lies.
    copy = data_dir / ".cache" / f"{name}-{key}"
    if not copy.exists():
        publish(read_files([path]), copy)
    return _map(copy, name, f"{path} (plain copy: {copy})")


def _open_standard_library(data_dir: Path) -> Corpus:
    name = f"python-{platform.python_version()}-stdlib.txt"
    copy = data_dir / name
    if not copy.exists():
        files = list_files(Path(sysconfig.get_path("stdlib")), leave_out=NOT_EVERYWHERE)
        publish(read_files([file for file in files if file.suffix == ".py"]), copy)
    return _map(copy, name, f"the source code of Python {platform.python_version()}'s standard library")
