"""Each kind of data is opened as what it is, and what is prepared on the way is prepared once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from palm_pytorch.data import opening
from palm_pytorch.data.batch import Dataset
from palm_pytorch.data.opening import open_dataset, open_text
from palm_pytorch.data.packed import PackedDataset
from palm_pytorch.data.prepare import prepare
from palm_pytorch.data.sources import open_source
from palm_pytorch.data.text import TextDataset
from palm_pytorch.data.tokenizer import ByteTokenizer, IntegerTokenizer
from palm_pytorch.data.windows import split_by_position, train_batch


def open_here(source: Path | str, data_dir: Path, **options: object) -> Dataset:
    return open_dataset(source, data_dir=data_dir, seq_len=8, rows_per_batch=4, **options)  # type: ignore[arg-type]


def test_one_text_is_read_as_bytes_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(256)) * 8)
    data = open_here(tmp_path / "text.txt", tmp_path / "data")
    assert isinstance(data, TextDataset) and not (tmp_path / "data").exists()
    splits = split_by_position(data.corpus.tokens, 8, "")
    windows = train_batch(splits.train, seq_len=8, seed=1, step=7, rows=range(2, 4))
    batch = data.batch(seed=1, index=7, rows=range(2, 4))
    assert torch.equal(batch.tokens, windows[:, :-1]) and torch.equal(batch.labels, windows[:, 1:])
    assert np.array_equal(data.held_out("test").tokens, [splits.valid[-1], *splits.test])
    assert data.held_out("valid").num_bytes == len(splits.valid)
    assert str(data) == f"text.txt: {tmp_path / 'text.txt'}; bytes to train 1,843, valid 102, test 103"
    assert data.num_tokens == 256 and isinstance(data.tokenizer, ByteTokenizer)


@pytest.mark.parametrize("kind", ["jsonl", "folder", "saved", "prepared"])
def test_documents_are_prepared_once(
    kind: str, jsonl: Path, documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    if kind == "jsonl":
        source = jsonl
    elif kind == "folder":
        source.mkdir()
        for number, text in enumerate(documents):
            (source / f"{number:03d}.txt").write_text(text)
    elif kind == "saved":
        datasets.Dataset.from_dict({"text": documents}).save_to_disk(source, num_shards=3)
    else:
        prepare(open_source(jsonl), source)
    found = []
    for _ in range(2):
        found.append(open_here(source, tmp_path / "data"))
        monkeypatch.setattr(opening, "prepare", None)
    assert all(isinstance(data, PackedDataset) for data in found)
    assert len({data.fingerprint for data in found}) == 1
    wanted = prepare(open_source(jsonl), tmp_path / "wanted")
    assert found[0].fingerprint == wanted.fingerprint  # whatever the format, the same documents
    batches = [data.batch(seed=1, index=2, rows=range(4)) for data in found]
    assert torch.equal(batches[0].tokens, batches[1].tokens)


def test_changed_documents_are_prepared_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    fingerprints = set()
    for extra in ("", "and more "):
        texts = [f"document {extra}{number}" for number in range(300)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        fingerprints.add(open_here(path, tmp_path / "data").fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.parametrize("name", ["p.jsonl", "p"])
def test_sources_of_equal_names_sizes_and_times_are_apart(name: str, tmp_path: Path) -> None:
    """As archives and images have them whose times are all the same."""
    fingerprints = set()
    for folder, word in (("a", "one"), ("b", "two")):
        path = tmp_path / folder / name
        path.parent.mkdir()
        file = path if path.suffix else path / "texts.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps({"text": f"{word} {number}"}) + "\n" for number in range(300)))
        os.utime(file, (0, 0))
        fingerprints.add(open_here(path, tmp_path / "data").fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.parametrize("damaged", ["valid.bin", "train-00000.bin", "manifest.json"])
def test_what_was_prepared_and_is_damaged_can_be_removed(damaged: str, jsonl: Path, tmp_path: Path) -> None:
    fingerprint = open_here(jsonl, tmp_path / "data").fingerprint
    (folder,) = (path for path in (tmp_path / "data" / ".cache").iterdir() if path.is_dir())
    if damaged == "valid.bin":
        (folder / damaged).write_bytes(b"")
    else:
        (folder / damaged).unlink()
    for _ in range(2):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"remove ({folder}|it),? and .*again"):
            open_here(jsonl, tmp_path / "data")
    shutil.rmtree(folder)
    assert open_here(jsonl, tmp_path / "data").fingerprint == fingerprint


def test_a_variable_that_is_not_set_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text " * 1000)
    with pytest.raises(ValueError, match="source is ''; expected a file, a folder or a name"):
        open_here("", tmp_path / "data")
    with pytest.raises(ValueError, match="source is ''"):
        open_text("", tmp_path / "data")


def test_another_tokenizer_is_refused(jsonl: Path, tmp_path: Path) -> None:
    prepare(open_source(jsonl), tmp_path / "out")
    with pytest.raises(ValueError, match=r"tokenizer is integers below 300; .*out has another \(bytes\)"):
        open_here(tmp_path / "out", tmp_path, tokenizer=IntegerTokenizer(300))


def test_attention_across_documents(jsonl: Path, tmp_path: Path) -> None:
    data = open_here(jsonl, tmp_path / "data", documents="across")
    assert data.batch(seed=0, index=0, rows=range(4)).document_ids is None


def test_what_is_no_running_text_has_nothing_to_reach_across(jsonl: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(1000, dtype=np.uint8))
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 50)
    for name, more in (("a.npy", {"num_values": 2}), ("chats.jsonl", {})):
        with pytest.raises(ValueError, match=f"documents is 'across'; expected 'inside' for .*{name}"):
            open_here(tmp_path / name, tmp_path / "data", documents="across", **more)
    prepare(open_source(jsonl), tmp_path / "prepared")
    for name, holds in (
        ("a.npy", "integers; expected text"),
        ("chats.jsonl", "conversations; expected doc"),
        ("prepared", "tokens; expected text"),
    ):
        with pytest.raises(ValueError, match=f"{name} holds {holds}"):
            open_text(tmp_path / name, tmp_path / "data")
