"""Weights as a CPU wants them for products with a few rows.

oneDNN has a layout of its own for the weights of a product. Given plain ones it lays them out anew each time,
which for one row is most of the work: 60 MB of bfloat16 weights take 2.5 ms as they are and 1.3 ms packed,
for the same bits (two cores of an AMD EPYC Turin, torch 2.13); float32 ones 7.4 and 4.0 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# The copy is worth its time, about 30 times that of reading the weights once, from so many tokens on, and its
# memory up to so many bytes.
LEAST_STEPS = 64
MOST_BYTES = 2 << 30


class PackedLinears:
    """A packed copy of the weights of those of `modules` that are linear layers, as they are now.

    Empty where it would be of no use or too large, or where this torch has no such thing.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.forwards: list[tuple[nn.Linear, Callable[[Tensor], Tensor]]] = []
        # None that knows better how it multiplies: a subclass, a weight that is more than a tensor, a
        # `forward` of its own.
        linears = [
            m
            for m in modules
            if type(m) is nn.Linear and type(m.weight) is nn.Parameter and "forward" not in vars(m)
        ]
        if sum(module.weight.nbytes for module in linears) > MOST_BYTES or not _available():
            return
        for module in linears:
            if module.weight.device.type == "cpu" and module.weight.dtype in (torch.bfloat16, torch.float32):
                try:
                    self.forwards.append((module, _packed(module)))
                except RuntimeError:  # a processor without such products
                    return

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Has the layers multiply with it."""
        try:
            for module, forward in self.forwards:
                vars(module)["forward"] = forward
            yield
        finally:
            for module, _ in self.forwards:
                vars(module).pop("forward", None)


def _available() -> bool:
    """The operators are torch's own, made for its compiler, and not promised to stay."""
    if not torch.backends.mkldnn.is_available():
        return False
    return all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))


def _packed(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), 1)

    def forward(x: Tensor) -> Tensor:
        if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
            return nn.Linear.forward(module, x)
        return torch.ops.mkldnn._linear_pointwise(x, weight, module.bias, "none", [], "")

    return forward
