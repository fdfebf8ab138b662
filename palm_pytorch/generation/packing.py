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
from functools import cached_property
from inspect import isroutine
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_pytorch.layers.norm import RMSNorm
from palm_pytorch.layers.parallel import ParallelBlock
from palm_pytorch.layers.relative_bias import T5RelativeBias
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.ops import RelativeBias, rms_norm

# The copy is worth its time, about 30 times that of reading the weights once, from so many tokens on, and its
# memory up to so many bytes.
LEAST_STEPS = 64
MOST_BYTES = 2 << 30

Call = Callable[..., Any]


def packed(model: LanguageModel) -> LanguageModel | None:
    """A twin of the model for evaluation: it shares the weights, has packed copies of them as they are now,
    and goes short ways to its parts. The model itself is left alone.

    None for a model that somebody has changed in ways that short ways would pass by: with hooks, parts that
    are not this library's or torch's, parametrizations, methods of its own. Weights are packed where they
    are not too large, and this torch and this processor know how.
    """
    if has_hooks(model) or not all(map(_is_as_defined, model.modules())):
        return None
    twin: LanguageModel = _twin(model, {})
    modules = list(twin.modules())
    with suppress(RuntimeError):  # a processor without such products
        for (module, name), product in _products(twin, modules).items():
            vars(module)[name] = product
    for module in modules:
        if type(module) in PREPARED:
            vars(module)["forward"] = PREPARED[type(module)](module)
    for parent in filter(_is_ours, modules):
        # A part of this library asks nothing of its own parts but what they return, but that a model looks
        # at weights and counts its blocks. And what is an object's own goes before a module's child of that
        # name.
        for name, child in parent.named_children():
            if parent is not twin or not isinstance(child, (nn.Embedding, nn.Linear, nn.ModuleList)):
                vars(parent)[name] = _short_way(child)
    return twin


def has_hooks(model: nn.Module) -> bool:
    """Whether anybody listens to a call of any part."""
    listened = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return listened or nn.modules.module._has_any_global_hook()


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("palm_pytorch.")


# What is gone around, as it was when this was read: classes can be changed, too.
DEFINED: dict[type[nn.Module], Call] = {
    kind: kind.forward for kind in (RMSNorm, T5RelativeBias, nn.Linear, nn.Dropout)
}


def _is_as_defined(module: nn.Module) -> bool:
    """Whether it does what its class does, and that is one of this library or of torch, as they define it."""
    as_defined = type(module).forward is DEFINED.get(type(module), type(module).forward)
    known = _is_ours(module) or type(module).__module__.startswith("torch.nn.modules.")
    own_methods = any(isroutine(getattr(type(module), name, None)) for name in vars(module))
    return as_defined and known and not own_methods and module._compiled_call_impl is None


def _twin(module: Any, made: dict[nn.Module, nn.Module]) -> Any:
    """Copies of a module and those below, in evaluation mode, of the same tensors and whatever else."""
    if module not in made:
        made[module] = copy(module)
        children = {name: _twin(child, made) for name, child in module._modules.items() if child is not None}
        vars(made[module]).update(training=False, _modules={**module._modules, **children})
    return made[module]


def _short_way(part: nn.Module) -> Call:
    """What calling a part comes to, in evaluation and without hooks."""
    if isinstance(part, nn.Dropout):
        return _unchanged
    if type(part).forward is nn.Sequential.forward:
        return _in_turn([_short_way(each) for each in part.children()])
    return part.forward


def _unchanged(x: Tensor) -> Tensor:
    return x


def _in_turn(ways: list[Call]) -> Call:
    def forward(x: Any) -> Any:
        for way in ways:
            x = way(x)
        return x

    return forward


def _norm_of_a_row(norm: RMSNorm) -> Call:
    """x and -x side by side have the mean square of x, and mean zero: of them a layer norm, which is one
    kernel on a CPU, is an RMS norm, which is eight."""
    gains, c = torch.cat([norm.weight, norm.weight]).detach(), norm.weight.numel()

    def forward(x: Tensor) -> Tensor:
        if x.dtype != gains.dtype:
            return rms_norm(x, norm.weight, norm.eps)
        return torch.layer_norm(torch.cat([x, -x], dim=-1), gains.shape, gains, None, norm.eps)[..., :c]

    return forward


class _KeptBias(RelativeBias):
    """Whose offsets are worked out once."""

    @cached_property
    def kept(self) -> Tensor:
        return super().offsets(self.max_distance)

    def offsets(self, j_len: int) -> Tensor:
        return self.kept[:, :j_len]


def _kept_bias(bias: T5RelativeBias) -> Call:
    kept = _KeptBias(bias.table.detach(), bias.max_distance, bias.scale)
    return lambda at=None: kept if at is None else RelativeBias(bias.table, bias.max_distance, bias.scale, at)


# How parts of the library are called for a row of a text, with what their weights come to.
PREPARED: dict[type[nn.Module], Callable[[Any], Call]] = {
    RMSNorm: _norm_of_a_row,
    T5RelativeBias: _kept_bias,
}


def _products(model: LanguageModel, modules: list[nn.Module]) -> dict[tuple[nn.Module, str], Call]:
    """The methods that are a product with a weight: of linear layers, of the model, and of parallel blocks,
    whose two ways out are one product of what goes in side by side."""
    # The operators are torch's own, made for its compiler, and not promised to stay.
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, o) for o in operators):
        return {}
    linears = {module for module in modules if type(module) is nn.Linear and _packs(module.weight)}
    found: dict[tuple[nn.Module, str], tuple[list[Tensor], Tensor | None]] = {}
    for block in filter(_is_ours, modules):
        if not isinstance(block, ParallelBlock) or type(block.ff_dropout) is not nn.Dropout:
            continue
        ways = [block.attn_out, block.ff_out]
        if linears.issuperset(ways) and all(way.bias is None for way in ways):
            found[block, "out"] = [way.weight for way in ways], None
            linears -= set(ways)
    found |= {(linear, "forward"): ([linear.weight], linear.bias) for linear in linears}
    if model.head_is_linear and _packs(model.head_weight):
        found[model, "_head"] = [model.head_weight], model.head_bias
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
        if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
            out = F.linear(x, weights[0], bias)
            return sum(map(F.linear, more, weights[1:]), start=out)
        return multiply(torch.cat([x, *more], dim=-1) if more else x, weight, bias, "none", [], "")

    return product
