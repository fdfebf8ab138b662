"""Windows of held-out text: their labels, their documents, and how many bytes they stand for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palm_pytorch.data.batch import IGNORED, Batch, HeldOut, ends_within


@given(length=st.integers(2, 400), data=st.data())
def test_windows_are_spread_and_no_label_comes_twice(length: int, data: st.DataObject) -> None:
    seq_len = data.draw(st.integers(1, length - 1))
    max_windows = data.draw(st.none() | st.integers(1, 50))
    held_out = HeldOut(np.arange(length), length - 1)
    positions = held_out.positions(seq_len, max_windows)
    fitting = (length - 1) // seq_len
    assert len(positions) == (fitting if max_windows is None else min(fitting, max_windows))
    batch = held_out.batch(positions, seq_len)
    assert batch.document_ids is None
    assert torch.equal(batch.tokens, torch.from_numpy(positions)[:, None] + torch.arange(seq_len))
    assert torch.equal(batch.labels, batch.tokens + 1)
    assert len(set(batch.labels.flatten().tolist())) == batch.labels.numel()
    spacing = np.diff(positions)
    assert (spacing == spacing[:1]).all()
    # evenly spread: what is left over at the end is less than one window's share
    last = int(batch.labels[-1, -1])
    assert length - last - 1 < max(seq_len, -(-length // len(positions)) + len(positions))


def test_batches_are_the_windows_in_order() -> None:
    held_out = HeldOut(np.arange(101, dtype=np.uint8), 100)
    found = list(held_out.batches(10, 4))
    assert [len(batch.tokens) for batch in found] == [4, 4, 2]
    assert all(batch.tokens.dtype == batch.labels.dtype == torch.int64 for batch in found)
    assert torch.equal(torch.cat([batch.tokens for batch in found]), torch.arange(100).view(10, 10))


def test_documents_are_told_apart_and_their_first_tokens_are_no_labels() -> None:
    """Documents abc, d, ef, each with its end token "."; windows of five tokens."""
    stream = np.frombuffer(b"abc.d.ef.", dtype=np.uint8)
    held_out = HeldOut(stream, 3, ends=np.array([4, 6, 9]))
    first, second = held_out.batch([0, 3], 5), held_out.batch([3], 5)
    assert bytes(first.tokens[0].tolist()) == b"abc.d"
    assert first.labels[0].tolist() == [*b"bc.", IGNORED, *b"."]
    assert first.document_ids is not None and second.document_ids is not None
    assert first.document_ids[0].tolist() == [0, 0, 0, 0, 1]
    assert second.labels[0].tolist() == [IGNORED, *b".", IGNORED, *b"f."]
    assert second.document_ids[0].tolist() == [0, 1, 1, 2, 2]
    assert torch.equal(first.tokens[1], second.tokens[0])
    assert held_out.num_labels == 6


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=9), seq_len=st.integers(1, 12), data=st.data()
)
def test_every_label_of_every_window(lengths: list[int], seq_len: int, data: st.DataObject) -> None:
    """Compared with a definition that looks at each position alone."""
    total = sum(lengths)
    counts = data.draw(st.none() | st.lists(st.booleans(), min_size=total, max_size=total))
    ends = np.cumsum(lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    seen = None if counts is None else np.array(counts)
    held_out = HeldOut(np.arange(total) + 100, 1, ends, seen)

    def counted(at: int) -> bool:
        return document[at] == document[at - 1] and (seen is None or bool(seen[at]))

    assert held_out.num_labels == sum(counted(at) for at in range(1, total))
    for start in range(total - seq_len):
        batch = held_out.batch([start], seq_len)
        at = range(start, start + seq_len)
        assert batch.labels[0].tolist() == [101 + t if counted(t + 1) else IGNORED for t in at]
        assert batch.document_ids is not None
        assert batch.document_ids[0].tolist() == [document[t] - document[start] for t in at]


def test_responses_alone_count() -> None:
    held_out = HeldOut(np.arange(6), 2, counts=np.array([1, 0, 0, 1, 1, 0], dtype=bool))
    assert held_out.num_labels == 2
    assert held_out.batch([0], 5).labels.tolist() == [[IGNORED, IGNORED, 3, 4, IGNORED]]
    single = [batch.labels.tolist() for batch in held_out.batches(2, 1)]
    assert single == [[[IGNORED, IGNORED]], [[3, 4]]]


def test_a_batch_moves_whole() -> None:
    batch = Batch(*torch.zeros(4, 1, 2)).to(torch.device("meta"))
    assert all(tensor is not None and tensor.is_meta for tensor in batch)
    assert Batch(torch.zeros(1), torch.zeros(1)).to(torch.device("meta")).document_ids is None


def test_ends_at_the_edges_of_a_stretch() -> None:
    ends = np.array([3, 5, 9, 10])
    assert ends_within(ends, 3, 6).tolist() == [2]
    assert ends_within(ends, 2, 8).tolist() == [1, 3, 7]
    assert ends_within(ends, 5, 4).tolist() == []


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda held_out: held_out.positions(0), "seq_len=0"),
        (lambda held_out: held_out.positions(2, 0), "max_windows=0"),
        (lambda held_out: held_out.positions(9), r"tokens: 9, expected at least seq_len \+ 1 = 10"),
        (lambda held_out: held_out.batches(2, 0), "batch_size=0"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[HeldOut], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        call(HeldOut(np.arange(9), 8))
