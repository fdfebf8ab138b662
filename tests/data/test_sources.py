"""The same documents come out of every format, and what cannot be read is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from palm_pytorch.data import sources
from palm_pytorch.data.sources import open_source

TEXTS = ["one", "zwei\nDinge", "", "\u4e09 \U0001f600", "x" * 100_000, "last"]


def texts(source: Any, **options: Any) -> list[str]:
    return [b"".join(document.chunks()).decode() for document in open_source(source, **options).documents()]


def write_text(folder: Path) -> None:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_bytes(text.encode())


def write_json_lines(folder: Path) -> None:
    lines = [json.dumps({"id": number, "text": text}) for number, text in enumerate(TEXTS)]
    (folder / "a.jsonl").write_text("\n".join(lines[:2]))
    (folder / "b.json.gz").write_bytes(gzip.compress(("\n\n".join(lines[2:4]) + "\n").encode()))
    (folder / "c.ndjson.xz").write_bytes(lzma.compress(lines[4].encode()))
    (folder / "d.jsonl.bz2").write_bytes(bz2.compress(lines[5].encode()))


def write_parquet(folder: Path) -> None:
    for name, part in (("a", TEXTS[:4]), ("b", TEXTS[4:])):
        table = pyarrow.table({"id": list(range(len(part))), "text": part})
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=1)


def save_dataset(folder: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(6))}).save_to_disk(folder, num_shards=3)


def save_dataset_dict(folder: Path) -> None:
    train = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": train, "other": train.select([0])}).save_to_disk(
        folder, num_shards={"train": 2, "other": 1}
    )


@pytest.mark.parametrize(
    "write", [write_text, write_json_lines, write_parquet, save_dataset, save_dataset_dict]
)
def test_the_same_documents_from_every_format(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "RECORDS", 2)
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder)
    expected = [text for text in TEXTS if text] if write is write_text else TEXTS
    source = open_source(folder)
    assert source.name == "corpus"
    places = {document.where for document in source.documents()}
    assert len(places) == len(expected) and all(str(folder) in place for place in places)
    for _ in range(2):  # each time from the start
        assert [b"".join(document.chunks()).decode() for document in source.documents()] == expected
    assert open_source(folder).identity == source.identity
    assert json.loads(json.dumps(source.identity))  # it is stored so


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_data_set_is_streamed_from_its_shards(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read by name from the hub, here from a folder of several shards, which `datasets` takes too."""
    monkeypatch.setattr(sources, "RECORDS", 4)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "data").mkdir()
    for number in range(3):
        part = [f"{number}.{each}" for each in range(5)]
        path = tmp_path / "data" / f"train-{number:05d}-of-00003.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps({"content": text, "other": 1}) + "\n" for text in part))
        else:
            parquet.write_table(pyarrow.table({"content": part, "other": [1] * 5}), path)
    expected = [f"{number}.{each}" for number in range(3) for each in range(5)]
    assert texts(f"hf:{tmp_path}", text_column="content") == expected
    with pytest.raises(ValueError, match=r"no column 'text'; expected one of content, other"):
        texts(f"hf:{tmp_path}")
    with pytest.raises(ValueError, match="test"):
        open_source(f"hf:{tmp_path}", split="test")


@given(st.lists(st.binary(max_size=12), max_size=9), st.integers(1, 9))
def test_lines(parts: list[bytes], size: int) -> None:
    content = b"\n".join(parts)
    chunks = [content[at : at + size] for at in range(0, len(content), size)]
    assert list(sources.split_lines(chunks)) == content.split(b"\n")


def test_half_a_surrogate_in_json_is_kept_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d"}')
    (document,) = open_source(tmp_path / "a.jsonl").documents()
    assert b"".join(document.chunks()) == b"\xed\xa0\xbd"


