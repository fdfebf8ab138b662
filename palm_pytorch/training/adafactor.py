"""PaLM's optimizer: Adafactor with whole second moments (Chowdhery et al. 2022, arXiv 2204.02311, section 5).

With k the step from 1, lr the learning rate, g the gradient, RMS over a whole parameter:

    b2 = 1 - k^-0.8
    v  = b2 v + (1 - b2) (g^2 + 1e-30)
    u  = g / sqrt(v);   u = u / max(1, RMS(u))
    m  = 0.9 m + 0.1 lr max(RMS(p), 1e-3) u
    p  = (1 - weight_decay lr^2) p - m

The paper gives 0.9, b2, the scaling by RMS(p) and the decay (with weight_decay = 1). The rest is as in T5X's
adafactor.py, with which it was trained: the two floors, the clipping of u, no correction for m starting from
zero, and momentum of the update that has been scaled already, so that lr reaches the weights late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

# Of the tensors that processes hold of those like the parameters beside them, as wholes.
RMS: TypeAlias = Callable[[list[Tensor], list[Tensor]], list[float]]

LEAST_SCALE = 1e-3
LEAST_SQUARE = 1e-30
# Parameters are updated together up to so many elements: on a GPU many small ones are launched as one, on a
# CPU each stays in the cache from its first operation to its last.
BUNCH = {"cpu": 0}
OTHER_BUNCH = 1 << 26


class Adafactor(Optimizer):
    """The optimizer above. State of a parameter: `exp_avg` (m), `exp_avg_sq` (v), of its shape; and `step`.

    Parameters may be sharded (DTensor): their RMS is that of the whole, and all else happens on each shard.

    lr: of the next step; a schedule sets it, PaLM's being min(1e-2, 1 / sqrt(k)).
    weight_decay: times lr^2 is the share of every parameter that a step takes away.
    rms: as `whole_rms`, for parameters that are spread over processes in another way.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        beta1: float = 0.9,
        decay_exponent: float = 0.8,
        weight_decay: float = 1.0,
        clip_rms: float = 1.0,
        rms: RMS | None = None,
    ) -> None:
        for name, value, holds, wanted in (
            ("lr", lr, 0 <= lr < math.inf, "a finite number, 0 or more"),
            ("beta1", beta1, 0 <= beta1 < 1, "a number from 0 up to, but not including, 1"),
            ("decay_exponent", decay_exponent, 0 < decay_exponent <= 1, "above 0 and at most 1"),
            ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "a finite number, 0 or more"),
            ("clip_rms", clip_rms, clip_rms > 0, "a number above 0"),
        ):
            if not holds:
                raise ValueError(f"{name} is {value}; expected {wanted}")
        self.rms = rms or whole_rms
        defaults = {"lr": lr, "beta1": beta1, "decay_exponent": decay_exponent}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "clip_rms": clip_rms})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient; `closure` computes these, and gives the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in bunches([p for p in group["params"] if p.grad is not None]):
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, beta1 = float(group["lr"]), group["beta1"]
        states = [self._state(parameter) for parameter in parameters]
        betas = []
        for state in states:
            state["step"] += 1
            betas.append(1 - state["step"].item() ** -group["decay_exponent"])
        p = [local(parameter) for parameter in parameters]
        g = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        m = [local(state["exp_avg"]) for state in states]
        v = [local(state["exp_avg_sq"]) for state in states]
        scales = [lr * max(rms, LEAST_SCALE) for rms in self.rms(p, parameters)]
        torch._foreach_mul_(v, betas)
        for moment, gradient, beta in zip(v, g, betas, strict=True):
            moment.addcmul_(gradient, gradient, value=1 - beta)
        # The floor of g^2, kept out of v: its mean over the steps is itself, the weights of v adding up to 1.
        roots = torch._foreach_add(v, LEAST_SQUARE)
        torch._foreach_sqrt_(roots)
        updates = list(torch._foreach_div(g, roots))
        del roots
        clips = [max(1.0, rms / group["clip_rms"]) for rms in self.rms(updates, parameters)]
        torch._foreach_mul_(
            updates, [(1 - beta1) * scale / clip for scale, clip in zip(scales, clips, strict=True)]
        )
        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, updates)
        torch._foreach_mul_(p, 1 - group["weight_decay"] * lr**2)
        torch._foreach_sub_(p, m)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def bunches(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """`parameters` in order, in lists of at most so many elements, or of one parameter.

    Elements of whole parameters, so that all processes come to the same lists, and reduce them in step.
    """
    bunch: list[Tensor] = []
    elements = 0
    for parameter in parameters:
        size = parameter.numel()
        if bunch and elements + size > BUNCH.get(parameter.device.type, OTHER_BUNCH):
            yield bunch
            bunch, elements = [], 0
        bunch.append(parameter)
        elements += size
    if bunch:
        yield bunch


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)  # without the half second that importing DTensor takes
    whole: Tensor = tensor if to_local is None else to_local()
    return whole


def whole_rms(shards: list[Tensor], parameters: list[Tensor]) -> list[float]:
    """Root mean squares of tensors of which each process holds its shard, as of the parameter beside it."""
    wide = torch.promote_types(shards[0].dtype, torch.float32)
    sums = torch.stack(torch._foreach_norm(shards, 2, wide)).square()
    layouts: dict[Any, list[int]] = {}
    for index, parameter in enumerate(parameters):
        if hasattr(parameter, "device_mesh"):
            layout = parameter.device_mesh, tuple(parameter.placements)  # type: ignore[attr-defined]
            layouts.setdefault(layout, []).append(index)
    for (mesh, placements), indices in layouts.items():
        partial = sums[indices]
        for axis, placement in enumerate(placements):
            if not placement.is_replicate():
                dist.all_reduce(partial, group=mesh.get_group(axis))
        sums[indices] = partial
    return [math.sqrt(total / p.numel()) for total, p in zip(sums.tolist(), parameters, strict=True)]
