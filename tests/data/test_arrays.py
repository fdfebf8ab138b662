"""Integers in files: streams and whole sequences, what is refused, and a position for each wrong value."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palm_pytorch.data.arrays import SequenceDataset, StreamDataset, open_array
from palm_pytorch.data.batch import IGNORED
from palm_pytorch.data.opening import open_dataset

RANDOM = np.random.default_rng(0)
STREAM = RANDOM.integers(0, 300, 4000)
ROWS = RANDOM.integers(0, 300, (500, 12)).astype(np.uint16)
START = 300


def write(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> SequenceDataset:
    found = open_dataset(write(tmp_path / "rows.npy", ROWS), data_dir=tmp_path, seq_len=12, num_values=300)
    assert isinstance(found, SequenceDataset)
    return found


def test_a_stream_is_read_in_windows(tmp_path: Path) -> None:
    found = open_dataset(
        write(tmp_path / "stream.npy", STREAM), data_dir=tmp_path, seq_len=30, num_values=300
    )
    assert isinstance(found, StreamDataset) and found.num_tokens == 301
    batch = found.batch(seed=1, index=2, rows=range(5))
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1]) and batch.document_ids is None
    windows = {tuple(STREAM[at : at + 30].tolist()) for at in range(3600 - 30)}
    assert all(tuple(row) in windows for row in batch.tokens.tolist())
    assert torch.equal(batch.tokens[3:], found.batch(seed=1, index=2, rows=range(3, 5)).tokens)
    assert found.held_out("valid").tokens.tolist() == STREAM[3600:3800].tolist()
    assert found.held_out("test").tokens.tolist() == STREAM[3800:].tolist()
    assert found.held_out("test").num_bytes == 199
    assert "integers below 300, values to train 3,600, valid 200, test 200" in str(found)


def test_a_bin_file_is_the_same_stream(tmp_path: Path) -> None:
    STREAM.astype("<u2").tofile(tmp_path / "stream.bin")
    found = open_array(tmp_path / "stream.bin", 300, seq_len=30, dtype="uint16")
    assert found.held_out("valid").tokens.tolist() == STREAM[3600:3800].tolist()


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_a_worker_maps_the_file_for_itself(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"stream{suffix}"
    if suffix == ".npy":
        np.save(path, STREAM)
    else:
        STREAM.astype("<u2").tofile(path)
    found = open_array(path, 300, seq_len=30, dtype=None if suffix == ".npy" else "uint16")
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert again.fingerprint == found.fingerprint and str(again) == str(found)
    batches = [each.batch(seed=1, index=2, rows=range(5)).tokens for each in (found, again)]
    assert torch.equal(*batches)


def test_sequences_are_read_whole(rows: SequenceDataset) -> None:
    known = {tuple(row): n for n, row in enumerate(ROWS.tolist())}
    batch = rows.batch(seed=1, index=2, rows=range(50))
    assert (batch.tokens[:, 0] == START).all() and torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    chosen = [known[tuple(row)] for row in batch.labels.tolist()]
    assert len(set(chosen)) == 50
    assert torch.equal(batch.labels[7:9], rows.batch(seed=1, index=2, rows=range(7, 9)).labels)
    assert not torch.equal(batch.labels, rows.batch(seed=1, index=3, rows=range(50)).labels)
    assert not torch.equal(batch.labels, rows.batch(seed=0, index=2, rows=range(50)).labels)

    splits = {split: set(numbers.tolist()) for split, numbers in rows.splits.items()}
    assert splits["train"] | splits["valid"] | splits["test"] == set(range(500))
    assert sum(map(len, splits.values())) == 500 and 10 <= len(splits["valid"]) <= 45
    assert set(chosen) <= splits["train"]
    sizes = {split: len(numbers) for split, numbers in splits.items()}
    assert f"sequences to train {sizes['train']}, valid {sizes['valid']}, test {sizes['test']}" in str(rows)


def test_held_out_windows_are_sequences(rows: SequenceDataset) -> None:
    held_out = rows.held_out("test")
    expected = ROWS[rows.splits["test"]].tolist()
    assert held_out.num_labels == held_out.num_bytes == 12 * len(expected)
    batches = [*held_out.batches(12, 4)]
    assert torch.cat([batch.labels for batch in batches]).tolist() == expected
    assert all((batch.tokens[:, 0] == START).all() for batch in batches)
    assert not any((batch.labels == IGNORED).any() for batch in batches)
    few = held_out.positions(12, 5)
    assert len(few) == 5 and (few % 13 == 0).all() and few[-1] > len(held_out.tokens) / 2


def test_the_order_of_the_rows_decides_no_split(rows: SequenceDataset, tmp_path: Path) -> None:
    turned = open_array(write(tmp_path / "turned.npy", ROWS[::-1]), 300, seq_len=12)
    for split in ("valid", "test"):
        found, before = turned.held_out(split).tokens, rows.held_out(split).tokens  # type: ignore[arg-type]
        assert found.reshape(-1, 13)[::-1].tolist() == before.reshape(-1, 13).tolist()
    assert turned.fingerprint != rows.fingerprint
    assert open_array(tmp_path / "rows.npy", 301, seq_len=12).fingerprint != rows.fingerprint


def changed(values: np.ndarray, at: Any, value: int) -> np.ndarray:
    values = values.astype(np.int32)
    values[at] = value
    return values


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            changed(STREAM, 3999, 300),
            "a.npy: the value at 3999 is 300; expected 0 to 299, as num_tokens is 300",
        ),
        (changed(STREAM, slice(70, 80), -1), "the value at 70 is -1; expected 0 to 299"),
        (changed(ROWS, (499, 3), 5000), "the value at 499, 3 is 5000"),
        (ROWS.astype(float), r"holds float64 of shape \(500, 12\); expected integers"),
        (ROWS.reshape(500, 3, 4), r"of shape \(500, 3, 4\); expected integers, \(length,\) or"),
        (ROWS[:0], r"of shape \(0, 12\)"),
        (ROWS[:, :11], "seq_len is 12; expected 11, the length of the sequences in"),
        (ROWS[:3], "too small: none of 3 sequences falls to"),
        (STREAM[:200], "too short: 200 tokens, and seq_len=12 needs 260"),
    ],
)
def test_what_is_no_array_of_such_integers(values: np.ndarray, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        open_array(write(tmp_path / "a.npy", values), 300, seq_len=12)


def test_the_wrong_value_of_a_long_file(tmp_path: Path) -> None:
    """It is read in parts, and counted from the start."""
    values = np.zeros(9_000_000, np.uint8)
    values[8_765_432:] = 7
    with pytest.raises(ValueError, match="value at 8765432 is 7; expected 0 to 6"):
        open_array(write(tmp_path / "a.npy", values), 7, seq_len=12)


def test_files_that_are_none(tmp_path: Path) -> None:
    def says(name: str, content: bytes | None, message: str, **given: Any) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_dataset(tmp_path / name, data_dir=tmp_path, seq_len=2, **given)

    says("a.npy", None, "a.npy' does not exist: expected a file of integers", num_values=9)
    says("b.npy", b"", "b.npy is empty", num_values=9)
    says("c.npy", b"no array", "c.npy is damaged, or not a .npy file", num_values=9)
    says("d.bin", bytes(99), "expected data_dtype beside it", num_values=9)
    says("d.bin", bytes(99), "99 bytes are no whole number of uint16", num_values=9, dtype="uint16")
    says("e.bin", bytes(99), "data_dtype is 'float32'; expected integers", num_values=9, dtype="float32")
    says("e.bin", bytes(99), "data_dtype is 'byte7'; expected integers", num_values=9, dtype="byte7")
    says("f.bin", bytes(99), "expected num_tokens beside it")
    says("g.txt", b"text " * 99, "num_tokens is 9 .*; expected neither for .*g.txt", num_values=9)
    np.save(tmp_path / "h.npy", STREAM)
    says("h.npy", None, "data_dtype is 'uint8'; expected none for", num_values=300, dtype="uint8")
