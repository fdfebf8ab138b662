"""The cache by itself; that models are exact with it is tested with generation."""

from __future__ import annotations

import pytest
import torch
from definitions import error

from palm_pytorch import PaLM
from palm_pytorch.layers.kv_cache import KVCache, LayerCache


def filled(capacity: int, steps: list[int], tensors: int = 2) -> tuple[LayerCache, list[torch.Tensor]]:
    """A layer that was appended to in `steps`, and all that it was given."""
    cache = KVCache(1, capacity)
    everything = [torch.randn(2, 3, sum(steps), 5) for _ in range(tensors)]
    for n in steps:
        start = cache.length
        given = cache.layers[0].append(*(t[:, :, start : start + n] for t in everything))
        assert all(torch.equal(a, b[:, :, : start + n]) for a, b in zip(given, everything, strict=True))
        cache.advance()
    return cache.layers[0], everything


@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize("steps", [[1, 1, 1], [4], [5, 1], [2, 17, 1], [40]])
def test_what_was_appended_comes_back_past_any_capacity(steps: list[int], tensors: int) -> None:
    layer, _ = filled(4, steps, tensors)
    assert layer.length == sum(steps) <= layer.capacity and len(layer.stored) == tensors


def test_room_doubles_and_is_not_moved_before() -> None:
    layer, _ = filled(4, [3])
    stored = layer.stored
    one = torch.zeros(2, 3, 1, 5)
    layer.append(one, one)
    assert layer.stored is stored and layer.capacity == 4
    layer.append(*torch.zeros(2, 2, 3, 2, 5))
    assert layer.stored is not stored and layer.capacity == 8


def test_what_is_not_advanced_is_written_over() -> None:
    cache = KVCache(1, 4)
    first, second = torch.randn(2, 1, 1, 2, 3)
    cache.layers[0].append(first)
    (given,) = cache.layers[0].append(second)
    assert torch.equal(given, second) and cache.length == 0
    cache.advance()
    assert cache.length == 2
    cache.advance()
    assert cache.length == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_of_keys_and_values(dtype: torch.dtype) -> None:
    cache = KVCache(3, 50)
    assert cache.nbytes == 0
    for layer in cache:
        layer.append(*torch.zeros(2, 4, 2, 7, 16, dtype=dtype))
    assert cache.nbytes == 2 * 3 * 4 * 50 * 2 * 16 * dtype.itemsize


def test_the_mask_begins_with_the_first_that_hides_something() -> None:
    cache = KVCache(1, 2)
    with torch.no_grad():
        assert cache.begin(None, 2, 3) is None
        cache.layers[0].append(torch.zeros(2, 1, 3, 4))
        cache.advance()
        hidden = torch.tensor([[True, False], [False, True]])
        mask = cache.begin(hidden, 2, 2)
        assert mask is not None and mask.tolist() == [
            [True, True, True, True, False],
            [True, True, True, False, True],
        ]
        # Not advanced, so forgotten.
        mask = cache.begin(None, 2, 4)
        assert mask is not None and mask.shape == (2, 7) and mask.all()


def test_repeated_rows_stand_beside_their_copies() -> None:
    cache = KVCache(2, 4)
    k = torch.arange(2.0).view(2, 1, 1, 1)
    with torch.no_grad():
        cache.begin(torch.tensor([[True], [False]]), 2, 1)
    for layer in cache:
        layer.append(k, -k)
    cache.advance()
    cache.repeat(2)
    for layer in cache:
        keys, values = layer.append(*torch.ones(2, 4, 1, 1, 1))
        assert keys[:, 0, 0, 0].tolist() == [0, 0, 1, 1] and values[:, 0, 0, 0].tolist() == [0, 0, -1, -1]
    assert cache.mask is not None and cache.mask[:, 0].tolist() == [True, True, False, False]


def test_cleared_it_is_empty_and_keeps_its_room() -> None:
    cache = KVCache(1, 4)
    with torch.no_grad():
        cache.begin(torch.zeros(1, 1, dtype=torch.bool), 1, 1)
    cache.layers[0].append(torch.zeros(1, 1, 1, 1))
    cache.advance()
    stored = cache.layers[0].stored
    cache.clear()
    assert cache.length == 0 and cache.mask is None
    cache.layers[0].append(torch.zeros(1, 1, 1, 1))
    assert cache.layers[0].stored is stored


