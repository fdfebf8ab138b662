"""The order in which chunks of a corpus are read: for each epoch a permutation, computed and never stored."""

from __future__ import annotations

import numpy as np

ROUNDS = 8


def epoch_draws(seed: int, epoch: int, count: int) -> np.ndarray:
    """`count` random uint64 of an epoch: raw draws of Philox (Salmon et al. 2011, "Parallel random numbers:
    as easy as 1, 2, 3") with the key `(seed, epoch)`."""
    return np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)


def permute(numbers: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a random permutation of `range(size)` puts each of `numbers`, in time and memory of these alone.

    A Feistel network permutes the next power of two, and what lands beyond `size` goes through it again until
    it does not (cycle-walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): at most half
    do each time.

    Args:
        numbers: `(count,)` integers below `size`.
        size: 1 to 2**62.
        keys: `(ROUNDS,)` uint64 that choose the permutation.
    """
    bits = max(2, (size - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    result = numbers.astype(np.uint64)
    todo = np.arange(len(result))
    while len(todo):
        low, high = result[todo] & low_mask, result[todo] >> low_bits
        for number, key in enumerate(keys):
            if number % 2:
                low ^= _mix(high + key) & low_mask
            else:
                high ^= _mix(low + key) & high_mask
        result[todo] = high << low_bits | low
        todo = todo[result[todo] >= size]
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators")."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
