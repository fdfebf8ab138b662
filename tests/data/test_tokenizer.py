"""Tokenizers of every kind: what is encoded comes back, each byte is counted, and another one is refused."""

from __future__ import annotations

import hashlib
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from palm_pytorch.data.tokenizer import (
    ByteTokenizer,
    IntegerTokenizer,
    Tokenizer,
    expect_tokenizer,
    load_tokenizer,
    stored_tokenizer,
)
from palm_pytorch.data.tokenizer_files import HuggingFaceTokenizer, SentencePieceTokenizer
from palm_pytorch.data.tokenizer_training import train_tokenizer

DRAW = random.Random(0)
WORDS = ["".join(DRAW.choices("etaoins", k=DRAW.randint(2, 6))) for n in range(99)]
TEXT = "the cat saw 1984 dogs,  and\tthe dogs saw\n\n    the cat. " + " ".join(DRAW.choices(WORDS, k=300))
HALF = "\N{REPLACEMENT CHARACTER}"
AWKWARD = [
    "\0",
    "<s></s><unk><0x0A>",
    "\u2581 \u2581\u2581a",
    "\r\n \n",
    "\ufffd\ufeff\x1b",
    "<|endoftext|>",
    "😀e\u0301",
]
KINDS = ["bytes", "bpe", "unigram", "hugging face"]


def byte_level() -> bytes:
    """As GPT-NeoX's: a BPE on bytes, but with no normalisation."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|padding|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return made.to_str().encode()


@pytest.fixture(scope="module")
def of_kind() -> dict[str, Tokenizer]:
    return {
        "bytes": ByteTokenizer(),
        "bpe": SentencePieceTokenizer(train_tokenizer([TEXT], kind="bpe", vocab_size=300)),
        "unigram": SentencePieceTokenizer(train_tokenizer([TEXT], kind="unigram", vocab_size=310)),
        "hugging face": HuggingFaceTokenizer(byte_level()),
    }


# ---------------------------------------------------------------------------------------------- no losses


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back(kind: str, of_kind: dict[str, Tokenizer]) -> None:
    tokenizer = of_kind[kind]

    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(
        st.text()
        | st.lists(st.sampled_from(["a", " ", "\n", "\t", "1", "the", "\u2581", "</s>", "é"])).map("".join)
    )
    def check(text: str) -> None:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.num_bytes(tokens) == len(text.encode())
        assert tokens.dtype == tokenizer.dtype and (tokens < tokenizer.num_tokens).all()
        assert tokenizer.eos_token not in tokens
        decode = tokenizer.decoder()
        assert "".join(decode(token) for token in [*tokens.tolist(), None]) == text

    for text in AWKWARD:
        check = example(text)(check)
    check()


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_any_bytes_come_back(kind: str, of_kind: dict[str, Tokenizer]) -> None:
    tokenizer = of_kind[kind]

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(st.binary() | st.lists(st.sampled_from([b"\xff", b"a", b"\xc3", b"\xa9", b"the "])).map(b"".join))
    def check(content: bytes) -> None:
        assert tokenizer.decode_bytes(tokenizer.encode(content)) == content
        as_argument = content.decode("utf-8", errors="surrogateescape")  # as Python gets it from a shell
        assert tokenizer.decode_bytes(tokenizer.encode(as_argument)) == content

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_invalid_bytes(kind: str, of_kind: dict[str, Tokenizer]) -> None:
    tokenizer = of_kind[kind]
    with pytest.raises(ValueError, match=r"text: byte 0xff at 2 is not UTF-8, and invalid_bytes is 'refuse'"):
        tokenizer.encode(b"ab\xffc", "refuse")
    assert tokenizer.decode(tokenizer.encode(b"ab\xffc", "replace")) == f"ab{HALF}c"
    assert tokenizer.decode(tokenizer.encode("é".encode(), "refuse")) == "é"
    with pytest.raises(ValueError):  # no byte of anything
        tokenizer.encode("\ud800")


def test_a_library_of_strings_cannot_keep_them(of_kind: dict[str, Tokenizer]) -> None:
    with pytest.raises(ValueError, match=r"byte 0xff at character 1 is not UTF-8, and this tokenizer cannot"):
        of_kind["hugging face"].encode("é".encode() + b"\xff")


def test_tokens_are_those_of_the_library(of_kind: dict[str, Tokenizer]) -> None:
    """Ours encodes a BPE word by word, and keeps what it has seen."""
    for kind in ("bpe", "unigram"):
        tokenizer = of_kind[kind]
        assert isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.by_words == (kind == "bpe")
        for text in (TEXT, "  the  cat\n\n  saw" * 2, "dogs,the\r\ncat" * 2):
            assert tokenizer.encode(text).tolist() == tokenizer.pieces.encode(text)
    found = of_kind["hugging face"].encode(TEXT).tolist()
    assert found == tokenizers.Tokenizer.from_str(byte_level().decode()).encode(TEXT).ids
    assert len(found) < len(TEXT) * 0.7


def test_pieces_of_several_new_lines(tmp_path: Path) -> None:
    """Then lines are not apart, and are not encoded one by one."""
    (tmp_path / "text").write_text(f"{TEXT}\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "pieces"),
        user_defined_symbols=["\n", "\n\n", "\n\n\n"],
        **{"model_type": "bpe", "vocab_size": 320, "byte_fallback": True, "minloglevel": 2},
        **{"normalization_rule_name": "identity", "add_dummy_prefix": False},
        remove_extra_whitespaces=False,
    )
    tokenizer = load_tokenizer(tmp_path / "pieces.model")
    assert isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.byte_tokens
    for text in ("the\n\ncat", "saw\n\n\n\n dogs\n"):
        assert tokenizer.encode(text).tolist() == tokenizer.pieces.encode(text)


def test_ids_with_gaps() -> None:
    """As where tokens were taken out, or added far behind the others."""
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 5, "c": 600, "<unk>": 900}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = HuggingFaceTokenizer(made.to_str().encode())
    tokens = tokenizer.encode("a c b x")
    assert tokens.tolist() == [0, 600, 5, 900] and tokens.dtype == np.uint16
    assert tokenizer.num_tokens == 901


def test_a_batch_is_each_of_its_texts(of_kind: dict[str, Tokenizer]) -> None:
    for tokenizer in of_kind.values():
        found = tokenizer.encode_batch([TEXT, b"", "a\u2581"])
        assert [tokens.tolist() for tokens in found] == [
            tokenizer.encode(text).tolist() for text in (TEXT, "", "a\u2581")
        ]


def test_tokens_that_only_the_model_has_are_no_text(of_kind: dict[str, Tokenizer]) -> None:
    """A vocabulary is often rounded up, and a model may draw what is beyond its tokenizer's."""
    for tokenizer in of_kind.values():
        tokens = tokenizer.encode("some text").astype(np.int64)
        beyond = np.concatenate([tokens[:2], [tokenizer.num_tokens, tokenizer.num_tokens + 63], tokens[2:]])
        assert tokenizer.decode(beyond) == tokenizer.decode(tokens)


