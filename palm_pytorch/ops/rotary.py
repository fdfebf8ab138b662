"""Rotation of query and key features by position, in one pass each way.

Shapes: ... b, h leading dimensions; n sequence length; d head dim; r rotated dims, the first of d.

    y1 = x1 cos - x2 sin;   y2 = x2 cos + x1 sin        (x1, x2: the halves of the r rotated dims)

A rotation's transpose is the rotation back, so backward is the same function with -sin, and keeps nothing
of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first r of d dims of x (..., n, d), computed in float32 or better, in the dtype of x.

    cos, sin: (..., n, r / 2), constants of any scale, broadcast against x.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty_like(x)
    wide = x[..., : 2 * half].to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    out[..., :half] = torch.addcmul(first * cos, second, sin, value=-1)
    out[..., half : 2 * half] = torch.addcmul(second * cos, first, sin)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out
