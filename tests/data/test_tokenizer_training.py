"""Tokenizers made here: their size and pieces, the same each time, and texts that are too small for them."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator

import pytest

from palm_pytorch.data.tokenizer_files import SentencePieceTokenizer
from palm_pytorch.data.tokenizer_training import SENTENCE_LENGTH, TokenizerKind, sentences, train_tokenizer

DRAW = random.Random(0)
WORDS = ["".join(DRAW.choices("etaoins", k=DRAW.randint(2, 6))) for n in range(200)]
TEXT = "".join(f"  {word} 31,\t{word}s\n" for word in DRAW.choices(WORDS, k=600))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces(kind: TokenizerKind) -> None:
    content = train_tokenizer([TEXT], kind=kind, vocab_size=320)
    tokenizer = SentencePieceTokenizer(content)
    assert tokenizer.num_tokens == 320 and tokenizer.eos_token == 1
    assert train_tokenizer([TEXT], kind=kind, vocab_size=320) == content
    assert {bytes([b]) for b in range(256)} <= set(tokenizer.contents)
    learned = [piece for piece in tokenizer.contents[2:] if len(piece) > 1]
    assert any(len(piece) >= 4 for piece in learned)
    assert not any(re.search(rb"[0-9\n\t]", piece) for piece in learned)  # digits and lines are split
    assert len(tokenizer.encode(TEXT)) < len(TEXT) * 0.8
    newline, nine = tokenizer.encode("\n"), tokenizer.encode("999")
    assert len(newline) == 1 and len(nine) == 3


@pytest.mark.parametrize(
    ("text", "vocab_size", "says"),
    [
        (TEXT, 32_000, r"vocab_size is 32,000; this text gives at most \d{3} tokens"),
        (TEXT, 100, r"vocab_size is 100; this text needs at least 2\d\d tokens"),
        ("", 300, r"the text to train a tokenizer on is empty"),
        ("\n\n\t", 300, r"the text to train a tokenizer on is empty"),
    ],
)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_text_that_does_not_suit_the_size(
    text: str, vocab_size: int, says: str, kind: TokenizerKind
) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        train_tokenizer([text], kind=kind, vocab_size=vocab_size)
    if "at most" in says:  # the size it names works
        most = int(re.findall(r"[\d,]+(?= tokens)", str(raised.value))[0].replace(",", ""))
        assert SentencePieceTokenizer(train_tokenizer([text], kind=kind, vocab_size=most)).num_tokens == most


def test_lines_are_sentences_of_bounded_length() -> None:
    long = "x" * (2 * SENTENCE_LENGTH + 1)
    found = [*sentences(["a  b\n c\td\0e", "", long])]
    assert found == ["a  b", " c", "d", "e", long[:SENTENCE_LENGTH], long[:SENTENCE_LENGTH], "x"]


@pytest.mark.parametrize("failure", [ValueError("a.jsonl, line 2: no text"), KeyboardInterrupt()])
def test_what_reading_the_texts_raises_comes_as_it_was(failure: BaseException) -> None:
    def texts() -> Iterator[str]:
        yield TEXT
        raise failure

    with pytest.raises(type(failure)) as raised:
        train_tokenizer(texts())
    assert raised.value is failure


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install sentencepiece"):
        train_tokenizer([TEXT])
