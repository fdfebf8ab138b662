"""Under autocast an operation of ours computes as torch's matrix product would."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.amp import is_autocast_available

# Asked once: some releases' compilers cannot follow the question.
DEVICES = {device for device in ("cpu", "cuda", "mps", "xpu") if is_autocast_available(device)}


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x: autocast's where that is on, which leaves float64 alone."""
    device = x.device.type
    if device in DEVICES and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products in the dtypes of their factors."""
    return torch.autocast(device.type, enabled=False) if device.type in DEVICES else nullcontext()
