"""Sums over the tensor ranks that gradients pass through: f and g of `tensor_parallel`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from palm_pytorch.training.tensor_layout import Layout


def summed(x: Tensor, group: ProcessGroup | None) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class SumGradient(torch.autograd.Function):
    """f."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return summed(grad, ctx.group), None


class Sum(torch.autograd.Function):
    """g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        # A view, since torch 2.11 compiles what was changed in place into a result without gradient.
        return summed(x, group).view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class SumGradientOfSharedRows(torch.autograd.Function):
    """f for those rows of a weight that every rank has."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        parts = zip(grad.split(layout.local_widths), layout.split, strict=True)
        return torch.cat([part if split else summed(part, layout.group) for part, split in parts]), None
