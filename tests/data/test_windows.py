"""Splits are exact, and every training row is a function of seed, step and row alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palm_pytorch.data.windows import split_by_position, train_batch

MASK = 2**64 - 1


def text_of(length: int) -> np.ndarray:
    return np.zeros(length, dtype=np.uint8)


def test_enwik8_is_split_90_5_5() -> None:
    train, valid, test = split_by_position(text_of(100_000_000), 1024, "poem")
    assert [len(part) for part in (train, valid, test)] == [90_000_000, 5_000_000, 5_000_000]


@given(length=st.integers(40, 5000), seq_len=st.integers(1, 300))
def test_splits_follow_one_another_and_hold_a_window(length: int, seq_len: int) -> None:
    tokens = np.arange(length)
    if length < 20 * (seq_len + 1):
        with pytest.raises(ValueError, match="too short"):
            split_by_position(tokens, seq_len, "")
    else:
        splits = split_by_position(tokens, seq_len, "")
        assert np.array_equal(np.concatenate(splits), tokens)
        assert min(map(len, splits)) >= seq_len + 1
        assert all(
            abs(len(part) - share * length) < 1 for part, share in zip(splits, (0.9, 0.05, 0.05), strict=True)
        )


def test_a_short_corpus_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"poem is too short: 20,499 tokens.*seq_len=1024.*20,500"):
        split_by_position(text_of(20_499), 1024, "poem")
    split_by_position(text_of(20_500), 1024, "poem")


def philox(seed: int, step: int) -> Iterator[int]:
    """Philox4x64-10 as Salmon et al. 2011 define it, with counters from 1, as numpy has them."""
    counter = 0
    while True:
        counter += 1
        x, key = [counter, 0, 0, 0], [seed, step]
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(second >> 64) ^ x[1] ^ key[0], second & MASK, (first >> 64) ^ x[3] ^ key[1], first & MASK]
            key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
        yield from x


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 123), (MASK, 2**40 + 1)])
def test_positions_are_those_of_the_generators_definition(seed: int, step: int) -> None:
    length, seq_len = 1_000_003, 17
    rows = range(3, 14)
    draws = philox(seed, step)
    positions = [next(draws) % (length - seq_len) for _ in range(14)][3:]
    batch = train_batch(np.arange(length), seq_len=seq_len, seed=seed, step=step, rows=rows)
    assert batch.dtype == torch.int64
    assert torch.equal(batch, torch.tensor(positions)[:, None] + torch.arange(seq_len + 1))


@given(
    cuts=st.lists(st.integers(1, 23), max_size=5),
    world=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, MASK),
    step=st.integers(0, 2**40),
)
def test_rows_do_not_depend_on_how_a_step_is_cut(cuts: list[int], world: int, seed: int, step: int) -> None:
    tokens = np.arange(10_000) % 256

    def read(rows: range) -> torch.Tensor:
        return train_batch(tokens, seq_len=9, seed=seed, step=step, rows=rows)

    whole = read(range(24))
    edges = sorted({0, 24, *cuts})
    slices = [read(range(start, stop)) for start, stop in pairwise(edges)]
    assert torch.equal(torch.cat(slices), whole)
    for rank in range(world):
        assert torch.equal(read(range(rank, 24, world)), whole[rank::world])


def test_other_processes_read_the_same() -> None:
    program = """
import numpy as np
from palm_pytorch.data.windows import train_batch
for step in (3, 2, 3):
    print(train_batch(np.arange(1000), seq_len=5, seed=11, step=step, rows=range(4))[:, 0].tolist())
"""
    there = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    ).stdout.splitlines()
    here = train_batch(np.arange(1000), seq_len=5, seed=11, step=3, rows=range(4))[:, 0].tolist()
    assert there[0] == there[2] == str(here) != there[1]


@given(length=st.integers(2, 300), data=st.data())
def test_windows_never_cross_the_end(length: int, data: st.DataObject) -> None:
    seq_len = data.draw(st.integers(1, length - 1))
    batch = train_batch(np.arange(length), seq_len=seq_len, seed=0, step=0, rows=range(50))
    assert batch.min() >= 0
    assert batch.max() < length
    assert (batch.diff(dim=1) == 1).all()


def test_positions_are_uniform() -> None:
    """Chi-squared of 20,000 draws over 50 positions: below 85.4 with probability 0.999 if fair."""
    draws = [
        train_batch(np.arange(59), seq_len=9, seed=5, step=step, rows=range(100))[:, 0] for step in range(200)
    ]
    counts = torch.bincount(torch.cat(draws), minlength=50).double()
    assert len(counts) == 50
    assert float(((counts - 400) ** 2 / 400).sum()) < 85.4


def test_steps_and_seeds_differ() -> None:
    def positions(seed: int, step: int) -> tuple[int, ...]:
        batch = train_batch(np.arange(10**6), seq_len=1, seed=seed, step=step, rows=range(8))
        return tuple(batch[:, 0].tolist())

    assert len({positions(seed, step) for seed in range(20) for step in range(20)}) == 400


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: train_batch(np.arange(9), seq_len=0, seed=0, step=0, rows=range(1)), "seq_len=0"),
        (
            lambda: train_batch(np.arange(9), seq_len=9, seed=0, step=0, rows=range(1)),
            "tokens: 9 of them.*10",
        ),
        (lambda: train_batch(np.arange(9), seq_len=2, seed=-1, step=0, rows=range(1)), "seed=-1"),
        (
            lambda: train_batch(np.arange(9), seq_len=2, seed=0, step=2**64, rows=range(1)),
            "step=18446744073709551616",
        ),
        (lambda: train_batch(np.arange(9), seq_len=2, seed=0, step=0, rows=range(0)), r"rows=range\(0, 0\)"),
        (
            lambda: train_batch(np.arange(9), seq_len=2, seed=0, step=0, rows=range(-1, 2)),
            r"rows=range\(-1, 2\)",
        ),
        (lambda: split_by_position(text_of(100), -1, ""), "seq_len=-1"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        call()
