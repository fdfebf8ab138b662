"""Bits per byte: what a byte-level model is judged by."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def bits_per_byte(loss: float) -> float:
    """A mean loss in nats per byte, as bits."""
    return loss / math.log(2)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Tensor], precision: torch.dtype = torch.float32) -> float:
    """The mean loss, in nats per predicted token, over all `batches` of windows `(b, n + 1)`.

    All windows have one length and so predict equally many tokens: a batch weighs as much as it has windows,
    a smaller last one less. Dropout is off meanwhile, and the model's mode restored.

    Raises:
        ValueError: there is no window.
    """
    device = next(model.parameters()).device
    was_training = model.training
    total, windows = torch.zeros((), dtype=torch.float64), 0
    model.eval()
    try:
        for batch in batches:
            total += len(batch) * window_loss(model, batch.to(device), precision).double().cpu()
            windows += len(batch)
    finally:
        model.train(was_training)
    if not windows:
        raise ValueError("batches is empty; expected at least one window to evaluate on")
    return total.item() / windows


def window_loss(model: nn.Module, windows: Tensor, precision: torch.dtype) -> Tensor:
    """The mean loss of windows `(b, n + 1)`: each token but the first is predicted from those before it."""
    with autocast(precision, windows.device):
        return model(windows[:, :-1], labels=windows[:, 1:])


def autocast(precision: torch.dtype, device: torch.device) -> torch.autocast:
    """Matrix products in `precision`; weights and gradients stay float32 (Micikevicius et al. 2018)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)
