"""Steps from a static cache against steps from an ordinary one; that they compile once and never wait.

Shapes: b rows; v num_tokens.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from definitions import error
from small_models import Kind, V, build, each_of, variants_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palm_pytorch.generation import decode
from palm_pytorch.layers.kv_cache import KVCache
from palm_pytorch.layers.static_cache import StaticCache
from palm_pytorch.models.language_model import LanguageModel

VARIANTS = variants_of(100)
variants = each_of(VARIANTS)
MASK = torch.arange(20) >= torch.tensor([[0], [13], [4]])


def begun(net: LanguageModel, mask: Tensor | None = None, capacity: int = 80) -> KVCache:
    """A cache that has read the same 20 tokens of 3 rows each time."""
    tokens = torch.randint(V, (3, 20), generator=torch.Generator().manual_seed(3))
    decode.prefill(net, tokens, cache := net.new_cache(capacity), mask)
    return cache


@variants
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@torch.inference_mode()
def test_logits_are_those_of_an_ordinary_cache(
    kind: Kind, options: dict[str, Any], mask: Tensor | None, backend: str
) -> None:
    net = build(kind, {**options, "attention_backend": backend})
    plain, static = begun(net, mask), StaticCache(begun(net, mask), room=77)
    for step in range(57):
        tokens = torch.randint(V, (3,))
        wanted, found = (decode.step(net, tokens, cache) for cache in (plain, static))
        assert error(found, wanted) <= 1e-5, step
    assert static.at is not None and static.at.item() == 77


@variants
@torch.inference_mode()
def test_it_goes_on_from_what_the_other_cache_holds(kind: Kind, options: dict[str, Any]) -> None:
    """In the same storage, also after that has been filled anew."""
    net = build(kind, options)
    source, plain = begun(net, MASK), begun(net, MASK)
    static = StaticCache(source, room=40)
    for _ in range(2):
        tokens = torch.randint(V, (5, 3))
        for column in tokens:
            wanted, found = (decode.step(net, column, cache) for cache in (plain, static))
            assert error(found, wanted) <= 1e-5
        for cache in (plain, source):
            cache.clear()
            decode.prefill(net, tokens.T.repeat(1, 5), cache)
        static.catch_up()


class Elsewhere(TorchDispatchMode):
    """Refuses tensors that are on the CPU."""

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = call(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, results)):
            assert not isinstance(each, Tensor) or each.device.type != "cpu", call
        return results


@variants
@torch.inference_mode()
def test_a_step_neither_waits_nor_copies_from_the_host(kind: Kind, options: dict[str, Any]) -> None:
    """On the device that has no numbers to read; nothing comes there but what it made itself."""
    net = build(kind, options).to("meta")
    cache = net.new_cache(30)
    net(torch.zeros(3, 20, dtype=torch.long, device="meta"), key_mask=MASK.to("meta"), cache=cache)
    static, tokens = StaticCache(cache, room=30), torch.zeros(3, dtype=torch.long, device="meta")
    # As in a second step, when T5's bucket starts are on the device.
    starts = torch.arange(net.config.get("num_buckets", 1), device="meta")
    refused = {name: Mock(side_effect=AssertionError) for name in ("tensor", "as_tensor", "from_numpy")}
    bias = import_module("palm_pytorch.ops.attention.bias")
    held = patch.object(bias, "_starts_once", lambda *_: starts)
    with held, patch.multiple(torch, **refused), Elsewhere():
        assert decode.step(net, tokens, static).shape == (3, V)
    for reading in (lambda: int(tokens[0]), lambda: bool(tokens.any()), lambda: tokens.nonzero()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            reading()
    with pytest.raises(AssertionError, match="aten"), Elsewhere():
        MASK.to("meta")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@variants
@torch.inference_mode()
def test_a_step_compiles_once(kind: Kind, options: dict[str, Any], backend: str) -> None:
    torch.compiler.reset()
    net, counters = build(kind, options), torch._dynamo.utils.counters
    plain, static = begun(net, MASK), StaticCache(begun(net, MASK), room=80)
    compiled = torch.compile(decode.step, backend=backend, fullgraph=True)
    counters.clear()
    for _ in range(50):
        tokens = torch.randint(V, (3,))
        assert error(compiled(net, tokens, static), decode.step(net, tokens, plain)) <= 1e-5
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()
