"""Documents cut into blocks of about a mebibyte, each piece of text with the split that it belongs to.

A block is what is made tokens of at once. Which text it holds depends on the documents alone, so that a
preparation that was stopped goes on at the same blocks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from palm_pytorch.data.duplicates import Seen
from palm_pytorch.data.sources import Document

BLOCK = 1 << 20  # bytes of text
PIECES = 1 << 12  # and at most so many pieces, where documents are short
SLICE = 1 << 16
SPLITS = ("train", "valid", "test")
SHARES = (0.05, 0.05)  # to validate and to test on, by hash, unless there is much
FEW = 200  # documents, below which chance may well leave a split empty


class Piece(NamedTuple):
    """A document, or a stretch of a long one, of `BLOCK` bytes at most."""

    text: bytes
    split: int  # a number in SPLITS
    begins: bool  # whether it is the first of its document
    ends: bool  # the last
    where: str  # for people


Block = list[Piece]


def document_blocks(
    documents: Iterable[Document],
    shares: tuple[float, float],
    dropped: Counter[str],
    *,
    deduplicate: bool = False,
    chosen: Mapping[bytes, int] | None = None,
) -> Iterator[Block]:
    """The documents in blocks, split by what they say; empty ones and, if asked, duplicates are dropped.

    A document goes to a split by a hash of its bytes: equal ones go to the same, and where it stands and what
    else there is does not matter.

    Args:
        shares: of all documents, to validate and to test on.
        dropped: counts what is dropped, as "empty" and "duplicates".
        deduplicate: by 128-bit BLAKE2b; takes 16 bytes of memory for each document.
        chosen: the splits of documents, by their hashes, where `shares` are not to decide; of `few_splits`.
    """
    seen = Seen() if deduplicate else None

    def pieces() -> Iterator[Piece]:
        for document in documents:
            digest, size, text = read_document(document)
            if size == 0:
                dropped["empty"] += 1
            elif seen is not None and not seen.add(digest):
                dropped["duplicates"] += 1
            else:
                split = split_of(digest, shares) if chosen is None else chosen[digest]
                if size <= BLOCK:
                    yield Piece(text, split, True, True, document.where)
                else:
                    yield from _mark(document, split)

    return _gather(pieces())


def text_blocks(parts: Iterable[Iterable[bytes]], where: str) -> Iterator[Block]:
    """One running text, already split, in blocks; its documents have neither beginning nor end."""

    def pieces() -> Iterator[Piece]:
        start = 0
        for split, part in enumerate(parts):
            for text in cut(part):
                yield Piece(text, split, False, False, _stretch(where, start))
                start += len(text)

    return _gather(pieces())


def split_of(digest: bytes, shares: tuple[float, float]) -> int:
    """The number in `SPLITS` of a document with that hash; `shares` are those of "valid" and "test"."""
    place = int.from_bytes(digest[:8], "little") / 2**64
    valid, test = shares
    return 1 if place < valid else 2 if place < valid + test else 0


def few_splits(documents: Iterable[Document], shares: tuple[float, float]) -> dict[bytes, int] | None:
    """The splits of documents, by their hashes, if there are few; None if there are `FEW` or more.

    In the order of their hashes they go to "valid" until that has its share of all bytes, then likewise to
    "test". The largest is always trained on.

    Raises:
        ValueError: there are fewer than three.
    """
    sizes: dict[bytes, int] = {}
    for document in documents:
        digest, size, _ = read_document(document)
        if size:
            sizes[digest] = size
        if len(sizes) >= FEW:
            return None
    if 0 < len(sizes) < 3:
        raise ValueError(
            f"documents: {len(sizes)} different ones; expected three or more, to train, validate and test "
            "on, or a single file of plain text, which is split by position"
        )
    if not sizes:
        return {}
    splits = dict.fromkeys(sizes, 0)
    waiting = sorted(sizes.keys() - {max(sizes, key=lambda digest: (sizes[digest], digest))}, reverse=True)
    for split, share in enumerate(shares, start=1):
        taken = 0
        while len(waiting) > len(shares) - split and (not taken or taken < share * sum(sizes.values())):
            digest_of = waiting.pop()
            splits[digest_of] = split
            taken += sizes[digest_of]
    return splits


def read_document(document: Document) -> tuple[bytes, int, bytes]:
    """The hash that a document is recognised by, its size, and its text if that is a block at most."""
    digest, size, text = hashlib.blake2b(digest_size=16), 0, b""
    for chunk in document.chunks():
        digest.update(chunk)
        size += len(chunk)
        text = text + chunk if text and size <= BLOCK else chunk
    return digest.digest(), size, text


def cut(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """A text in stretches of `BLOCK` bytes at most: after a line's end if there is one, else before a space,
    else between characters."""
    rest = bytearray()
    for chunk in chunks:
        for start in range(0, len(chunk), SLICE):
            rest += chunk[start : start + SLICE]
            while len(rest) > BLOCK:
                end = rest.rfind(b"\n", 0, BLOCK) + 1 or max(rest.rfind(b" ", 1, BLOCK), 0)
                end = end or character_start(rest, BLOCK)
                yield bytes(rest[:end])
                del rest[:end]
    if rest:
        yield bytes(rest)


def character_start(text: bytes | bytearray, place: int) -> int:
    """`place`, or the start of the UTF-8 character that it is in the middle of (RFC 3629, section 3)."""
    start = place
    while start > place - 3 and start > 0 and text[start] & 0xC0 == 0x80:
        start -= 1
    return start if text[start] & 0xC0 == 0xC0 else place


def _mark(document: Document, split: int) -> Iterator[Piece]:
    texts = cut(document.chunks())
    text, start = next(texts), 0
    for following in texts:
        yield Piece(text, split, start == 0, False, _stretch(document.where, start))
        text, start = following, start + len(text)
    yield Piece(text, split, start == 0, True, _stretch(document.where, start))


def _stretch(where: str, start: int) -> str:
    return f"{where}, from byte {start:,} on" if start else where


def _gather(pieces: Iterable[Piece]) -> Iterator[Block]:
    block: Block = []
    size = 0
    for piece in pieces:
        block.append(piece)
        size += len(piece.text)
        if size >= BLOCK or len(block) >= PIECES:
            yield block
            block, size = [], 0
    if block:
        yield block