def test_the_end_token_stands_for_no_text(of_kind: dict[str, Tokenizer]) -> None:
    assert {kind: tokenizer.eos_token for kind, tokenizer in of_kind.items()} == {
        **{"bytes": 0xFF, "bpe": 1, "unigram": 1},
        "hugging face": 1,
    }
    for tokenizer in of_kind.values():
        tokens = [*tokenizer.encode("cat").tolist(), tokenizer.eos_token]
        assert tokenizer.num_bytes(tokens) == 3


def test_one_that_adds_a_space_in_front(tmp_path: Path) -> None:
    """As SentencePiece makes by default: its texts come back, and tokens after a prompt keep their spaces."""
    (tmp_path / "text").write_text(f"{TEXT}\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "pieces"),
        **{"vocab_size": 30, "hard_vocab_limit": False, "minloglevel": 2},
    )
    tokenizer = load_tokenizer(tmp_path / "pieces.model")
    tokens = tokenizer.encode("the cat saw").tolist()
    assert tokenizer.decode(tokens) == "the cat saw"
    decode = tokenizer.decoder()
    assert "".join(decode(token) for token in [*tokens, None]) == " the cat saw"
    with pytest.raises(ValueError, match="cannot keep it"):
        tokenizer.encode(b"\xff")


# ----------------------------------------------------------------------------------- pieces, as they come


def shown(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    decode = tokenizer.decoder()
    return [decode(token) for token in [*tokens, None]]


def test_characters_of_several_bytes_come_whole(of_kind: dict[str, Tokenizer]) -> None:
    tokens = ByteTokenizer().encode("aé€😀b").tolist()
    assert tokens == list("aé€😀b".encode())
    assert shown(ByteTokenizer(), tokens) == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]
    assert shown(ByteTokenizer(), [0xE2, 0x82]) == ["", "", HALF]
    assert shown(ByteTokenizer(), [0xE2, 0x41, 0xFF]) == ["", HALF + "A", HALF, ""]
    for kind in ("bpe", "unigram"):
        tokens = of_kind[kind].encode("€\u2581").tolist()
        assert shown(of_kind[kind], tokens) == ["", "", "€", "", "", "\u2581", ""]


