"""Root mean square norm that keeps no intermediate for backward but one number per row.

Shapes: c model width; leading dimensions are rows.

    r = 1 / sqrt(mean(x^2) + eps);   y = x r w
    dx = r (g - x r mean(g x r)), with g = dy w;   dw = sum over rows of dy x r
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_pytorch.ops.derivatives import transformed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., c) over its root mean square, times weight (c,); computed in float32 or better, in the dtype
    of x.
    """
    # Compiled code plans by itself what to keep. (And torch 2.11 compiles a Function whose result was changed
    # in place, or cast to what it is, into one without gradients.)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transformed():
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return (wide * inverse).mul_(weight.to(wide.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        if torch.is_grad_enabled():  # second derivatives are wanted, and what is saved is a constant
            inverse = (x.to(wide).square().mean(dim=-1, keepdim=True) + ctx.eps).rsqrt()
        normed, grad = x.to(wide) * inverse, grad.to(wide)
        d_weight = (grad * normed).reshape(-1, x.shape[-1]).sum(0)
        grad = grad * weight.to(wide)
        along = (grad * normed).mean(dim=-1, keepdim=True)
        dx = torch.addcmul(grad, normed, along, value=-1) * inverse
        return dx.to(x.dtype), d_weight.to(weight.dtype), None
