"""Refusing arguments by name: a TypeError or ValueError that says what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palm_pytorch.ops.derivatives import transformed


def expect_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: not on other devices than a CPU, which it stalls, nor in compiled
    code, which it breaks up, nor of a tensor that has none, or that stands for many."""
    plain = type(tensor) is Tensor and not transformed()
    return plain and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def expect_floating(name: str, value: Any) -> None:
    expect_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")


def expect_mask(name: str, value: Any, shape: tuple[int, ...]) -> None:
    expect_tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")


def expect_integer(name: str, value: Any, *, least: int = 1) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def expect_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> None:
    """A finite number, `least <= value <= most` and `above < value < below`."""
    # A tuple, since the compiler of torch 2.9 does not follow `int | float`.
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not (least <= value <= most and above < value < below):
        bounds = {f"at least {least}": least, f"above {above}": above}
        bounds |= {f"below {below}": below, f"at most {most}": most}
        words = [text for text, bound in bounds.items() if math.isfinite(bound)]
        raise ValueError(f"{name}: expected a finite number {' and '.join(words)}, got {value}")
