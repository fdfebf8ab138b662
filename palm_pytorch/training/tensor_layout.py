"""Which share of a parameter a tensor rank has, and the whole again of all shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Layout:
    """How a rank's parameter is cut out of that of the whole model: along `dim`, part by part.

    widths: of the parts in the whole.  split: of which parts a rank has one share of `ranks`, not all.
    group: of the ranks that have the whole between them.
    """

    dim: int
    widths: tuple[int, ...]
    split: tuple[bool, ...]
    rank: int
    ranks: int
    group: ProcessGroup | None = None

    @property
    def local_widths(self) -> list[int]:
        return [w // self.ranks if s else w for w, s in zip(self.widths, self.split, strict=True)]

    def take(self, whole: Tensor) -> Tensor:
        """This rank's share of a tensor of the whole model."""
        parts = zip(whole.split(self.widths, self.dim), self.split, strict=True)
        return torch.cat([p.chunk(self.ranks, self.dim)[self.rank] if s else p for p, s in parts], self.dim)

    def join(self, shares: Sequence[Tensor]) -> Tensor:
        """The whole again, of the shares of all ranks."""
        parts = zip(*(share.split(self.local_widths, self.dim) for share in shares), strict=True)
        cut = zip(parts, self.split, strict=True)
        return torch.cat([torch.cat(p, self.dim) if s else p[0] for p, s in cut], self.dim)

    def whole_shape(self, local: torch.Size) -> list[int]:
        return [sum(self.widths) if dim == self.dim else size for dim, size in enumerate(local)]


def layout_of(parameter: Tensor) -> Layout | None:
    """How a parameter of a parallelized model is cut; None where every tensor rank has all of it."""
    return getattr(parameter, "tensor_layout", None)


def whole_numel(parameter: Tensor) -> int:
    """How many elements a parameter has in the whole model."""
    layout = layout_of(parameter)
    return math.prod(layout.whole_shape(parameter.shape)) if layout else parameter.numel()


def share(parameter: Tensor, layout: Layout) -> nn.Parameter:
    """This rank's share of a parameter of the whole model."""
    local = nn.Parameter(layout.take(parameter.detach()), requires_grad=parameter.requires_grad)
    local.tensor_layout = layout  # type: ignore[attr-defined]
    return local
