"""Documents, wherever they are: files of text, JSON lines and parquet, and Hugging Face data sets.

One record is one document, and so is one file of text. No source is ever held in memory.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from palm_pytorch.data.streams import MAGIC, compression, list_files, read_files

# Short names of data sets on the hub, and the configuration that stands for each unless another is asked for.
HUB_NAMES = {
    "the-pile": ("monology/pile-uncopyrighted", None),
    "c4": ("allenai/c4", "en"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
}
HUB_PREFIX = "hf:"
SAVED_DATASET = ("state.json", "dataset_dict.json")  # what `datasets` saves beside its data
JSON_LINES = (".jsonl", ".ndjson", ".json")
RECORDS = 256  # that are read at a time


class Document(NamedTuple):
    """Where a document is, for people, and what gives its bytes, in chunks, from the first at each call."""

    where: str
    chunks: Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order.

    Attributes:
        name: for people.
        origin: one line that tells people where they come from.
        identity: equal for the same documents, as far as that can be told without reading them.
        num_bytes: of its files, as they are on the disk; None if it is not known.
        documents: starts to read them, from the first.
    """

    name: str
    origin: str
    identity: tuple[Any, ...]
    num_bytes: int | None
    documents: Callable[[], Iterator[Document]]


def open_source(
    source: str | Path, *, text_column: str = "text", config: str | None = None, split: str = "train"
) -> Source:
    """The documents that `source` names, after checking all that can be checked before they are read.

    Args:
        source: a file or folder of text (a document each), JSON lines (`.jsonl`, `.ndjson`, and a `.json`
            whose first line is an object) and parquet, compressed or not; a folder that `datasets` saved;
            "hf:" and the name of a data set on the hub, or one of `HUB_NAMES`.
        text_column: where the text of a record is.
        config, split: of a Hugging Face data set.

    Raises:
        FileNotFoundError: it does not exist, or the hub does not give it.
        ValueError: it is empty, or has not that column, configuration or split.
        ModuleNotFoundError: a library that reads it is not installed.
        OSError: a file cannot be read. Every message names the file.
    """
    path = Path(source).expanduser()
    name = str(source)
    if name in HUB_NAMES and not path.exists():
        name, config = HUB_NAMES[name][0], config or HUB_NAMES[name][1]
        return _open_hub(name, text_column, config, split)
    if name.startswith(HUB_PREFIX):
        return _open_hub(name.removeprefix(HUB_PREFIX), text_column, config, split)
    if name == "" or not path.exists():
        raise FileNotFoundError(
            f"{name!r} does not exist: expected a file, a folder, {HUB_PREFIX}NAME of a data set on the hub, "
            f"or one of {', '.join(HUB_NAMES)}"
        )
    if path.is_dir() and any((path / mark).is_file() for mark in SAVED_DATASET):
        return _open_saved(path, text_column, split)
    files = list_files(path)
    states = tuple(
        (str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files
    )
    size = sum(size for _, size, _ in states)
    if size == 0:
        raise ValueError(f"{path} is empty: expected text in it")

    def documents() -> Iterator[Document]:
        for file in files:
            yield from _read_file(file, text_column)

    return Source(path.resolve().name, str(path), (states, text_column), size, documents)


def kind_of(path: Path) -> str:
    """What a file holds: the suffix of its name, less that of its compression, or "" for text.

    A `.json` is text, as a package.json, unless its first line is an object.
    """
    named = path.with_suffix("") if path.suffix.lower() in MAGIC else path
    suffix = named.suffix.lower()
    if suffix == ".json" and first_record(path) is None:
        return ""
    return suffix if suffix in (*JSON_LINES, ".parquet") else ""


def first_record(path: Path) -> dict[str, Any] | None:
    """The object in the first line of a file that is not blank; None if there is no whole one."""
    with closing(read_files([path], show=False)) as chunks:
        start = next(filter(None, map(bytes.lstrip, chunks)), b"")
        # Other lines are not read whole: that of an array may be all of a large file.
        may_be = start.startswith((b"{", codecs.BOM_UTF8))
        line = next(split_lines(chain([start], chunks))) if may_be else b""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _read_file(path: Path, column: str) -> Iterator[Document]:
    if path.stat().st_size == 0:
        return
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _read_parquet(path, column)
    elif kind in JSON_LINES:
        yield from _read_json_lines(path, column)
    else:
        yield Document(str(path), lambda: read_files([path], show=False))


def _read_json_lines(path: Path, column: str) -> Iterator[Document]:
    for number, line in enumerate(split_lines(read_files([path], show=False)), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number:,}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: expected JSON lines, an object in each: {error}") from error
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise ValueError(f"{where}: expected JSON lines, an object in each, got a {kind}")
        yield _record(record, column, where)


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a text in chunks, without their ends; the last may be empty."""
    rest: list[bytes] = []
    for chunk in chunks:
        *lines, last = chunk.split(b"\n")
        if lines:
            yield b"".join([*rest, lines[0]])
            yield from lines[1:]
            rest = []
        rest.append(last)
    yield b"".join(rest)


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise _not_installed(str(path), error) from error
    if compression(path):
        raise ValueError(f"{path} is compressed as a whole; expected a parquet file, which is so inside")
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(str(path), column, file.schema_arrow.names)
            batches = (batch.column(0).to_pylist() for batch in file.iter_batches(RECORDS, columns=[column]))
            for number, text in enumerate(chain.from_iterable(batches), 1):
                yield _record({column: text}, column, f"{path}, row {number:,}")
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is damaged, or not a parquet file: {error}") from error


def _open_hub(name: str, column: str, config: str | None, split: str) -> Source:
    described = f"{HUB_PREFIX}{name}" + (f", configuration {config}" if config else "") + f", split {split}"
    datasets = _import_datasets(described)
    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
    except ValueError as error:  # it is there, but not so
        raise ValueError(f"{described}: {error}") from error
    # Whatever the libraries of the network raise, for they do not agree on it.
    except Exception as error:
        raise FileNotFoundError(
            f"{described} cannot be opened: {str(error).strip() or type(error).__name__}. Is the name right, "
            "and does this machine reach the network?"
        ) from error
    return Source(
        name.rpartition("/")[2],
        described,
        (name, config, split, column),
        None,
        lambda: _read_dataset(stream, column, described),
    )


def _open_saved(path: Path, column: str, split: str) -> Source:
    described = f"{path}, split {split}"
    datasets = _import_datasets(described)
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"{path} is damaged, or not a folder that `datasets` saved: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"{path} has no split {split!r}: expected one of {', '.join(saved)}")
        saved = saved[split]
    if len(saved) == 0:
        raise ValueError(f"{described} is empty: expected documents in it")
    return Source(
        path.resolve().name,
        described,
        (str(path.resolve()), saved._fingerprint, split, column),
        sum(file.stat().st_size for file in list_files(path)),
        lambda: _read_dataset(saved, column, described),
    )


def _read_dataset(dataset: Any, column: str, described: str) -> Iterator[Document]:
    if dataset.column_names is not None:
        if column not in dataset.column_names:
            raise _no_column(described, column, dataset.column_names)
        dataset = dataset.select_columns([column])
    batches = dataset.iter(RECORDS)
    number = 0
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            raise OSError(f"{described}: reading failed after record {number:,}: {error}") from error
        if batch is None:
            return
        if column not in batch:
            raise _no_column(described, column, list(batch))
        for text in batch[column]:
            number += 1
            yield _record({column: text}, column, f"{described}, record {number:,}")


def _record(record: dict[str, Any], column: str, where: str) -> Document:
    if column not in record:
        raise _no_column(where, column, list(record))
    text = record[column]
    if text is None:
        text = ""
    if isinstance(text, str):
        text = text.encode("utf-8", errors="surrogatepass")
    if not isinstance(text, bytes):
        raise ValueError(f"{where}: column {column!r} holds {type(text).__name__}; expected text")
    return Document(where, lambda: iter((text,)))


def _no_column(where: str, column: str, found: list[str]) -> ValueError:
    return ValueError(f"{where}: has no column {column!r}; expected one of {', '.join(found)} as text_column")


def _import_datasets(what: str) -> Any:
    # Set before the import, which is when it is read. Its bars would be drawn over ours.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise _not_installed(what, error) from error
    with suppress(AttributeError):
        datasets.disable_progress_bars()
    return datasets


def _not_installed(what: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{what} needs {error.name}: pip install {error.name}", name=error.name)
