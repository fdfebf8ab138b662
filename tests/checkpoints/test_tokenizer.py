"""Tokenizers beside a model, of either library."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers

from palm_pytorch.checkpoints import Tokenizer, find_tokenizer

TEXT = "the cat saw the dog"


@pytest.fixture
def words(tmp_path: Path) -> Path:
    vocabulary = {word: n for n, word in enumerate(["[UNK]", "the", "cat", "saw", "dog"])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    (tmp_path / "text").write_text(f"{TEXT}\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "pieces"),
        vocab_size=15,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return tmp_path / "pieces.model"


@pytest.mark.parametrize(
    ("made", "name", "size"), [("words", "tokenizer.json", 5), ("pieces", "tokenizer.model", 14)]
)
def test_stored_and_found(
    made: str, name: str, size: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    given = Tokenizer(request.getfixturevalue(made))
    assert given.save(folder) == folder / name
    found = find_tokenizer(folder)
    assert found is not None and found.num_tokens >= size
    assert found.encode(TEXT) == given.encode(TEXT) and len(found.encode(TEXT)) > 4
    assert found.decode(found.encode(TEXT)) == TEXT


def test_the_last_one_stored_is_found(words: Path, pieces: Path, tmp_path: Path) -> None:
    for file in (words, pieces, words):
        Tokenizer(file).save(tmp_path)
        found = find_tokenizer(tmp_path)
        assert found is not None and found.num_tokens == Tokenizer(file).num_tokens
        assert len([*tmp_path.glob("tokenizer.*")]) == 1


def test_a_model_of_bytes_has_none(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "raised", "says"),
    [
        ("tokenizer.json", ValueError, "cannot be read as a tokenizer"),
        ("tokenizer.model", ValueError, "cannot be read as a tokenizer"),
        ("vocabulary.txt", ValueError, r"expected a tokenizer's .json or SentencePiece's .model"),
        ("nowhere.json", FileNotFoundError, "expected a tokenizer's file, got none"),
    ],
)
def test_a_file_that_is_none(name: str, raised: type[Exception], says: str, tmp_path: Path) -> None:
    if name != "nowhere.json":
        (tmp_path / name).write_text("half a fi")
    with pytest.raises(raised, match=says):
        Tokenizer(tmp_path / name)


@pytest.mark.parametrize("package", ["tokenizers", "sentencepiece"])
def test_without_its_library(
    package: str, words: Path, pieces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"needs {package}: pip install 'palm_pytorch\[tokenizers\]'"
    ):
        Tokenizer(words if package == "tokenizers" else pieces)
