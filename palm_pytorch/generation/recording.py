"""Steps that are recorded once and replayed: one launch for a whole model, where a GPU would else wait for
the host to launch every operation by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from palm_pytorch.layers.kv_cache import KVCache
from palm_pytorch.layers.static_cache import StaticCache

# Attention reads the whole room of a recording, taken or not. So it begins with twice what is there, or this
# many tokens, and a full one is recorded anew: seldom, as rooms double.
LEAST_ROOM = 1024


class RecordedSteps:
    """Steps of a model whose past is in `cache`, which they continue; logits (b, v) after tokens (b,).

    step: makes logits of tokens and a cache, as `palm_pytorch.generation.step` does.

    The logits are in one place: what a step returns is gone with the next. `cache` counts the tokens too, so
    that one may go on without a recording at any time. Weights, rows and storage must stay where they are.
    """

    def __init__(self, step: Callable[[Tensor, KVCache], Tensor], cache: KVCache) -> None:
        self.step, self.cache = step, cache
        self.static: StaticCache | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        with torch.cuda.device_of(tokens):
            if self.static is None or self.cache.length >= len(self.static.order):
                self._record(tokens)
            self.tokens.copy_(tokens)
            logits = self.replay()
        for layer in self.cache:
            layer.appended = 1
        self.cache.advance()
        return logits

    def catch_up(self) -> None:
        """After the cache was filled anew."""
        if self.static is not None:
            self.static.catch_up()

    def _record(self, tokens: Tensor) -> None:
        room = max(LEAST_ROOM, 2 * self.cache.length)
        static = StaticCache(self.cache, min(room, self.cache.layers[0].capacity))
        held = tokens.clone()
        self.replay = record(lambda: self.step(held, static), static.catch_up)
        self.static, self.tokens = static, held


def record(work: Callable[[], Tensor], again: Callable[[], None]) -> Callable[[], Tensor]:
    """A CUDA graph of `work`, which always works on the same tensors; `again` undoes what it did to them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    # Autocast as it is, but without weights that it keeps only until its owner leaves it.
    with torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries and kernels get ready, which cannot be recorded
                work()
                again()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, stream=side):  # its own would be on the first device that recorded
            result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