class Words(HuggingFaceTokenizer):
    """Words with a space before them, but at the start; tokens above 90 are bytes."""

    def __init__(self) -> None:
        pass

    def decode(self, tokens: list[int]) -> str:  # type: ignore[override]
        text = b"".join(bytes([t]) if t > 90 else b" w%d" % t for t in tokens)
        return text.decode(errors="replace").removeprefix(" ")


def test_tokens_come_with_their_spaces() -> None:
    euro = list("€".encode())
    found = shown(Words(), [1, 2, *euro, 3, *[7] * 20, euro[0]])
    assert found == ["w1", " w2", "", "", "€", " w3", *[" w7"] * 20, "", HALF]


# ---------------------------------------------------------------------------------------------- integers


def test_integers_are_their_own_text() -> None:
    tokenizer = load_tokenizer("integers-300")
    assert tokenizer.num_tokens == 301 and tokenizer.dtype == np.uint16 and tokenizer.eos_token == 300
    assert tokenizer.encode("0 7\n299").tolist() == [0, 7, 299]
    assert tokenizer.decode([0, 7, 299]) == "0 7 299 " and tokenizer.num_bytes([300, 0, 299]) == 2
    for text in ("301", "-1", "a", "1.5"):
        with pytest.raises(ValueError, match=rf"expected numbers from 0 to 300, got '{text}'"):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match="num_values is 0"):
        IntegerTokenizer(0)


# ------------------------------------------------------------------------------------------- in a folder


@pytest.mark.parametrize("kind", [*KINDS, "integers"])
def test_stored_and_found(kind: str, of_kind: dict[str, Tokenizer], tmp_path: Path) -> None:
    given = {**of_kind, "integers": IntegerTokenizer(300)}[kind]
    of_kind["unigram"].save(tmp_path)  # is replaced
    of_kind["hugging face"].save(tmp_path)
    given.save(tmp_path)
    files = [*tmp_path.iterdir()]
    found = stored_tokenizer(tmp_path)
    if kind == "bytes":
        assert found is None and files == []
        return
    assert found is not None and len(files) == 1
    assert found.fingerprint == given.fingerprint and found.num_tokens == given.num_tokens
    if kind != "integers":
        assert given.fingerprint == hashlib.sha256(files[0].read_bytes()).hexdigest()
        assert found.encode(TEXT).tolist() == given.encode(TEXT).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_worker_processes_get_the_same(kind: str, of_kind: dict[str, Tokenizer]) -> None:
    copy = pickle.loads(pickle.dumps(of_kind[kind]))
    assert copy.encode(TEXT).tolist() == of_kind[kind].encode(TEXT).tolist()


def test_another_one_is_refused(of_kind: dict[str, Tokenizer]) -> None:
    bpe, other = of_kind["bpe"], of_kind["unigram"]
    assert expect_tokenizer(bpe, bpe.fingerprint, "the run in runs/x") is bpe
    says = rf"tokenizer is SentencePiece, 310 .*; the run in runs/x has another \({bpe.fingerprint[:12]}\)"
    with pytest.raises(ValueError, match=says):
        expect_tokenizer(other, bpe.fingerprint, "the run in runs/x")


@pytest.mark.parametrize(
    ("name", "raised", "says"),
    [
        ("tokenizer.json", ValueError, "cannot be read as a tokenizer"),
        ("tokenizer.model", ValueError, "cannot be read as a tokenizer"),
        ("tokenizer.integers", ValueError, "cannot be read as a tokenizer"),
        ("vocabulary.txt", ValueError, r"expected a tokenizer's .json or SentencePiece's .model"),
        ("nowhere.json", FileNotFoundError, "expected 'bytes' or a tokenizer's file, got none"),
    ],
)
def test_a_file_that_is_none(name: str, raised: type[Exception], says: str, tmp_path: Path) -> None:
    if name != "nowhere.json":
        (tmp_path / name).write_text("half a fi")
    with pytest.raises(raised, match=says):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize(("package", "name"), [("tokenizers", "a.json"), ("sentencepiece", "a.model")])
def test_without_its_library(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}: pip install {package}"):
        load_tokenizer(tmp_path / name)
