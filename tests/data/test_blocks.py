"""Cutting loses nothing, and which split a document falls to is its own affair."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palm_pytorch.data import blocks
from palm_pytorch.data.blocks import FEW, Piece, cut, document_blocks, few_splits, split_of, text_blocks
from palm_pytorch.data.duplicates import Seen
from palm_pytorch.data.sources import Document


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 50)
    monkeypatch.setattr(blocks, "SLICE", 7)
    monkeypatch.setattr(blocks, "PIECES", 4)


def document(*chunks: bytes) -> Document:
    return Document("a document", lambda: iter(chunks))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("alphabet", ["ab \n", "ab ", "ab", "\u00e9\u20ac\U0001d11e", "a\U0001d11e\n"])
def test_a_text_is_cut_between_lines_words_or_characters(alphabet: str) -> None:
    rng = random.Random(1)
    for length in (0, 1, 20, 49, 50, 51, 400):
        text = "".join(rng.choices(alphabet, k=length)).encode()
        edges = sorted({0, len(text), *(rng.randrange(len(text) + 1) for _ in range(4))})
        parts = list(cut([text[a:b] for a, b in pairwise(edges)]))
        assert b"".join(parts) == text
        assert all(0 < len(part) <= 50 for part in parts)
        for part, following in pairwise(parts):
            part.decode()
            if b"\n" in part:
                assert part.endswith(b"\n")
            elif b" " in part[1:]:
                assert following.startswith(b" ")


@pytest.mark.usefixtures("small_blocks")
def test_bytes_that_are_no_text_are_cut_too() -> None:
    text = bytes([0x80, 0xFF, 0xC3]) * 100
    assert b"".join(cut([text])) == text


@pytest.mark.usefixtures("small_blocks")
@given(
    texts=st.lists(st.binary(max_size=130), max_size=30), chunk=st.integers(1, 60), deduplicate=st.booleans()
)
def test_every_document_goes_whole_to_one_split(texts: list[bytes], chunk: int, deduplicate: bool) -> None:
    dropped: Counter[str] = Counter()
    documents = [document(*(text[at : at + chunk] for at in range(0, len(text), chunk))) for text in texts]
    found = list(document_blocks(documents, (0.3, 0.2), dropped, deduplicate=deduplicate))
    pieces = [piece for block in found for piece in block]
    assert all(sum(len(piece.text) for piece in block[:-1]) < 50 and len(block) <= 4 for block in found)

    joined: list[Piece] = []
    for piece in pieces:
        if piece.begins:
            assert piece.where == "a document"
            joined.append(piece)
        else:
            assert not joined[-1].ends and joined[-1].split == piece.split
            assert piece.where == f"a document, from byte {len(joined[-1].text)} on"
            joined[-1] = joined[-1]._replace(text=joined[-1].text + piece.text, ends=piece.ends)
    kept = [text for text in texts if text]
    if deduplicate:
        kept = list(dict.fromkeys(kept))
    assert [piece.text for piece in joined] == kept
    assert all(piece.ends for piece in joined)
    assert dropped["empty"] == texts.count(b"")
    assert dropped["duplicates"] == len(texts) - texts.count(b"") - len(kept)
    for piece in joined:
        place = int.from_bytes(hashlib.blake2b(piece.text, digest_size=16).digest()[:8], "little") / 2**64
        assert piece.split == (1 if place < 0.3 else 2 if place < 0.5 else 0)


def test_shares_are_kept() -> None:
    digests = [hashlib.blake2b(str(number).encode(), digest_size=16).digest() for number in range(20_000)]
    counts = Counter(split_of(digest, (0.05, 0.005)) for digest in digests)
    assert abs(counts[1] - 1000) < 4 * 31 and abs(counts[2] - 100) < 4 * 10


def test_a_running_text_has_no_documents() -> None:
    assert list(text_blocks([[b"ab", b"c"], [], [b"d"]], "a text")) == [
        [
            Piece(b"abc", 0, False, False, "a text"),
            Piece(b"d", 2, False, False, "a text, from byte 3 on"),
        ]
    ]


def test_digests_are_remembered_at_sixteen_bytes_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palm_pytorch.data.duplicates.FRESH", 10)
    rng, seen, known = random.Random(2), Seen(), set()
    for _ in range(3000):
        # few values, and many zeros, where strings of numpy are apt to go wrong
        digest = bytes(rng.choices([0, 0, 0, 1, 255], k=4)) + bytes(8) + bytes(rng.choices([0, 7], k=4))
        assert seen.add(digest) == (digest not in known)
        known.add(digest)
    assert sum(array.nbytes for array in seen.sorted) == 16 * (len(known) - len(seen.fresh))
    assert len(seen.sorted) < 12 and len(seen.fresh) < 10


def digest_of(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


@pytest.mark.parametrize("count", [3, 4, 7, 40, FEW - 1])
def test_few_documents_leave_no_split_empty(count: int) -> None:
    """Whatever their hashes and sizes, and whatever order they come in; the largest is trained on."""
    for seed in range(30):
        rng = random.Random(seed)
        texts = [rng.randbytes(rng.choice([20, 300, 5000])) for _ in range(count)]
        splits = few_splits([document(text[:9], text[9:]) for text in texts], (0.05, 0.1))
        assert splits is not None and set(splits) == set(map(digest_of, texts))
        assert set(splits.values()) == {0, 1, 2}
        assert any(splits[digest_of(text)] == 0 for text in texts if len(text) == max(map(len, texts)))
        rng.shuffle(texts)
        assert few_splits([document(text) for text in [*texts, b"", texts[0]]], (0.05, 0.1)) == splits
        total, ordered = sum(map(len, texts)), sorted(texts, key=digest_of)
        valid = [text for text in ordered if splits[digest_of(text)] == 1]
        assert sum(map(len, valid[:-1])) < 0.05 * total  # no more than are needed
        if count == FEW - 1:
            assert sum(map(len, valid)) >= 0.05 * total


def test_many_documents_are_left_to_their_hashes() -> None:
    assert few_splits([document(b"%d" % number) for number in range(FEW)], (0.05, 0.05)) is None
    assert few_splits([document(b"")], (0.05, 0.05)) == {}
    with pytest.raises(ValueError, match="documents: 2 different ones; expected three or more"):
        few_splits([document(b"a"), document(b"b"), document(b"b")], (0.05, 0.05))