def test_a_json_file_is_text_unless_it_is_of_json_lines(tmp_path: Path) -> None:
    """As a package.json among source code; the suffixes of JSON lines alone promise these."""
    contents = {
        "array.json": b'[{"text": "a"}]\n',
        "package.json": b'{\n  "name": "a"\n}\n',
        "packed.json.gz": gzip.compress(b'{\n  "name": "b"\n}\n'),
        "records.json": b'\n \n\xef\xbb\xbf{"text": "c"}\n{"text": "d"}\n',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = [*texts(tmp_path)]
    assert found == ['[{"text": "a"}]\n', '{\n  "name": "a"\n}\n', '{\n  "name": "b"\n}\n', "c", "d"]
    (tmp_path / "z.jsonl").write_bytes(contents["package.json"])
    with pytest.raises(ValueError, match=r"z\.jsonl, line 1: expected JSON lines"):
        texts(tmp_path)


def test_an_array_on_one_line_is_not_held_in_memory(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"[" + b"1, " * (8 << 20) + b"1]")
    tracemalloc.start()
    try:
        assert sources.kind_of(tmp_path / "a.json") == ""
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("name", "content", "error", "complaint"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ValueError, r"a\.jsonl, line 2: expected JSON lines"),
        ("a.jsonl", b"[1]\n", ValueError, r"a\.jsonl, line 1: expected JSON lines, .*, got a list"),
        (
            "a.jsonl",
            b'{"content": "a", "id": 1}\n',
            ValueError,
            r"a\.jsonl, line 1: has no column 'text'; expected one of content, id as text_column",
        ),
        ("a.jsonl", b'{"text": 3}\n', ValueError, r"line 1: column 'text' holds int; expected text"),
        ("a.jsonl.gz", b"text", ValueError, r"a\.jsonl\.gz is damaged or not a \.gz file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "abc"}\n' * 99, mtime=0)[:-9],
            ValueError,
            r"a\.jsonl\.gz is cut short",
        ),
        ("a.parquet", b"PAR1 and nothing more", ValueError, r"a\.parquet is damaged, or not a parquet file"),
        (
            "a.parquet.gz",
            gzip.compress(b"PAR1", mtime=0),
            ValueError,
            r"a\.parquet\.gz is compressed as a whole",
        ),
        ("a.txt", b"", ValueError, r"a\.txt is empty"),
    ],
)
def test_what_cannot_be_read_is_named(
    name: str, content: bytes, error: type[Exception], complaint: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=complaint):
        texts(tmp_path / name)


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: has no column 'text'; expected one of content"):
        texts(tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", text_column="content") == ["a"]


def test_a_saved_data_set_without_the_split(tmp_path: Path) -> None:
    save_dataset_dict(tmp_path / "saved")
    with pytest.raises(ValueError, match="has no split 'dev': expected one of train, other"):
        open_source(tmp_path / "saved", split="dev")
    assert texts(tmp_path / "saved", split="other") == ["one"]


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist: expected a file, .*the-pile, c4"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="'' does not exist"):
        open_source("")


def test_no_network_is_said() -> None:
    """In a process of its own: `datasets` reads the setting when it is imported."""
    code = """
from palm_pytorch.data.sources import open_source
for name in ("hf:nobody/nothing", "fineweb"):
    try:
        open_source(name)
    except FileNotFoundError as error:
        print(error)
"""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline)
    assert run.stdout.count(" cannot be opened: ") == run.stdout.count("reach the network") == 2, run.stderr
    assert "hf:nobody/nothing, split train cannot" in run.stdout
    assert "hf:HuggingFaceFW/fineweb, configuration sample-10BT, split train cannot" in run.stdout


@pytest.mark.parametrize("library", ["datasets", "pyarrow"])
def test_a_library_that_is_not_installed(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    write_parquet(tmp_path)
    source = tmp_path if library == "pyarrow" else "c4"
    with pytest.raises(ModuleNotFoundError, match=r"needs (\w+): pip install \1"):
        texts(source)
