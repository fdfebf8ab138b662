"""Gated feed-forward layers (Shazeer 2020, arXiv 2002.05202).

Shapes: b batch; n sequence length; c model width; f inner width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def swiglu(value: Tensor, gate: Tensor) -> Tensor:
    """`silu(gate) * value`, for callers that have the two apart."""
    return F.silu(gate) * value


class SwiGLU(nn.Module):
    """(..., 2f) -> (..., f): `silu(gate) * value`, the first half is the value, the second the gate."""

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(*_halves(x))


class GEGLU(nn.Module):
    """(..., 2f) -> (..., f): `gelu(gate) * value` with the exact (erf) GELU, halves as in `SwiGLU`."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = _halves(x)
        return F.gelu(gate) * value


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected an even last dimension, a value and a gate, got {tuple(x.shape)}")
    value, gate = x.chunk(2, dim=-1)
    return value, gate


class FeedForward(nn.Sequential):
    """(b, n, c) -> (b, n, c) through an inner layer of width `ff_mult * dim`, gated unless the activation is
    `nn.GELU`; no biases by default.
    """

    def __init__(
        self,
        dim: int,
        ff_mult: int = 4,
        activation: type[nn.Module] = SwiGLU,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        inner = ff_mult * dim
        super().__init__(
            nn.Linear(dim, inner if activation is nn.GELU else 2 * inner, bias=bias),
            activation(),
            nn.Dropout(dropout),
            nn.Linear(inner, dim, bias=bias),
        )
