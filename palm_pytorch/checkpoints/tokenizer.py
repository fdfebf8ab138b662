"""The tokenizer beside a model: one file in its folder, written and read by the library that it is of.

tokenizer.json     of Hugging Face's tokenizers
tokenizer.model    of SentencePiece
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class Tokenizer:
    """Text to tokens and back, as a file says: `*.json` for tokenizers, `*.model` for SentencePiece.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its library cannot read it.
        ModuleNotFoundError: its library is not installed.
    """

    def __init__(self, file: str | Path) -> None:
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: expected a tokenizer's file, got none")
        if file.suffix not in (".json", ".model"):
            raise ValueError(f"{file}: expected a tokenizer's .json or SentencePiece's .model")
        self.pieces: Any = None
        self.rules: Any = None
        try:
            if file.suffix == ".json":
                import tokenizers

                self.rules = tokenizers.Tokenizer.from_file(str(file))
            else:
                import sentencepiece

                self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{file.name} needs {error.name}: pip install 'palm_pytorch[tokenizers]'", name=error.name
            ) from error
        except Exception as error:  # whatever the library says of a file that is not its own
            raise ValueError(f"{file}: cannot be read as a tokenizer: {error}") from error

    @property
    def num_tokens(self) -> int:
        """How many tokens it knows; a model may have more."""
        return self.rules.get_vocab_size() if self.rules else self.pieces.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return self.rules.encode(text).ids if self.rules else self.pieces.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return (self.rules or self.pieces).decode(list(tokens))

    def save(self, folder: str | Path) -> Path:
        """Store it in a model's folder, where `find_tokenizer` finds it; gives its file."""
        name = TOKENIZER_FILES[0] if self.rules else TOKENIZER_FILES[1]
        folder = Path(folder)
        partial = folder / f".{name}"
        try:
            if self.rules:
                self.rules.save(str(partial))
            else:
                partial.write_bytes(self.pieces.serialized_model_proto())
            os.replace(partial, folder / name)
        finally:
            partial.unlink(missing_ok=True)
        for other in {*TOKENIZER_FILES} - {name}:  # one that was there before
            (folder / other).unlink(missing_ok=True)
        return folder / name


def find_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer in a model's folder; None where there is none, as for models of bytes."""
    files = (Path(folder) / name for name in TOKENIZER_FILES)
    return next((Tokenizer(file) for file in files if file.is_file()), None)
