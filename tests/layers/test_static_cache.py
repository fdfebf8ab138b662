"""The static cache by itself; that models are exact with it is tested with generation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from palm_pytorch.layers.kv_cache import KVCache
from palm_pytorch.layers.static_cache import StaticCache


def filled(capacity: int, mask: Tensor | None = None) -> KVCache:
    """Two layers of 2 rows with 3 tokens, the second layer only with the last 2 of them."""
    cache = KVCache(2, capacity)
    cache.layers[1].capacity = capacity - 1
    cache.begin(mask, 2, 3)
    for n, layer in zip((3, 2), cache, strict=True):
        layer.append(torch.randn(2, 1, n, 4), torch.randn(2, 1, n, 4))
    cache.advance()
    return cache


@torch.no_grad()
def test_a_token_goes_behind_those_that_are_there() -> None:
    cache = filled(9)
    before = [[stored.clone() for stored in layer.stored] for layer in cache]
    static = StaticCache(cache, room=6)
    for step in range(3):
        new = torch.randn(2, 2, 1, 1, 4)
        mask = static.begin(None, 2, 1)
        assert mask is not None and mask.tolist() == [[True] * (4 + step) + [False] * (2 - step)] * 2
        assert static.positions(1, torch.device("cpu")).tolist() == [3 + step]
        for layer, old, length, taken in zip(static, before, (3, 2), (6, 5), strict=True):
            assert layer.at is not None and layer.at.tolist() == [length + step]
            for given, stored, tensor in zip(layer.append(*new), old, new, strict=True):
                stored[:, :, length + step] = tensor[:, :, 0]
                assert given.shape == (2, 1, taken, 4)
                assert torch.equal(given[:, :, : length + step + 1], stored[:, :, : length + step + 1])
                assert (given[:, :, length + step + 1 :] == 0).all()  # poisoned memory no more
        static.advance()
    # The storage is that of the other cache, which counts its own tokens.
    assert cache.length == 3 and torch.equal(cache.layers[0].stored[0][:, :, :6], before[0][0][:, :, :6])


@torch.no_grad()
def test_what_was_masked_stays_so() -> None:
    static = StaticCache(filled(8, torch.tensor([[False, True, True], [True] * 3])), room=5)
    mask = static.begin(None, 2, 1)
    assert mask is not None
    assert mask.tolist() == [[False, True, True, True, False], [True, True, True, True, False]]


@torch.no_grad()
def test_room_beyond_the_capacity_is_made() -> None:
    cache = filled(4)
    keys = cache.layers[0].stored[0][:, :, :3].clone()
    static = StaticCache(cache, room=7)
    assert static.layers[0].stored[0].shape == (2, 1, 7, 4)
    assert torch.equal(static.layers[0].stored[0][:, :, :3], keys) and cache.layers[0].capacity == 8


@torch.no_grad()
def test_keys_fade_as_in_the_other_cache() -> None:
    factor = torch.tensor([0.5, 1.0], dtype=torch.float64)
    cache = KVCache(1, 6)
    cache.fade_keys(factor, 2, torch.device("cpu"))
    cache.layers[0].append(*torch.ones(2, 1, 1, 2, 2))
    cache.advance()
    static = StaticCache(cache, room=5)
    for fading in ([0.25, 0.5, 1, 0, 0], [0.125, 0.25, 0.5, 1, 0]):
        static.fade_keys(factor, 1, torch.device("cpu"))
        keys, values = static.layers[0].append(*torch.ones(2, 1, 1, 1, 2))
        assert keys[0, 0, :, 0].tolist() == fading
        assert values[0, 0, :, 0].tolist() == [float(x > 0) for x in fading]
        static.advance()


@torch.no_grad()
def test_what_does_not_fit_is_refused() -> None:
    for cache, room, said in ((KVCache(1), 5, "room: .*0 tokens.*5"), (filled(9), 3, "room: .*3 tokens.*3")):
        with pytest.raises(ValueError, match=said):
            StaticCache(cache, room)
    static = StaticCache(filled(9), room=6)
    for key_mask, b, n, said in (
        (None, 2, 2, "cache: .*2 tokens"),
        (torch.ones(2, 1, dtype=torch.bool), 2, 1, "cache: .*key_mask"),
        (None, 3, 1, "cache: .*2 rows.*3"),
    ):
        with pytest.raises(ValueError, match=said):
            static.begin(key_mask, b, n)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"cache: .*no_grad"):
        static.begin(None, 2, 1)
