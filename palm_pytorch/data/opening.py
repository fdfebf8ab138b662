"""From what `--data` names to a data set that a run can read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from palm_pytorch.data.arrays import is_array, open_array
from palm_pytorch.data.batch import Dataset
from palm_pytorch.data.corpus import Corpus, find_published, open_corpus
from palm_pytorch.data.dialog_dataset import DialogDataset, is_dialog
from palm_pytorch.data.packed import PackedDataset
from palm_pytorch.data.prepare import prepare
from palm_pytorch.data.shards import is_prepared
from palm_pytorch.data.sources import Source, kind_of, open_source
from palm_pytorch.data.text import TextDataset
from palm_pytorch.data.tokenizer import ByteTokenizer, Tokenizer, expect_tokenizer


def open_dataset(
    source: str | Path | None,
    *,
    data_dir: str | Path,
    seq_len: int,
    rows_per_batch: int = 1,
    tokenizer: Tokenizer | None = None,
    documents: Literal["inside", "across"] = "inside",
    text_column: str = "text",
    data_config: str | None = None,
    data_split: str = "train",
    verify_all: bool = False,
    num_values: int | None = None,
    dtype: str | None = None,
) -> Dataset:
    """Opens what `source` names as sequences of `seq_len` tokens.

    Integers are read where they lie, and so are conversations, which are JSON lines with "messages", and one
    text, as bytes. Anything else is prepared first, by one process, into the data folder, and found there the
    next time; `palm data prepare` does it with more.

    Args:
        source: a folder of `prepare`, or as `open_corpus` and `open_source` have it.
        data_dir: where downloads and what is prepared are looked for and kept.
        rows_per_batch: of a global batch.
        tokenizer: of the run; None for the one of a prepared folder, and bytes for all else.
        documents, verify_all: see `PackedDataset`.
        text_column, data_config, data_split: see `open_source`.
        num_values, dtype: of integers, see `open_array`.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError, OSError: as `open_corpus`, `open_source`,
            `prepare` and `PackedDataset`.
    """
    _expect_name(source)
    folder = None if source is None else Path(source).expanduser()
    array = folder is not None and is_array(folder)
    dialog = folder is not None and not array and not is_prepared(folder) and is_dialog(folder)
    if (array or dialog) and documents == "across":
        raise ValueError(f"documents is 'across'; expected 'inside' for {source}, which has no running text")
    if folder is not None and array:
        if num_values is None:
            raise ValueError(f"{folder}: expected num_tokens beside it, as 256 for bytes of pictures")
        integers = open_array(folder, num_values, seq_len=seq_len, dtype=dtype)
        if tokenizer is not None:
            expect_tokenizer(tokenizer, integers.tokenizer.fingerprint, str(folder))
        return integers
    if num_values is not None or dtype is not None:
        raise ValueError(
            f"num_tokens is {num_values} and data_dtype {dtype!r}; expected neither for {source}, only for a "
            ".npy or .bin file"
        )
    if folder is not None and dialog:
        return DialogDataset(folder, tokenizer or ByteTokenizer(), seq_len)
    if folder is None or not is_prepared(folder):
        found = open_text(
            source, data_dir, text_column=text_column, data_config=data_config, data_split=data_split
        )
        if isinstance(found, Corpus) and isinstance(tokenizer or ByteTokenizer(), ByteTokenizer):
            return TextDataset(found, seq_len)
        folder = _prepare_once(found, folder, Path(data_dir), tokenizer or ByteTokenizer())
    return PackedDataset(
        folder,
        seq_len,
        rows_per_batch=rows_per_batch,
        documents=documents,
        tokenizer=tokenizer,
        verify_all=verify_all,
    )


def open_text(
    source: str | Path | None,
    data_dir: str | Path,
    *,
    text_column: str = "text",
    data_config: str | None = None,
    data_split: str = "train",
) -> Source | Corpus:
    """What `source` names: one running text if it is a single file of text or a published corpus, and else
    documents.

    Raises:
        ValueError: it holds integers, conversations or tokens, which are read as they lie.
        And as `open_corpus` and `open_source`.
    """
    _expect_name(source)
    if source is None or find_published(source):
        return open_corpus(source, data_dir)
    path = Path(source).expanduser()
    if is_array(path):
        raise ValueError(f"{path} holds integers; expected text, since integers are trained on as they lie")
    if is_prepared(path):
        raise ValueError(
            f"{path} holds tokens; expected text, since what is prepared is trained on as it lies"
        )
    if is_dialog(path):
        raise ValueError(
            f"{path} holds conversations; expected documents, since conversations are trained on as they lie"
        )
    if path.is_file() and not kind_of(path):
        return open_corpus(source, data_dir)
    return open_source(source, text_column=text_column, config=data_config, split=data_split)


def _expect_name(source: str | Path | None) -> None:
    if source == "":  # a variable of a shell that is not set; as a path it would be the current folder
        raise ValueError("source is ''; expected a file, a folder or a name, as --data has them")


def _prepare_once(found: Source | Corpus, path: Path | None, data_dir: Path, tokenizer: Tokenizer) -> Path:
    identity: Any = found.identity if isinstance(found, Source) else found.fingerprint
    if isinstance(found, Source) and path is not None and path.exists():
        # Other files may have the same names in their folder, sizes and times.
        identity = (*found.identity, str(path.resolve()))
    key = hashlib.sha256(json.dumps([identity, tokenizer.fingerprint]).encode()).hexdigest()[:16]
    folder = data_dir / ".cache" / f"{found.name}-{key}"
    if not is_prepared(folder):
        print(f"preparing {found.origin} in {folder}")
        try:
            prepare(found, folder, tokenizer)
        except FileExistsError as error:
            if not is_prepared(folder):  # by another process, for which this one has waited
                raise ValueError(f"{folder} is damaged; remove it, and it is prepared again") from error
    return folder
