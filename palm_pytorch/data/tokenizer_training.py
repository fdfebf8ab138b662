"""A SentencePiece tokenizer of one's own, that gives every text back as it was.

LaMDA's is a BPE of 32,000 pieces (Thoppilan et al. 2022, arXiv 2201.08239, section 3). As PaLM's (Chowdhery
et al. 2022, arXiv 2204.02311, section 4) these keep all white space, write numbers digit by digit, and what
they have no piece for as the bytes of its UTF-8.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

TokenizerKind = Literal["bpe", "unigram"]
# SentencePiece learns from sentences. New lines end ours, so that none is inside a piece: each is its byte's
# token. The others are characters that SentencePiece keeps for itself, and drops sentences with.
BETWEEN_SENTENCES = re.compile("[\n\t\0\u2581\u2585]")
SENTENCE_LENGTH = 4096  # characters
MAX_SENTENCES = 10_000_000  # drawn evenly from all; SentencePiece holds them in memory


def train_tokenizer(texts: Iterable[str], *, kind: TokenizerKind = "bpe", vocab_size: int = 32_000) -> bytes:
    """The content of the `.model` file of a tokenizer that suits `texts`.

    vocab_size: of its tokens, 256 for bytes, the end token and the unknown one included.

    Raises:
        ValueError: the texts are too few for so many tokens, or need more; the message says how many.
        Exception: whatever reading the texts raises.
        ModuleNotFoundError: sentencepiece is not installed.
    """
    try:
        import sentencepiece
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "training a tokenizer needs sentencepiece: pip install sentencepiece",
            name=error.name,
        ) from error
    options: dict[str, Any] = {
        **{"model_type": kind, "vocab_size": vocab_size},
        **{"byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity"},
        **{
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
            "allow_whitespace_only_pieces": True,
        },
        **{"unk_id": 0, "eos_id": 1, "bos_id": -1, "pad_id": -1},
        **{"input_sentence_size": MAX_SENTENCES, "max_sentence_length": 4 * SENTENCE_LENGTH},
        **{"num_threads": os.cpu_count(), "minloglevel": 2},
    }
    written = io.BytesIO()
    failures: list[BaseException] = []

    def read() -> Iterator[str]:
        try:
            yield from sentences(texts)
        except (Exception, KeyboardInterrupt) as error:  # of which SentencePiece passes on the words alone
            failures.append(error)
            raise

    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=read(), model_writer=written, **options)
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise ValueError(why(str(error), vocab_size)) from error
    return written.getvalue()


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """What lies between new lines, in parts of bounded length."""
    for text in texts:
        for line in BETWEEN_SENTENCES.split(text):
            for start in range(0, len(line), SENTENCE_LENGTH):
                yield line[start : start + SENTENCE_LENGTH]


def why(message: str, vocab_size: int) -> str:
    """What SentencePiece's message says, in the words of our options."""
    if found := re.search(r"set it to a value <= (\d+)", message):
        return f"vocab_size is {vocab_size:,}; this text gives at most {int(found[1]):,} tokens"
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return f"vocab_size is {vocab_size:,}; this text needs at least {int(found[1]):,} tokens"
    if "sentences_.empty()" in message or "input_sentence_size" in message:
        return "the text to train a tokenizer on is empty"
    return f"SentencePiece cannot train on this text: {message}"
