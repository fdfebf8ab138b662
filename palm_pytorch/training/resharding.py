"""Tensors of a parallel model in the shape that they have in the plain one, and back.

A checkpoint holds the plain model's tensors, each process writing a share of every one, so that it knows
nothing of the processes that wrote it: any number of them, however they share the work, read it back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor import zeros as zeros_over

from palm_pytorch.training.tensor_layout import layout_of


def whole(parameter: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, shaped like `parameter` (itself, or of its optimizer), as one of the plain model.

    What tensor parallelism has cut comes out as a DTensor in even shares over all processes; all of them put
    it together at once, one tensor at a time. The rest is returned as it is.
    """
    layout = layout_of(parameter)
    if layout is None or tensor.shape != parameter.shape:
        return tensor
    local = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().contiguous()
    shares = [torch.empty_like(local) for _ in range(layout.ranks)]
    dist.all_gather(shares, local, group=layout.group)
    return spread(layout.join(shares), all_processes(local), [Shard(0)])


def blank(parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros as `whole` would give them of something shaped like `parameter`, to read a checkpoint into."""
    dtype, layout = dtype or parameter.dtype, layout_of(parameter)
    if layout is None:
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    shape = layout.whole_shape(parameter.shape)
    return zeros_over(shape, dtype=dtype, device_mesh=all_processes(parameter), placements=[Shard(0)])


@torch.no_grad()
def fill(parameter: Tensor, tensor: Tensor, loaded: Tensor) -> Tensor:
    """Put into `tensor`, shaped like `parameter`, its share of `loaded`: of `blank`, or a plain tensor that
    every process has."""
    full = (loaded.full_tensor() if isinstance(loaded, DTensor) else loaded).to(tensor.device)
    layout = layout_of(parameter)
    local = full if layout is None else layout.take(full)
    if isinstance(tensor, DTensor):
        tensor.to_local().copy_(spread(local, tensor.device_mesh, tensor.placements).to_local())
    else:
        tensor.copy_(local)
    return tensor


def spread(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A tensor that every process has, of which each keeps its share. Nothing is sent."""
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements)


def all_processes(tensor: Tensor) -> DeviceMesh:
    return init_device_mesh(tensor.device.type, (dist.get_world_size(),))
