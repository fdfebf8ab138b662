"""Root mean square norm that keeps no intermediate for backward but one number per row.

Shapes: c model width; leading dimensions are rows.

    r = 1 / sqrt(mean(x^2) + eps);   y = x r w
    dx = r (g - x r mean(g x r)), with g = dy w;   dw = sum over rows of dy x r
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., c) over its root mean square, times weight (c,); computed in float32 or better, in the dtype
    of x.
    """
    if not torch.is_grad_enabled():
        return _normed(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and r of each row, (..., 1)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # In place: for the one row of a generated token every call counts.
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * inverse).mul_(weight.to(wide.dtype)).to(x.dtype), inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        normed, grad = x.to(wide) * inverse, grad.to(wide)
        d_weight = (grad * normed).reshape(-1, x.shape[-1]).sum(0)
        grad = grad * weight.to(wide)
        along = (grad * normed).mean(dim=-1, keepdim=True)
        dx = torch.addcmul(grad, normed, along, value=-1).mul_(inverse)
        return dx.to(x.dtype), d_weight.to(weight.dtype), None
