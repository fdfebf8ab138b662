"""Keys and values of the tokens so far, so that a new token costs one token's work.

Shapes: b batch; g key/value heads; n new tokens; j tokens so far, the new ones included; d head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_pytorch.ops.arguments import expect_integer, expect_mask


class LayerCache:
    """What one layer stores: tensors (b, g, capacity, d) of the dtype and on the device that it appends, of
    which `length` positions are taken. A layer whose key is its value stores that once.

    at: where the newest key is among those that `append` gives, (1,) on their device, if it is not the last.
    """

    at: Tensor | None = None

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length, self.appended = capacity, 0, 0
        self.stored: tuple[Tensor, ...] = ()
        self.fade: Tensor | None = None

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Each of `new` (b, g, n, d) behind what is stored of it, (b, g, j, d): views, the key's faded if
        keys fade.

        Until `advance` these n positions are not taken: the next call writes over them.
        Raises TypeError where what is stored has another dtype.
        """
        n = new[0].shape[2]
        j = self.length + n
        if self.stored and self.stored[0].dtype != new[0].dtype:
            if self.length > 0:
                held = f"{self.stored[0].dtype}, as it holds, got {new[0].dtype}"
                raise TypeError(f"cache: expected keys of {held}: autocast or the model's dtype has changed")
            self.stored = ()
        if not self.stored or j > self.capacity:
            self.make_room(j, new)
        self.appended = n
        given = []
        for stored, tensor in zip(self.stored, new, strict=True):
            stored.narrow(2, self.length, n).copy_(tensor)
            given.append(stored.narrow(2, 0, j))
        if self.fade is not None:
            given[0] = (given[0] * self.fade[-j:]).to(given[0].dtype)
        return tuple(given)

    def make_room(self, j: int, new: tuple[Tensor, ...]) -> None:
        """Storage for j positions of tensors like `new` and more: to double it keeps all copying below what
        ends up stored."""
        while self.capacity < j:
            self.capacity *= 2
        shapes = [(*t.shape[:2], self.capacity, t.shape[3]) for t in new]
        with torch.inference_mode(False):  # outside of which it may be used, too
            grown = tuple(t.new_empty(shape) for t, shape in zip(new, shapes, strict=True))
        for there, here in zip(grown, self.stored, strict=False):
            there[:, :, : self.length] = here[:, :, : self.length]
        self.stored = grown


class KVCache:
    """The layers' caches, and which tokens may be attended to.

    depth: layers.  capacity: tokens that there is room for at first; past it, the room doubles.

    A model appends to every layer, then advances: a call that fails half-way leaves the cache as it was.
    Storage is made when the first tokens come, and takes `nbytes`: 2 * depth * b * capacity * g * d * (bytes
    of the dtype), and half of that where a layer's key is its value.
    """

    def __init__(self, depth: int, capacity: int = 256) -> None:
        expect_integer("depth", depth)
        expect_integer("capacity", capacity)
        self.layers = [LayerCache(capacity) for _ in range(depth)]
        self.mask: Tensor | None = None
        self.fading: Tensor | None = None

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)

    @property
    def at(self) -> Tensor | None:
        """As `LayerCache` has it, of the first layer."""
        return self.layers[0].at

    @property
    def length(self) -> int:
        """Tokens of a row that are stored."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for layer in self for stored in layer.stored)

    def positions(self, n: int, device: torch.device) -> Tensor:
        """Those of n tokens behind what is stored, (n,)."""
        return torch.arange(self.length, self.length + n, device=device)

    def advance(self) -> None:
        """What the layers have appended is there to stay."""
        for layer in self:
            layer.length, layer.appended = layer.length + layer.appended, 0

    def pasts(self, depth: int) -> list[LayerCache]:
        """What each of so many layers stores. Raises ValueError where that is not what the cache is for."""
        if depth != len(self.layers):
            raise ValueError(f"cache: expected one for {depth} layers, got one for {len(self.layers)}")
        return self.layers

    def begin(self, key_mask: Tensor | None, b: int, n: int) -> Tensor | None:
        """What a model asks before it appends n tokens to each of b rows: which tokens may be attended to
        then, (b, j) bool, or None for all.

        key_mask: the same of the n alone, (b, n).
        Raises ValueError as `check_use`.
        """
        if key_mask is not None:
            expect_mask("key_mask", key_mask, (b, n))
        self.check_use(b)
        if self.mask is None:
            if key_mask is None:
                return None
            self.mask = key_mask[:, :0]
        j = self.length + n
        if self.mask.shape[1] < j:
            room = max(j, self.layers[0].capacity) - self.mask.shape[1]
            with torch.inference_mode(False):
                self.mask = F.pad(self.mask, (0, room), value=True)
        self.mask[:, self.length : j] = True if key_mask is None else key_mask
        return self.mask[:, :j]

    def check_use(self, b: int) -> None:
        """Raises ValueError where the cache holds another number of rows, or gradients are wanted of it."""
        if torch.is_grad_enabled():
            raise ValueError(
                "cache: it passes no gradients on, so expected torch.no_grad() or inference_mode()"
            )
        stored = self.layers[0].stored
        if stored and len(stored[0]) != b:
            if self.length > 0:
                raise ValueError(f"cache: expected {len(stored[0])} rows of tokens, as it holds, got {b}")
            for layer in self:
                layer.stored = ()

    def fade_keys(self, factor: Tensor, n: int, device: torch.device) -> None:
        """Has stored keys shrink by `factor` (d,), below 1, with every token after them; n are about to
        come.
        """
        self.fading, fade, j = factor, self.layers[0].fade, self.length + n
        if fade is None or len(fade) < j:
            fade = faded(factor, max(j, self.layers[0].capacity)).flip(0).to(device)
            for layer in self:
                layer.fade = fade

    def clear(self) -> None:
        """Forgets all tokens, and keeps the storage for others of as many rows and the same dtype."""
        for layer in self:
            layer.length, layer.appended, layer.fade = 0, 0, None
        self.mask = self.fading = None

    def repeat(self, times: int) -> None:
        """Every row `times` times, each beside its copies."""
        with torch.inference_mode(False):
            for layer in self:
                layer.stored = tuple(stored.repeat_interleave(times, dim=0) for stored in layer.stored)
            if self.mask is not None:
                self.mask = self.mask.repeat_interleave(times, dim=0)


def faded(factor: Tensor, ages: int) -> Tensor:
    """What is left of a key that as many tokens came after, 0 and up to `ages`, (ages, d) float32."""
    age = torch.arange(ages, device=factor.device)
    return (factor ** age[:, None]).float()


class _NoPast(LayerCache):
    """Keeps nothing: a layer sees the new keys and values alone."""

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        return new


class _NoCache(KVCache):
    """What a model without a cache works with."""

    def pasts(self, depth: int) -> list[LayerCache]:
        return [NO_PAST] * depth

    def begin(self, key_mask: Tensor | None, b: int, n: int) -> Tensor | None:
        if key_mask is not None:
            expect_mask("key_mask", key_mask, (b, n))
        return key_mask

    def advance(self) -> None:
        pass


NO_PAST = _NoPast(capacity=1)
NO_CACHE = _NoCache(depth=1, capacity=1)
