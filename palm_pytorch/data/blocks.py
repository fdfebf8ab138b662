"""Documents cut into blocks of about a mebibyte, each piece of text with the split that it belongs to.

A block is what is made tokens of at once. Which text it holds depends on the documents alone, so that a
preparation that was stopped goes on at the same blocks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from palm_pytorch.data.duplicates import Seen
from palm_pytorch.data.sources import Document

BLOCK = 1 << 20  # bytes of text
PIECES = 1 << 12  # and at most so many pieces, where documents are short
SLICE = 1 << 16
SPLITS = ("train", "valid", "test")


class Piece(NamedTuple):
    """A document, or a stretch of a long one, of `BLOCK` bytes at most."""

    text: bytes
    split: int  # a number in SPLITS
    begins: bool  # whether it is the first of its document
    ends: bool  # the last


Block = list[Piece]


def document_blocks(
    documents: Iterable[Document],
    shares: tuple[float, float],
    dropped: Counter[str],
    *,
    deduplicate: bool = False,
) -> Iterator[Block]:
    """The documents in blocks, split by what they say; empty ones and, if asked, duplicates are dropped.

    A document goes to a split by a hash of its bytes: equal ones go to the same, and where it stands and what
    else there is does not matter.

    Args:
        shares: of all documents, to validate and to test on.
        dropped: counts what is dropped, as "empty" and "duplicates".
        deduplicate: by 128-bit BLAKE2b; takes 16 bytes of memory for each document.
    """
    seen = Seen() if deduplicate else None

    def pieces() -> Iterator[Piece]:
        for document in documents:
            digest, size, text = hashlib.blake2b(digest_size=16), 0, b""
            for chunk in document():
                digest.update(chunk)
                size += len(chunk)
                text = text + chunk if text and size <= BLOCK else chunk
            if size == 0:
                dropped["empty"] += 1
            elif seen is not None and not seen.add(digest.digest()):
                dropped["duplicates"] += 1
            else:
                split = split_of(digest.digest(), shares)
                if size <= BLOCK:
                    yield Piece(text, split, True, True)
                else:
                    yield from _mark(cut(document()), split)

    return _gather(pieces())


def text_blocks(parts: Iterable[Iterable[bytes]]) -> Iterator[Block]:
    """One running text, already split, in blocks; its documents have neither beginning nor end."""
    return _gather(Piece(text, split, False, False) for split, part in enumerate(parts) for text in cut(part))


def split_of(digest: bytes, shares: tuple[float, float]) -> int:
    """The number in `SPLITS` of a document with that hash; `shares` are those of "valid" and "test"."""
    place = int.from_bytes(digest[:8], "little") / 2**64
    valid, test = shares
    return 1 if place < valid else 2 if place < valid + test else 0


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


def _mark(texts: Iterator[bytes], split: int) -> Iterator[Piece]:
    text, begins = next(texts), True
    for following in texts:
        yield Piece(text, split, begins, False)
        text, begins = following, False
    yield Piece(text, split, begins, True)


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
