"""Permutations are permutations, of any size, and look random."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palm_pytorch.data.order import ROUNDS, epoch_draws, permute


def keys(seed: int) -> np.ndarray:
    return epoch_draws(seed, 0, ROUNDS)


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_every_number_comes_once(size: int, seed: int) -> None:
    order = permute(np.arange(size), size, keys(seed))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


@given(size=st.integers(2**20, 2**62), data=st.data())
def test_a_few_numbers_of_a_large_one(size: int, data: st.DataObject) -> None:
    """Each comes out where it would in any company, and no two at the same place."""
    numbers = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=20, unique=True))
    places = permute(np.array(numbers), size, keys(3))
    assert len(set(places.tolist())) == len(numbers)
    assert 0 <= places.min() <= places.max() < size
    assert permute(np.array(numbers[1:2]), size, keys(3))[0] == places[1]


def test_all_permutations_of_four_are_about_equally_likely() -> None:
    """Chi-squared of 4,800 of them over 24: below 49.7 with probability 0.999 if fair."""
    counts = dict.fromkeys(permutations(range(4)), 0)
    for seed in range(4800):
        counts[tuple(permute(np.arange(4), 4, keys(seed)).tolist())] += 1
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7


@pytest.mark.parametrize("size", [1000, 1024, 1025])
def test_neighbours_part_and_numbers_go_anywhere(size: int) -> None:
    orders = np.stack([permute(np.arange(size), size, keys(seed)) for seed in range(50)])
    steps = np.abs(np.diff(orders, axis=1))
    assert abs(steps.mean() / (size / 3) - 1) < 0.02  # of two independent places
    counts = np.histogram(orders[:, 0], bins=5, range=(0, size))[0]
    assert counts.min() > 0
    assert np.mean(orders[0] == np.arange(size)) < 0.01


def test_the_order_stays_what_it_is() -> None:
    """A run that is resumed with a later release reads on as it began: the definition, number by number."""
    size, numbers = 700, [int(key) for key in keys(42)]

    def place(number: int) -> int:
        while True:
            low, high = number % 32, number // 32
            for turn, key in enumerate(numbers):
                if turn % 2 == 0:
                    high ^= mixed(low + key) % 32
                else:
                    low ^= mixed(high + key) % 32
            number = high * 32 + low
            if number < size:
                return number

    assert permute(np.arange(size), size, keys(42)).tolist() == [place(number) for number in range(size)]
    assert epoch_draws(7, 123, 2).tolist() != epoch_draws(7, 124, 2).tolist()


def mixed(x: int) -> int:
    x %= 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31
