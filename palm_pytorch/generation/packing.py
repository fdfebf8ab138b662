"""Models as a CPU wants them for a few rows: weights packed, and parts called as the functions that they are.

oneDNN has a layout of its own for the weights of a product. Given plain ones it lays them out anew each time,
which for one row is most of the work: 60 MB of bfloat16 weights take 2.5 ms as they are and 1.3 ms packed,
for the same bits (two cores of an AMD EPYC Turin, torch 2.13); float32 ones 7.4 and 4.0 ms.

`nn.Module.__call__` looks for hooks, which takes 5 us where weights stream through the caches and leave
nothing of it there: as long as a small operation, and a block of PaLM has seven modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_pytorch.models.language_model import LanguageModel

# The copy is worth its time, about 30 times that of reading the weights once, from so many tokens on, and its
# memory up to so many bytes.
LEAST_STEPS = 64
MOST_BYTES = 2 << 30

Product = Callable[[Tensor], Tensor]


class PackedModel:
    """A packed copy of a model's weights, as they are now, and short ways to its parts, for evaluation alone.

    Weights are packed where they are not too large, and this torch and this processor know how. What is no
    part of this library or of torch is called as ever; so are all parts of a model with hooks.
    """

    def __init__(self, model: LanguageModel) -> None:
        # What becomes of which names of which modules.
        self.changes: list[tuple[nn.Module, str, Callable[..., Any]]] = []
        modules = list(model.modules())
        if has_hooks(modules):
            return
        try:
            products = _products(model, modules)
        except RuntimeError:  # a processor without such products
            products = {}
        for module, product in products.items():
            self.changes.append((module, "logits" if module is model else "forward", product))
        for parent in modules:
            # A part of this library asks nothing of its own parts but what they return.
            if not _is_ours(parent) or parent is model:
                continue
            for name, child in parent.named_children():
                if isinstance(child, nn.Dropout):
                    self.changes.append((parent, name, _unchanged))
                elif _is_ours(child) or type(child).__module__.startswith("torch.nn."):
                    self.changes.append((parent, name, products.get(child, child.forward)))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Has the model work with it: what is an object's own goes before a module's child of that name."""
        try:
            for module, name, call in self.changes:
                vars(module)[name] = call
            yield
        finally:
            for module, name, _ in self.changes:
                vars(module).pop(name, None)


def has_hooks(modules: list[nn.Module]) -> bool:
    """Whether anybody listens to a call of theirs."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("palm_pytorch.")


def _unchanged(x: Tensor) -> Tensor:
    return x


def _products(model: LanguageModel, modules: list[nn.Module]) -> dict[nn.Module, Product]:
    """x -> x weight^T + bias for each linear layer, and for the model, which does that for its logits."""
    # The operators are torch's own, made for its compiler, and not promised to stay.
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, o) for o in operators):
        return {}
    # None that knows better how it multiplies: a subclass, a `forward` of its own.
    linears = [m for m in modules if type(m) is nn.Linear and "forward" not in vars(m)]
    factors = {m: (m.weight, m.bias) for m in linears} | {model: (model.head_weight, model.head_bias)}
    # And no weight that is more than a tensor.
    factors = {m: f for m, f in factors.items() if type(f[0]) is nn.Parameter and f[0].device.type == "cpu"}
    if sum(weight.nbytes for weight, _ in factors.values()) > MOST_BYTES:
        return {}
    dtypes = (torch.bfloat16, torch.float32)
    return {m: _packed(weight, bias) for m, (weight, bias) in factors.items() if weight.dtype in dtypes}


def _packed(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def product(x: Tensor) -> Tensor:
        if x.dtype != packed.dtype or torch.is_autocast_enabled("cpu"):
            return F.linear(x, weight, bias)
        return multiply(x, packed, bias, "none", [], "")

    return product
