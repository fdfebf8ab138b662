"""What `palm data prepare` does: options, and the call of the library that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from palm_pytorch.data.encoding import cores
from palm_pytorch.data.opening import open_text
from palm_pytorch.data.prepare import prepare
from palm_pytorch.data.shards import Manifest
from palm_pytorch.data.tokenizer import load_tokenizer
from palm_pytorch.training.options import FRACTION, POSITIVE, Options, option


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(Options):
    """What `palm data prepare` makes of its source."""

    tokenizer: str = option("tokens", "'bytes', or a tokenizer's file", default="bytes")
    invalid_bytes: Literal["keep", "refuse", "replace"] = option(
        "tokens", "what becomes of bytes that are not UTF-8", default="keep"
    )
    text_column: str = option("source", "of records: which column is the text", default="text")
    data_config: str | None = option("source", "configuration of a data set on the hub", default=None)
    data_split: str = option("source", "split of a Hugging Face data set", default="train")
    data_dir: str = option("source", "where Enwik8 is looked for and downloads are kept", default="data")
    max_documents: int | None = option(
        "documents", "read no more than so many (default: all)", POSITIVE, default=None
    )
    deduplicate: bool = option(
        "documents", "drop all but the first of equal ones; takes 16 bytes of memory each", default=False
    )
    valid_share: float | None = option(
        "documents",
        "to validate on (default: 0.05; of more than 1 GiB of files, or 200 documents of the hub, 0.005)",
        FRACTION,
        default=None,
    )
    test_share: float | None = option("documents", "to test on (default: likewise)", FRACTION, default=None)
    workers: int | None = option(
        "work", "processes that make tokens (default: one for each core)", POSITIVE, default=None
    )
    shard_tokens: int = option("work", "tokens in a shard", POSITIVE, default=1 << 27)


def prepare_folder(source: str, folder: str, options: PrepareOptions) -> Manifest:
    """Make tokens of `source` and store them in `folder`; gives its manifest.

    Raises:
        ValueError, OSError, ModuleNotFoundError: as `open_text`, `load_tokenizer` and `prepare`.
    """
    return prepare(
        open_text(
            source,
            options.data_dir,
            text_column=options.text_column,
            data_config=options.data_config,
            data_split=options.data_split,
        ),
        folder,
        load_tokenizer(options.tokenizer),
        valid_share=options.valid_share,
        test_share=options.test_share,
        deduplicate=options.deduplicate,
        max_documents=options.max_documents,
        invalid_bytes=options.invalid_bytes,
        workers=options.workers or cores(),
        shard_tokens=options.shard_tokens,
    )
