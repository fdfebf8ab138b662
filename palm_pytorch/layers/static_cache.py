"""A cache whose steps are all alike: the same shapes, and no number that the host would have to know.

That is what a CUDA graph can record once and replay, and `torch.compile` compile once.

Shapes: b batch; g key/value heads; j room, the positions that attention is shown; d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palm_pytorch.layers.kv_cache import KVCache, LayerCache, faded


class StaticLayerCache(LayerCache):
    """The first `room` positions of a layer's storage: a new key goes where the device says, and all come
    back.
    """

    def __init__(self, layer: LayerCache, room: int, at: Tensor) -> None:
        super().__init__(room)
        if room > layer.capacity:
            layer.make_room(room, layer.stored)
        self.length, self.at = layer.length, at
        self.stored = tuple(stored[:, :, :room] for stored in layer.stored)
        for stored in self.stored:  # masked, but zero times what nobody wrote may be no number
            stored[:, :, layer.length :] = 0

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Each of `new` (b, g, 1, d) at its place among the others, (b, g, j, d), the key's faded if keys
        fade."""
        assert self.at is not None
        for stored, tensor in zip(self.stored, new, strict=True):
            stored.index_copy_(2, self.at, tensor)
        if self.fade is None:
            return self.stored
        keys, *others = self.stored
        return ((keys * self.fade).to(keys.dtype), *others)


class StaticCache(KVCache):
    """What `cache` holds, in the same storage, for further tokens one by one until there are `room`.

    Every step gives attention the whole room, and masks what is not taken yet. How many tokens there are is
    a number on the device; `length` stays as it was, and so does `cache`: `catch_up` after changes to that.

    Raises ValueError where the cache is empty, or full from the start, and for steps of more than a token. To
    count its steps is the caller's affair.
    """

    def __init__(self, cache: KVCache, room: int) -> None:
        if not 0 < cache.length < room:
            raise ValueError(f"room: expected more than the {cache.length} tokens of a cache, got {room}")
        super().__init__(len(cache.layers), room)
        self.cache, self.fading = cache, cache.fading
        device = cache.layers[0].stored[0].device
        # Perceiver AR's latents lie further ahead in the layers that see its prefix.
        behind = [cache.length - layer.length for layer in cache]
        self.places = {n: torch.empty(1, dtype=torch.long, device=device) for n in set(behind)}
        self.layers = [
            StaticLayerCache(layer, room - n, self.places[n]) for layer, n in zip(cache, behind, strict=True)
        ]
        self.order = torch.arange(room, device=device)
        self.mask = self.order.expand(len(cache.layers[0].stored[0]), -1) < 0
        self.fades = None if self.fading is None else faded(self.fading, room).to(device)
        self.catch_up()

    def catch_up(self) -> None:
        """The next token is the one after those that `cache` holds, in the storage that it had before."""
        assert self.mask is not None
        length = self.cache.length
        for n, place in self.places.items():
            place.fill_(length - n)
        self.mask.copy_(self.order < length)
        if self.cache.mask is not None:
            self.mask[:, :length] = self.cache.mask[:, :length]

    def positions(self, n: int, device: torch.device) -> Tensor:
        return self.places[0]

    def begin(self, key_mask: Tensor | None, b: int, n: int) -> Tensor | None:
        """As of `KVCache`, for a token in each row, which may always be attended to: (b, j)."""
        self.check_use(b)
        if n != 1 or key_mask is not None:
            raise ValueError(f"cache: a static one takes a token of each row and no key_mask, got {n} tokens")
        assert self.mask is not None
        return self.mask.index_fill_(1, self.places[0], True)

    def advance(self) -> None:
        for place in self.places.values():
            place += 1

    def fade_keys(self, factor: Tensor, n: int, device: torch.device) -> None:
        assert self.fades is not None
        fade = self.fades[(self.places[0] - self.order).clamp(min=0)]
        for layer in self:
            layer.fade = fade
