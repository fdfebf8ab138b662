"""The norm of a gradient of which each process has a share, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from palm_pytorch.training.distributed import Parallel
from palm_pytorch.training.tensor_layout import layout_of


def clip_gradients(model: nn.Module, max_norm: float, parallel: Parallel) -> Tensor:
    """Scale the gradients to a global norm of at most `max_norm` (0: leave them); returns the norm before.

    The norm is that of the whole model's gradient, and the same on every process.
    """
    trained = [p for p in model.parameters() if p.grad is not None]
    if parallel.kind in ("none", "ddp"):
        return nn.utils.clip_grad_norm_(trained, max_norm or math.inf)
    gradients = [local_gradient(parameter) for parameter in trained]
    split: list[Tensor] = []
    shared: list[Tensor] = []
    for parameter, gradient in zip(trained, gradients, strict=True):
        for piece, is_split in pieces(parameter, gradient, parallel):
            (split if is_split else shared).append(piece)
    # What all tensor ranks have counts once: each adds its part of it.
    squares = sum_of_squares(split, parallel.device) + sum_of_squares(shared, parallel.device) / (
        parallel.tensor_ranks
    )
    dist.all_reduce(squares)
    norm = squares.sqrt().float()
    if max_norm:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """What this process has of a parameter's gradient."""
    gradient = parameter.grad
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Of all their elements together, a float64 scalar."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(list(tensors))).double().square().sum()


def pieces(parameter: nn.Parameter, local: Tensor, parallel: Parallel) -> Iterator[tuple[Tensor, bool]]:
    """The pieces of what this process has of a parameter's gradient, and whether the piece is split over
    tensor ranks rather than on all of them."""
    layout = layout_of(parameter)
    if layout is None:
        yield local, False
        return
    start = 0
    if layout.dim == 0 and isinstance(parameter, DTensor):  # cut by FSDP once more, as `torch.chunk` does
        share = -(-parameter.shape[0] // parallel.data_ranks)
        start = min(share * parallel.data_rank, parameter.shape[0])
    stop = start + local.shape[layout.dim]
    first = 0
    for width, split in zip(layout.local_widths, layout.split, strict=True):
        low, high = max(first, start), min(first + width, stop)
        if low < high:
            yield local.narrow(layout.dim, low - start, high - low), split
        first += width
