"""Rotation of query and key features by position, in one pass each way.

Shapes: ... b, h leading dimensions; n sequence length; d head dim; r rotated dims, the first of d.

    y1 = x1 cos - x2 sin;   y2 = x2 cos + x1 sin        (x1, x2: the halves of the r rotated dims)

That is x times (cos, cos) plus x with its halves exchanged times (-sin, sin). A rotation's transpose is the
rotation back, so backward is the same function with the sign of sin turned, and keeps nothing of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palm_pytorch.ops.derivatives import transformed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first r of d dims of x (..., n, d), computed in float32 or better, in the dtype of x.

    cos, sin: (..., n, r), constants of any scale, broadcast against x; sin is negated in its first half.
    """
    # Compiled code plans by itself what to keep; see `rms_norm`.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        return _rotated(x, cos, sin)
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
    r = cos.shape[-1]
    turned = x if r == x.shape[-1] else x[..., :r]
    out = (turned * cos).addcmul_(turned.roll(r // 2, dims=-1), sin).to(x.dtype)
    return out if turned is x else torch.cat([out, x[..., r:]], dim=-1)
