"""Tokenizers: text as the token ids of a model, and back, without loss.

`"bytes"`        every byte is a token; needs no file and no library
`*.model`        SentencePiece
`*.json`         Hugging Face's tokenizers
`"integers-N"`   no text at all: numbers below N, as pixels or notes are; its file is `*.integers`

Shapes: n tokens.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from palm_pytorch.data.durable import write_durably

InvalidBytes = Literal["keep", "refuse", "replace"]
# Where `save` puts a tokenizer in a folder, whatever its file was called.
TOKENIZER_FILES = {suffix: f"tokenizer{suffix}" for suffix in (".json", ".model", ".integers")}


class Tokenizer(ABC):
    """Text to tokens and back.

    Attributes:
        num_tokens: how many there are; a model may have more.
        eos_token: the one that ends a document and stands for no text, or None.
        unit: what `num_bytes` counts, for people.
        fingerprint: the SHA-256 of its file in hexadecimal; a fixed word where there is none.
        file: name and content of its file in a run's or a model's folder, or None.
    """

    num_tokens: int
    eos_token: int | None = None
    unit = "byte"
    fingerprint: str
    file: tuple[str, bytes] | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest in which a token fits."""
        return np.min_scalar_type(self.num_tokens - 1)

    @abstractmethod
    def encode(self, text: str | bytes, invalid_bytes: InvalidBytes = "keep") -> np.ndarray:
        """The tokens `(n,)` of a text, which is taken literally: no part of it becomes a special token.

        invalid_bytes: what happens to bytes that are not UTF-8: they are kept, the text is refused, or each
        becomes U+FFFD. Strings may hold them as Python's "surrogateescape" does.

        Raises:
            ValueError: there are such bytes, and they are refused or cannot be kept.
        """

    @abstractmethod
    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that tokens stand for."""

    def encode_batch(
        self, texts: Sequence[str | bytes], invalid_bytes: InvalidBytes = "keep"
    ) -> list[np.ndarray]:
        """As `encode`, each; quicker than one by one where the library is."""
        return [self.encode(text, invalid_bytes) for text in texts]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of tokens, for people: what is not valid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def num_bytes(self, tokens: Sequence[int] | np.ndarray) -> int:
        """How many bytes of text tokens stand for, so that nats can become bits per byte."""
        return len(self.decode_bytes(tokens))

    def decoder(self) -> Callable[[int | None], str]:
        """What each token adds to a text, whole characters only; None, the end, gives what is left."""
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        return lambda token: decode(b"" if token is None else self.decode_bytes([token]), final=token is None)

    def save(self, folder: str | Path) -> None:
        """Store it in a run's or a model's folder, where `stored_tokenizer` finds it; bytes need no file."""
        folder = Path(folder)
        name, content = self.file or (None, b"")
        if name is not None:
            write_durably(folder / name, content)
        for other in {*TOKENIZER_FILES.values()} - {name}:  # one that was there before
            (folder / other).unlink(missing_ok=True)

    def __str__(self) -> str:
        kind = type(self).__name__.removesuffix("Tokenizer")
        return f"{kind}, {self.num_tokens:,} tokens ({self.fingerprint[:12]})"


class ByteTokenizer(Tokenizer):
    """A token is a byte. The end token is 0xFF, which occurs in no UTF-8 (RFC 3629, section 1)."""

    num_tokens = 256
    eos_token = 0xFF
    fingerprint = "bytes"

    def encode(self, text: str | bytes, invalid_bytes: InvalidBytes = "keep") -> np.ndarray:
        return np.frombuffer(text_bytes(text, invalid_bytes), dtype=np.uint8)

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        tokens = np.asarray(tokens)
        return tokens[tokens < self.num_tokens].astype(np.uint8).tobytes()  # a model may have more

    def num_bytes(self, tokens: Sequence[int] | np.ndarray) -> int:
        return int(np.count_nonzero(np.asarray(tokens) != self.eos_token))

    def __str__(self) -> str:
        return "bytes"


class IntegerTokenizer(Tokenizer):
    """Tokens that stand for no text, but for themselves: as text, numbers with spaces between them.

    num_values: integers below this are values; the token after them begins and ends a sequence.
    """

    unit = "value"

    def __init__(self, num_values: int) -> None:
        if num_values < 1:
            raise ValueError(f"num_values is {num_values}; expected at least 1")
        self.num_values = self.eos_token = num_values
        self.num_tokens = num_values + 1
        self.fingerprint = f"integers-{num_values}"
        self.file = (TOKENIZER_FILES[".integers"], f"{num_values}\n".encode())

    def encode(self, text: str | bytes, invalid_bytes: InvalidBytes = "keep") -> np.ndarray:
        words = text_bytes(text, "refuse").decode().split()
        for word in words:
            if not (word.isdecimal() and int(word) < self.num_tokens):
                raise ValueError(f"text: expected numbers from 0 to {self.num_values}, got {word!r}")
        return np.array([int(word) for word in words], dtype=self.dtype)

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        return b"".join(b"%d " % token for token in np.asarray(tokens).tolist())

    def num_bytes(self, tokens: Sequence[int] | np.ndarray) -> int:
        """How many are values: what are bits per byte for text are bits per value here."""
        return int(np.count_nonzero(np.asarray(tokens) != self.eos_token))

    def __str__(self) -> str:
        return f"integers below {self.num_values:,}"


def text_bytes(text: str | bytes, invalid_bytes: InvalidBytes) -> bytes:
    """The bytes of a text in UTF-8, but for those that `invalid_bytes` keeps. Raises as `encode`."""
    content = text.encode("utf-8", errors="surrogateescape") if isinstance(text, str) else text
    if invalid_bytes == "keep":
        return content
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        if invalid_bytes == "replace":
            return content.decode("utf-8", errors="replace").encode()
        raise ValueError(
            f"text: byte {content[error.start]:#04x} at {error.start:,} is not UTF-8, and invalid_bytes is "
            "'refuse'; expected UTF-8, or 'replace' or 'keep'"
        ) from error
    return content


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer that `source` names: "bytes", "integers-N", or a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its library cannot read it.
        ModuleNotFoundError: its library is not installed.
    """
    from palm_pytorch.data.tokenizer_files import HuggingFaceTokenizer, SentencePieceTokenizer

    if source == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    if found := re.fullmatch(r"integers-(\d+)", str(source)):
        return IntegerTokenizer(int(found[1]))
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected 'bytes' or a tokenizer's file, got none")
    if file.suffix not in TOKENIZER_FILES:
        raise ValueError(f"{file}: expected a tokenizer's .json or SentencePiece's .model")
    content = file.read_bytes()
    kinds: dict[str, Callable[[bytes], Tokenizer]] = {
        ".json": HuggingFaceTokenizer,
        ".model": SentencePieceTokenizer,
        ".integers": lambda content: IntegerTokenizer(int(content)),
    }
    try:
        return kinds[file.suffix](content)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{file.name} needs {error.name}: pip install {error.name}", name=error.name
        ) from error
    except Exception as error:  # whatever the library says of a file that is not its own
        raise ValueError(f"{file}: cannot be read as a tokenizer: {error}") from error


def stored_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer that `save` stored in a folder; None where there is no file, as for bytes."""
    files = (Path(folder) / name for name in TOKENIZER_FILES.values())
    return next((load_tokenizer(file) for file in files if file.is_file()), None)


def expect_tokenizer(tokenizer: Tokenizer, fingerprint: str, whose: str) -> Tokenizer:
    """The tokenizer, unless it is another than `fingerprint` says: that of a model, a run, or shards.

    Raises:
        ValueError: it is another.
    """
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"tokenizer is {tokenizer}; {whose} has another ({fingerprint[:12]}), and its tokens mean "
            "something else; expected the same"
        )
    return tokenizer


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
