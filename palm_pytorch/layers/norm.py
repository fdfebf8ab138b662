"""Normalisation over the last dimension, computed in float32 or better whatever the dtype.

Shapes: c model width; d head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_pytorch.ops import rms_norm


class _Gain(nn.Module):
    """weight: (c,), a learned factor for each feature."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class RMSNorm(_Gain):
    """`x / sqrt(mean(x^2) + eps) * weight` (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., c), any floating dtype, which the result keeps."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(_Gain):
    """Layer norm without bias (PaLM, arXiv 2204.02311, section 2: no biases anywhere)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(dim)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., c), any floating dtype, which the result keeps."""
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.layer_norm(x.to(wide), self.weight.shape, self.weight.to(wide), None, self.eps)
        return normed.to(x.dtype)


class BiasedLayerNorm(nn.LayerNorm):
    """Layer norm with gain and bias (Ba et al. 2016, arXiv 1607.06450), as older models have it."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., c), any floating dtype, which the result keeps."""
        wide = torch.promote_types(x.dtype, torch.float32)
        gain, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, gain, bias, self.eps).to(x.dtype)


class ClampedRMSNorm(_Gain):
    """`x / max(rms(x), eps) * weight`: the older PaLM-lite's, where eps counts for rows next to zero only."""

    def __init__(self, dim: int, eps: float = 1e-8) -> None:
        super().__init__(dim)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., c), any floating dtype, which the result keeps."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return (wide / rms.clamp(min=self.eps) * self.weight).to(x.dtype)


class L2Norm(_Gain):
    """Unit length with a learned gain, for queries and keys (Henry et al. 2020, arXiv 2010.04245).

    At first the gain is sqrt(d): scores of random directions, over sqrt(d) as attention has them, then have
    variance 1. With a gain of 1 none would be above 1 / sqrt(d), and attention could hardly choose.
    """

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.weight.numel() ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d), any floating dtype, which the result keeps."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (F.normalize(wide, dim=-1) * self.weight).to(x.dtype)


# The latter two are there for weights of older models.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rmsnorm": RMSNorm,
    "layernorm": LayerNorm,
    "layernorm-biased": BiasedLayerNorm,
    "rmsnorm-clamped": ClampedRMSNorm,
}


def make_norm(name: str, dim: int) -> nn.Module:
    """The norm that models call `name`, one of `NORMS`."""
    if name not in tuple(NORMS):
        raise ValueError(f"norm: expected one of {sorted(NORMS)}, got {name!r}")
    return NORMS[name](dim)