@torch.no_grad()
def test_cleared_it_serves_other_rows_and_another_dtype() -> None:
    net = PaLM(num_tokens=9, dim=16, depth=2, heads=2, dim_head=16).eval()
    cache, text = net.new_cache(8), torch.randint(9, (3, 6))
    for rows, dtype in ((2, torch.float32), (1, torch.float32), (3, torch.bfloat16), (3, torch.float32)):
        cache.clear()
        found = net.to(dtype)(text[:rows], cache=cache)
        assert error(found, net(text[:rows])) <= (1e-6 if dtype is torch.float32 else 2e-2)


@torch.no_grad()
def test_what_it_holds_has_one_dtype() -> None:
    net = PaLM(num_tokens=9, dim=16, depth=2, heads=2, dim_head=16).eval()
    cache, text = net.new_cache(8), torch.randint(9, (1, 6))
    with torch.autocast("cpu", torch.bfloat16):
        net(text, cache=cache)
    with pytest.raises(TypeError, match=r"cache: .*bfloat16, as it holds, got torch.float32: autocast"):
        net(text[:, :1], cache=cache)
    assert cache.length == 6


def test_keys_fade_with_every_token_after_them() -> None:
    cache = KVCache(1, 2)
    factor = torch.tensor([0.5, 1.0], dtype=torch.float64)
    for n in (1, 3):
        cache.fade_keys(factor, n, torch.device("cpu"))
        keys, values = cache.layers[0].append(*torch.ones(2, 1, 1, n, 2))
        cache.advance()
    assert keys[0, 0].tolist() == [[0.125, 1], [0.25, 1], [0.5, 1], [1, 1]]
    assert (values == 1).all()


@pytest.mark.parametrize(
    ("arguments", "said"), [((0,), "depth: .*0"), ((2, 0), "capacity: .*0"), ((2, 1.5), r"capacity: .*1\.5")]
)
def test_bad_sizes_are_refused(arguments: tuple[int, ...], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        KVCache(*arguments)


def test_gradients_and_other_rows_are_refused() -> None:
    cache = KVCache(1)
    with pytest.raises(ValueError, match=r"cache: .*no_grad"):
        cache.begin(None, 2, 1)
    with torch.no_grad():
        cache.layers[0].append(torch.zeros(2, 1, 1, 1))
        cache.advance()
        with pytest.raises(ValueError, match=r"cache: .*2 rows.*got 3"):
            cache.begin(None, 3, 1)
        with pytest.raises(ValueError, match=r"key_mask: .*\(2, 1\)"):
            cache.begin(torch.ones(2, 2, dtype=torch.bool), 2, 1)


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_stored_in_inference_mode_is_gone_on_with_outside(masked: bool) -> None:
    net, tokens = PaLM(num_tokens=9, dim=16, depth=1, heads=2, dim_head=8).eval(), torch.randint(9, (2, 7))
    mask = torch.arange(7).expand(2, -1) >= torch.tensor([[0], [3]]) if masked else None
    cache = net.new_cache(2)
    with torch.inference_mode():
        net(tokens[:, :5], cache=cache, key_mask=None if mask is None else mask[:, :5])
        cache.repeat(1)
    with torch.no_grad():
        found = net(tokens[:, 5:], cache=cache)
        assert error(found, net(tokens, key_mask=mask)[:, 5:]) <= 1e-6


@torch.no_grad()
def test_cleared_it_serves_a_model_whose_keys_do_not_fade() -> None:
    shape = {"num_tokens": 9, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8}
    fading, lasting = PaLM(**shape, xpos=True), PaLM(**shape)
    tokens, cache = torch.randint(9, (2, 7)), fading.new_cache()
    fading(tokens, cache=cache)
    cache.clear()
    assert torch.equal(lasting(tokens, cache=cache), lasting(tokens, cache=lasting.new_cache()))
