"""What `palm tokenizer` does: train one, and show what one makes of a text."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from palm_pytorch.data.corpus import Corpus
from palm_pytorch.data.dialog_dataset import is_dialog, json_lines_files, read_conversations
from palm_pytorch.data.opening import open_text
from palm_pytorch.data.streams import publish
from palm_pytorch.data.tokenizer import InvalidBytes, Tokenizer, load_tokenizer
from palm_pytorch.data.tokenizer_training import train_tokenizer
from palm_pytorch.training.options import POSITIVE, Options, option

CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions(Options):
    """Options of `palm tokenizer train`."""

    kind: Literal["bpe", "unigram"] = option(
        "tokenizer", "SentencePiece's algorithm; LaMDA's is bpe", default="bpe"
    )
    vocab_size: int = option("tokenizer", "tokens, 256 bytes and 2 more included", POSITIVE, default=32_000)
    out: str = option("tokenizer", "its file, a new one", default="tokenizer.model")
    text_column: str = option("text", "of records: which column is the text", default="text")
    data_dir: str = option("text", "where Enwik8 is looked for and downloads are kept", default="data")


def train_on(sources: Sequence[str], options: TokenizerOptions) -> Tokenizer:
    """Train a tokenizer on all `sources`, as `--data` of `palm train` has them, and store it in a file.

    Raises:
        FileExistsError: the file exists.
        ValueError, OSError, ModuleNotFoundError: a source cannot be read or does not suit the options.
    """
    out = Path(options.out)
    if out.suffix != ".model":
        raise ValueError(f"out is {options.out!r}; expected a name that ends in .model")
    if out.exists():
        raise FileExistsError(f"out is {options.out!r}, which exists; expected a new file")
    texts = chain.from_iterable(read_text(source, options) for source in sources)
    publish([train_tokenizer(texts, kind=options.kind, vocab_size=options.vocab_size)], out)
    return load_tokenizer(out)


def read_text(source: str, options: TokenizerOptions) -> Iterator[str]:
    """The text of a source in chunks, for which it is opened at once; of conversations, what is said."""
    path = Path(source).expanduser()
    parts: Iterator[Iterator[bytes]]
    if source and is_dialog(path):
        conversations = read_conversations(json_lines_files(path), show=False)
        said = (message.content for _, _, messages in conversations for message in messages)
        parts = (iter([content.encode("utf-8", errors="surrogateescape")]) for content in said)
    else:
        found = open_text(source, options.data_dir, text_column=options.text_column)
        if isinstance(found, Corpus):
            tokens = found.tokens
            parts = iter([(tokens[at : at + CHUNK].tobytes() for at in range(0, len(tokens), CHUNK))])
        else:
            parts = (document.chunks() for document in found.documents())
    return (text for part in parts for text in codecs.iterdecode(part, "utf-8", errors="replace"))


def encode(tokenizer: str, invalid_bytes: InvalidBytes) -> None:
    """Print the tokens of standard input, as numbers in a line.

    Raises:
        ValueError, OSError, ModuleNotFoundError: as `load_tokenizer` and `Tokenizer.encode`.
    """
    print(*load_tokenizer(tokenizer).encode(sys.stdin.buffer.read(), invalid_bytes).tolist())


def decode(tokenizer: str) -> None:
    """Write the bytes that the numbers in standard input stand for.

    Raises:
        ValueError: something is no number, or no token.
        OSError, ModuleNotFoundError: as `load_tokenizer`.
    """
    loaded = load_tokenizer(tokenizer)
    words = sys.stdin.read().split()
    for word in words:
        if not (word.isdecimal() and int(word) < loaded.num_tokens):
            raise ValueError(f"token {word!r}: expected a number from 0 to {loaded.num_tokens - 1}")
    tokens = np.array([int(word) for word in words], dtype=np.int64)
    sys.stdout.buffer.write(loaded.decode_bytes(tokens))
    sys.stdout.buffer.flush()
