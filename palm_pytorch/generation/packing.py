"""Models as a CPU wants them for a few rows: weights packed, and parts called as the functions that they are.

oneDNN has a layout of its own for the weights of a product. Given plain ones it lays them out anew each time,
which for one row is most of the work: 60 MB of bfloat16 weights take 2.5 ms as they are and 1.3 ms packed,
for the same bits (two cores of an AMD EPYC Turin, torch 2.13); float32 ones 7.4 and 4.0 ms.

`nn.Module.__call__` looks for hooks, which takes 5 us where weights stream through the caches and leave
nothing of it there: as long as a small operation, and a block of PaLM has seven modules.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_pytorch.layers.parallel import ParallelBlock
from palm_pytorch.models.language_model import LanguageModel

# The copy is worth its time, about 30 times that of reading the weights once, from so many tokens on, and its
# memory up to so many bytes.
LEAST_STEPS = 64
MOST_BYTES = 2 << 30

Call = Callable[..., Any]


def packed(model: LanguageModel) -> LanguageModel:
    """A twin of the model for evaluation: it shares the weights, has packed copies of them as they are now,
    and goes short ways to its parts. The model itself is left alone.

    Weights are packed where they are not too large, and this torch and this processor know how. What is no
    part of this library or of torch is called as ever; so are all parts of a model with hooks.
    """
    twin: LanguageModel = _twin(model, {})
    modules = list(twin.modules())
    if has_hooks(modules):
        return twin
    with suppress(RuntimeError):  # a processor without such products
        for (module, name), product in _products(twin, modules).items():
            vars(module)[name] = product
    for parent in modules:
        # A part of this library asks nothing of its own parts but what they return. And what is an object's
        # own goes before a module's child of that name.
        if not _is_ours(parent) or parent is twin:
            continue
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                vars(parent)[name] = _unchanged
            elif _is_ours(child) or type(child).__module__.startswith("torch.nn."):
                vars(parent)[name] = child.forward
    return twin


def _twin(module: Any, made: dict[nn.Module, nn.Module]) -> Any:
    """Copies of a module and those below, in evaluation mode, of the same tensors and whatever else."""
    if module not in made:
        made[module] = copy(module)
        children = {name: _twin(child, made) for name, child in module._modules.items() if child is not None}
        vars(made[module]).update(training=False, _modules={**module._modules, **children})
    return made[module]


def has_hooks(modules: list[nn.Module]) -> bool:
    """Whether anybody listens to a call of theirs."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("palm_pytorch.")


def _unchanged(x: Tensor) -> Tensor:
    return x


def _products(model: LanguageModel, modules: list[nn.Module]) -> dict[tuple[nn.Module, str], Call]:
    """The methods that are a product with a weight: of linear layers, of the model, and of parallel blocks,
    whose two ways out are one product of what goes in side by side."""
    # The operators are torch's own, made for its compiler, and not promised to stay.
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, o) for o in operators):
        return {}
    # None that knows better how it multiplies: a subclass, a `forward` of its own.
    linears = {m for m in modules if type(m) is nn.Linear and "forward" not in vars(m) and _packs(m.weight)}
    found: dict[tuple[nn.Module, str], tuple[list[Tensor], Tensor | None]] = {}
    for block in filter(_is_ours, modules):
        if isinstance(block, ParallelBlock) and {block.attn_out, block.ff_out} <= linears:
            found[block, "out"] = [block.attn_out.weight, block.ff_out.weight], None
            linears -= {block.attn_out, block.ff_out}
    found |= {(linear, "forward"): ([linear.weight], linear.bias) for linear in linears}
    if _packs(model.head_weight):
        found[model, "logits"] = [model.head_weight], model.head_bias
    if sum(weight.nbytes for weights, _ in found.values() for weight in weights) > MOST_BYTES:
        return {}
    return {place: _packed(*factors) for place, factors in found.items()}


def _packs(weight: Tensor) -> bool:
    """Whether it is no more than a tensor, and of a kind that is packed."""
    cpu = type(weight) is nn.Parameter and weight.device.type == "cpu"
    return cpu and weight.dtype in (torch.bfloat16, torch.float32)


def _packed(weights: list[Tensor], bias: Tensor | None) -> Call:
    """(x, ..) -> (x, ..) (weight, ..)^T + bias, what is several side by side."""
    weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights, dim=1).detach(), 1)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def product(x: Tensor, *more: Tensor) -> Tensor:
        if more:
            x = torch.cat([x, *more], dim=-1)
        if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
            return F.linear(x, torch.cat(weights, dim=1), bias)
        return multiply(x, weight, bias, "none", [], "")

    return product
