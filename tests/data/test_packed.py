"""Every token is read once in an epoch, in an order that depends on seed, batch and row alone."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palm_pytorch.data.batch import IGNORED, Batch
from palm_pytorch.data.corpus import open_corpus
from palm_pytorch.data.packed import PackedDataset
from palm_pytorch.data.prepare import prepare
from palm_pytorch.data.shards import read_manifest
from palm_pytorch.data.sources import open_source
from palm_pytorch.data.tokenizer import IntegerTokenizer

END = 0xFF


@pytest.fixture(scope="module")
def folder(jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("palm_pytorch.data.blocks.BLOCK", 4096)
        prepare(open_source(jsonl), path, shard_tokens=9000, valid_share=0.2, test_share=0.05)
    return path


@pytest.fixture(scope="module")
def stream(folder: Path) -> np.ndarray:
    """All training tokens."""
    return np.concatenate([np.fromfile(path, np.uint8) for path in sorted(folder.glob("train-*.bin"))])


def open_packed(folder: Path, seq_len: int, rows: int = 4, **options: Any) -> PackedDataset:
    return PackedDataset(folder, seq_len, rows_per_batch=rows, **options)


def epoch_of(data: PackedDataset, seed: int, epoch: int) -> Batch:
    """All rows of one epoch, when a batch is a row."""
    first = epoch * data.num_chunks
    batches = [data.batch(seed=seed, index=first + at, rows=range(1)) for at in range(data.num_chunks)]
    ids = [batch.document_ids for batch in batches if batch.document_ids is not None]
    return Batch(
        torch.cat([batch.tokens for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat(ids) if ids else None,
    )


@pytest.mark.parametrize("seq_len", [1, 37, 128, 3001])
@pytest.mark.parametrize("how", ["inside", "across"])
def test_every_token_is_a_label_once_an_epoch(
    seq_len: int, how: Any, folder: Path, stream: np.ndarray
) -> None:
    """And follows the token that stands before it in the stream."""
    data = open_packed(folder, seq_len, rows=1, documents=how)
    assert data.num_chunks == -(-len(stream) // seq_len)
    if seq_len == 1:  # too many batches to read them all: their rows instead
        data = open_packed(folder, seq_len, rows=data.num_chunks, documents=how)
        batch = data.batch(seed=3, index=0, rows=range(data.num_chunks))
    else:
        batch = epoch_of(data, seed=3, epoch=2)
    starts = np.flatnonzero(stream[:-1] == END) + 1
    first = np.zeros(len(stream), dtype=bool)
    first[0] = True
    if how == "inside":
        first[starts] = True
    counted = batch.labels[batch.labels != IGNORED]
    assert Counter(counted.tolist()) == Counter(stream[~first].tolist())
    # each label follows its token in the stream
    pairs = torch.stack([batch.tokens[batch.labels != IGNORED], counted]).T.tolist()
    at = np.flatnonzero(~first)
    expected = np.stack([stream[at - 1], stream[at]]).T.tolist()
    assert Counter(map(tuple, pairs)) == Counter(map(tuple, expected))


def test_rows_are_stretches_of_the_stream(folder: Path, stream: np.ndarray) -> None:
    data = open_packed(folder, 64)
    doubled = bytes(np.concatenate([stream, stream]))
    batch = data.batch(seed=1, index=5, rows=range(4))
    assert batch.document_ids is not None
    for tokens, labels, ids in zip(*(part.tolist() for part in batch if part is not None), strict=True):
        at = doubled.index(bytes(tokens))
        following = list(doubled[at + 1 : at + 65])
        assert labels == [
            IGNORED if token == END else label for token, label in zip(tokens, following, strict=True)
        ]
        assert ids == [tokens[:position].count(END) for position in range(64)]


def test_across_documents_all_labels_count(folder: Path) -> None:
    inside, across = (open_packed(folder, 64, documents=how) for how in ("inside", "across"))
    one, other = (data.batch(seed=1, index=0, rows=range(4)) for data in (inside, across))
    assert torch.equal(one.tokens, other.tokens) and other.document_ids is None
    assert (other.labels == IGNORED).sum() <= 1
    assert torch.equal(one.labels == IGNORED, one.tokens == END)
    assert torch.equal(one.labels[one.tokens != END], other.labels[one.tokens != END])


def test_epochs_and_seeds_differ_in_order_and_cuts(folder: Path) -> None:
    data = open_packed(folder, 100, rows=1)
    firsts = [epoch_of(data, seed, epoch).tokens for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    for number, one in enumerate(firsts):
        for other in firsts[number + 1 :]:
            assert not torch.equal(one, other)
            rows = {bytes(row.tolist()) for row in one} & {bytes(row.tolist()) for row in other}
            assert len(rows) < len(one) // 10  # cut at other places


def test_a_row_is_a_function_of_seed_batch_and_row(folder: Path) -> None:
    """Whatever the slices and the processes; and a batch may span the end of an epoch, or several."""
    data = open_packed(folder, 512, rows=60)
    assert data.num_chunks < 3 * 60
    for index in range(5):
        whole = data.batch(seed=9, index=index, rows=range(60))
        for rows in (range(5), range(5, 60), range(1, 60, 7), range(59, -1, -1)):
            part = pickle.loads(pickle.dumps(data)).batch(seed=9, index=index, rows=rows)
            assert part.document_ids is not None and whole.document_ids is not None
            assert torch.equal(part.tokens, whole.tokens[list(rows)])
            assert torch.equal(part.labels, whole.labels[list(rows)])
            assert torch.equal(part.document_ids, whole.document_ids[list(rows)])


def test_held_out_documents_and_their_bytes(folder: Path) -> None:
    data = open_packed(folder, 64)
    for split in ("valid", "test"):
        tokens = np.fromfile(folder / f"{split}.bin", np.uint8)
        held_out = data.held_out(split)
        assert np.array_equal(held_out.tokens, tokens)
        documents = bytes(tokens).split(bytes([END]))[:-1]
        assert held_out.num_bytes == sum(len(document) - 1 for document in documents)
        assert held_out.num_labels == sum(len(document) for document in documents)  # the end is one
        across = open_packed(folder, 64, documents="across").held_out(split)
        assert across.ends is None and across.num_labels == len(tokens) - 1
        assert across.num_bytes == sum(map(len, documents)) - 1


def test_a_running_text_is_read_without_documents(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(250)) * 10)
    prepare(open_corpus(tmp_path / "text.txt", tmp_path), tmp_path / "out")
    data = open_packed(tmp_path / "out", 10)
    batch = data.batch(seed=0, index=0, rows=range(4))
    assert batch.document_ids is None
    assert torch.equal(batch.labels[batch.labels >= 0], (batch.tokens[batch.labels >= 0] + 1) % 250)
    assert data.held_out("test").num_bytes == 124 and "documents" not in str(data)


def test_it_says_what_it_is(folder: Path) -> None:
    data = open_packed(folder, 64)
    assert data.name == "corpus.jsonl" and str(folder) in str(data) and " documents, valid " in str(data)
    assert data.num_tokens == 256 and data.fingerprint == read_manifest(folder).fingerprint


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda folder: open_packed(folder, 0), "seq_len=0"),
        (lambda folder: open_packed(folder, 8, rows=0), "rows_per_batch=0"),
        (
            lambda folder: open_packed(folder, 8, tokenizer=IntegerTokenizer(256)),
            r"tokenizer is integers below 256; .*corpus has another \(bytes\)",
        ),
        (lambda folder: open_packed(folder, 9000), r"too short: .* to test, .* with a larger test_share"),
        (lambda folder: open_packed(folder, 8).batch(seed=0, index=0, rows=range(5)), r"rows=range\(0, 5\)"),
        (lambda folder: open_packed(folder, 8).batch(seed=0, index=0, rows=range(0)), r"rows=range\(0, 0\)"),
        (lambda folder: open_packed(folder, 8).batch(seed=-1, index=0, rows=range(1)), "seed=-1"),
        (lambda folder: open_packed(folder, 8).batch(seed=0, index=-1, rows=range(1)), "index=-1"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[Path], object], complaint: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        call(folder)


def test_a_split_has_a_window_at_least(folder: Path) -> None:
    manifest = read_manifest(folder)
    shortest = min(manifest.totals(split)["tokens"] for split in ("train", "valid", "test"))
    assert len(open_packed(folder, shortest - 1).held_out("test").positions(shortest - 1)) >= 1
    with pytest.raises(ValueError, match=f"expected at least {shortest + 1:,} for seq_len"):
        open_packed(folder, shortest)


def test_a_damaged_shard_is_refused(jsonl: Path, tmp_path: Path) -> None:
    prepare(open_source(jsonl), tmp_path / "out")
    path = tmp_path / "out" / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=r"train-00000\.bin is damaged"):
        open_packed(tmp_path / "out", 8)


def test_document_ends_are_not_guessed_from_tokens(tmp_path: Path) -> None:
    """A byte that looks like the end token inside a document does not end it."""
    text = tmp_path / "texts"
    text.mkdir()
    for number in range(200):
        (text / f"{number:03d}").write_bytes(b"ab\xffcd%d" % number)
    prepare(open_source(text), tmp_path / "out", valid_share=0.2, test_share=0.2)
    batch = open_packed(tmp_path / "out", 40).batch(seed=0, index=0, rows=range(4))
    assert batch.document_ids is not None
    for tokens, ids in zip(batch.tokens.tolist(), batch.document_ids.tolist(), strict=True):
        for position in range(1, 40):
            new = ids[position] != ids[position - 1]
            assert new == (tokens[position - 1] == END and tokens[position] == ord("a"))
