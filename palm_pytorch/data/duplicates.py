"""Which documents have been seen, at 16 bytes each."""

from __future__ import annotations

import numpy as np

FRESH = 1 << 16  # that are kept in a Python set, at some 100 bytes each, before they are sorted away


class Seen:
    """A set of 16-byte digests: sorted arrays, each at most half as long as the one before.

    Memory is 16 bytes a digest, and twice that for a moment when arrays are merged.
    """

    def __init__(self) -> None:
        self.sorted: list[np.ndarray] = []
        self.fresh: set[bytes] = set()

    def add(self, digest: bytes) -> bool:
        """Whether it was not there yet."""
        if digest in self.fresh or any(self._holds(array, digest) for array in self.sorted):
            return False
        self.fresh.add(digest)
        if len(self.fresh) >= FRESH:
            self._sort_away()
        return True

    @staticmethod
    def _holds(array: np.ndarray, digest: bytes) -> bool:
        # Strings of numpy compare as bytes, short ones as if zeros followed: exactly right at equal length.
        wanted = np.array(digest, dtype=array.dtype)
        at = int(np.searchsorted(array, wanted))
        return at < len(array) and bool(array[at] == wanted)

    def _sort_away(self) -> None:
        merged = np.array(list(self.fresh), dtype="S16")
        self.fresh.clear()
        while self.sorted and len(self.sorted[-1]) < 2 * len(merged):
            merged = np.concatenate([self.sorted.pop(), merged])
        merged.sort()
        self.sorted.append(merged)
