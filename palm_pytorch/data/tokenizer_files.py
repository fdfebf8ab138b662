"""Tokenizers of two libraries, each from the content of its file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from palm_pytorch.data.tokenizer import (
    TOKENIZER_FILES,
    InvalidBytes,
    Tokenizer,
    sha256,
    text_bytes,
)

# SentencePiece writes a space as U+2581, and reads that as a space: one in a text goes by its bytes.
SPACE = "\u2581"
SURROGATES = re.compile("[\ud800-\udfff]")
APART = re.compile(f"([\ud800-\udfff{SPACE}]+)")
WORDS = re.compile(r"\n| *[^ \n]+| +")
MOST_WORDS = 200_000  # to remember: some 40 MB
# Files of Hugging Face do not say which of their special tokens ends a document.
END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226).

    One with a piece for each byte, that neither normalises nor adds a space in front, loses nothing: `palm
    tokenizer train` makes such. Others lose what their own normalisation does, and can keep no invalid bytes.
    """

    def __init__(self, content: bytes) -> None:
        import sentencepiece

        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.num_tokens = self.pieces.get_piece_size()
        self.eos_token = None if (end := self.pieces.eos_id()) < 0 else end
        self.fingerprint, self.file = sha256(content), (TOKENIZER_FILES[".model"], content)
        every = range(self.num_tokens)
        self.contents = [self._content(token) for token in every]
        self.lengths = np.array([len(content) for content in self.contents])
        of_byte = {self.contents[token]: token for token in every if self.pieces.is_byte(token)}
        self.prefixes = self.pieces.encode("a", out_type=str)[0].startswith(SPACE)  # adds a space in front
        whole = len(of_byte) == 256 and not self.prefixes
        self.byte_tokens = [of_byte[bytes([b])] for b in range(256)] if whole else None
        known = [token for token in every if not self.pieces.is_unknown(token)]
        self.by_words = (
            whole
            # The merges of a BPE are scored by whole numbers.
            and all(self.pieces.get_score(token).is_integer() for token in known)
            # No piece holds a new line and more, or goes on after a word's end: words are apart.
            and not any(re.search(rb"(?s)[^ ] |\n.|.\n", self.contents[token]) for token in known)
        )
        self.words: dict[str, list[int]] = {}

    def _content(self, token: int) -> bytes:
        if self.pieces.is_control(token):
            return b""
        piece = self.pieces.id_to_piece(token)
        if self.pieces.is_byte(token):  # such as <0x0A>
            return bytes([int(piece[1:-1], 16)])
        text = self.pieces.decode([token]) if self.pieces.is_unknown(token) else piece.replace(SPACE, " ")
        return text.encode()

    def encode(self, text: str | bytes, invalid_bytes: InvalidBytes = "keep") -> np.ndarray:
        string = as_string(text, invalid_bytes, can_keep=self.byte_tokens is not None)
        tokens = self._encode_words(string) if self.by_words else self._encode_part(string)
        return np.array(tokens, dtype=self.dtype)

    def _encode_words(self, text: str) -> list[int]:
        """Word by word, each from memory if it was there before: three times as fast, for the same tokens."""
        tokens: list[int] = []
        for word in WORDS.findall(text):
            if (known := self.words.get(word)) is None:
                known = self._encode_part(word)
                if len(self.words) < MOST_WORDS:
                    self.words[word] = known
            tokens += known
        return tokens

    def _encode_part(self, text: str) -> list[int]:
        if self.byte_tokens is None or not APART.search(text):
            return self.pieces.encode(text)
        tokens: list[int] = []
        for part in APART.split(text):
            if APART.match(part):
                tokens += [self.byte_tokens[b] for b in part.encode("utf-8", errors="surrogateescape")]
            else:
                tokens += self.pieces.encode(part)
        return tokens

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        known = (token for token in np.asarray(tokens).tolist() if token < self.num_tokens)
        return b"".join(self.contents[token] for token in known)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        text = super().decode(tokens)
        return text.removeprefix(" ") if self.prefixes else text

    def num_bytes(self, tokens: Sequence[int] | np.ndarray) -> int:
        return int(self.lengths[np.asarray(tokens, dtype=np.int64)].sum())


class HuggingFaceTokenizer(Tokenizer):
    """Of Hugging Face's tokenizers, as GPT-NeoX's. What it loses is what its own file normalises."""

    def __init__(self, content: bytes) -> None:
        import tokenizers

        self.rules = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        self.rules.encode_special_tokens = True  # "</s>" in a text is text
        self.rules.no_truncation()
        self.rules.no_padding()
        # Ids may leave gaps, so that the largest says more than how many there are.
        self.num_tokens = 1 + max(self.rules.get_vocab(with_added_tokens=True).values())
        special = {
            added.content: n for n, added in self.rules.get_added_tokens_decoder().items() if added.special
        }
        self.eos_token = next((special[name] for name in END_TOKENS if name in special), None)
        self.fingerprint, self.file = sha256(content), (TOKENIZER_FILES[".json"], content)

    def encode(self, text: str | bytes, invalid_bytes: InvalidBytes = "keep") -> np.ndarray:
        return self.encode_batch([text], invalid_bytes)[0]

    def encode_batch(
        self, texts: Sequence[str | bytes], invalid_bytes: InvalidBytes = "keep"
    ) -> list[np.ndarray]:
        strings = [as_string(text, invalid_bytes, can_keep=False) for text in texts]
        found = self.rules.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(each.ids, dtype=self.dtype) for each in found]

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        return self.decode(tokens).encode()

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return self.rules.decode(np.asarray(tokens).tolist())

    def decoder(self) -> Callable[[int | None], str]:
        # What a token looks like depends on those before it, so a few of these are decoded with it.
        tokens: list[int] = []
        shown = 0

        def decode(token: int | None) -> str:
            nonlocal shown
            if token is not None:
                tokens.append(token)
            before, text = (self.decode(part) for part in (tokens[:shown], tokens))
            if token is not None and text.endswith("\N{REPLACEMENT CHARACTER}"):
                return ""  # half a character
            del tokens[: max(0, shown - 4)]
            shown = len(tokens)
            return text[len(before) :]

        return decode


def as_string(text: str | bytes, invalid_bytes: InvalidBytes, can_keep: bool) -> str:
    """A text for a library that takes strings; bytes that are kept are surrogates, as in "surrogateescape".

    Raises:
        ValueError: there are such bytes, and they are refused or cannot be kept.
    """
    if isinstance(text, str):
        if not SURROGATES.search(text):
            return text
        text = text_bytes(text, "keep")
    string = text.decode("utf-8", errors="surrogateescape")
    if (found := SURROGATES.search(string)) is None:
        return string
    if invalid_bytes == "keep":
        if can_keep:
            return string
        raise ValueError(
            f"text: byte {ord(found[0]) - 0xDC00:#04x} at character {found.start():,} is not UTF-8, and this "
            "tokenizer cannot keep it; expected UTF-8, or invalid_bytes 'replace'"
        )
    return text_bytes(text, invalid_bytes).decode()
