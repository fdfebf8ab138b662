"""AdamW's parameter groups, the learning rate as a function of the step, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: the weights of linear layers, which decay, and everything else, which does not.

    Decay bounds the weights that multiply activations. A norm's gain or a bias needs no bound. An embedding,
    also one tied to the logits, has rows to which most steps give little gradient: decay would move these by
    itself, and shrink rare tokens for being rare.
    """
    linears = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    linears -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in linears], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in linears], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, *, weight_decay: float) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) with the betas of GPT-3 (Brown et al. 2020), fused where it can be.

    `set_learning_rate` is to be called before every step.
    """
    fused = next(model.parameters()).device.type in {"cpu", "cuda"}
    return AdamW(parameter_groups(model, weight_decay), lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def learning_rate(step: int, *, peak: float, floor: float, warmup_steps: int, total_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0.

    Rises linearly to `peak`, which is the rate of step `warmup_steps`, then follows half a cosine down to
    `floor`, reached at step `total_steps` and kept.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a global norm of at most `max_norm` (0: leave them); returns the norm before."""
    return nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
