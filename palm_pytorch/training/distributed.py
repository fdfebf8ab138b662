"""Training with several processes, started by `torchrun`: who they are, and what each of them has.

    kind      parameters                         each process reads
    none      whole, of the one process          the batch
    ddp       whole, on every process            its share of the batch
    fsdp      a share of each on every process   its share of the batch
    tp        a share of heads and inner width   the batch
    fsdp+tp   both: a share of that share        the share of its group of `tensor_ranks` processes

Processes stand in a grid, data ranks by tensor ranks. Neighbours share a row, so that tensor parallelism,
which waits for every sum, stays inside a machine.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from palm_pytorch.training.architecture import read_architecture
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.rendezvous import join, rendezvous

T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """The processes of a run, seen from one of them. There is always a process group, also of one process.

    kind: how the model is spread; never "auto".
    mesh: (data_ranks, tensor_ranks), of dimensions "data" and "tensor".
    device: where this process computes.
    """

    kind: str
    mesh: DeviceMesh
    device: torch.device
    owns_group: bool = True

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes what is written once."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return self.mesh.get_local_rank("data")

    @property
    def data_ranks(self) -> int:
        return self.mesh.size(0)

    @property
    def tensor_rank(self) -> int:
        return self.mesh.get_local_rank("tensor")

    @property
    def tensor_ranks(self) -> int:
        return self.mesh.size(1)

    def rows(self, batch_size: int) -> range:
        """Which rows of a batch this process reads: as many as every other data rank, in order."""
        share = batch_size // self.data_ranks
        return range(self.data_rank * share, (self.data_rank + 1) * share)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of `values` summed over the data ranks, in float64; the same on every process.

        Tensor ranks have the same values but for rounding, and their mean is taken: what is decided by a
        loss, as going back from a spike, must be decided alike on all.
        """
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total)
        return (total / self.tensor_ranks).tolist()

    def agree(self, flag: int) -> int:
        """The largest `flag` of any process."""
        largest = torch.tensor(flag, dtype=torch.int64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def barrier(self) -> None:
        """Wait for every process."""
        self.agree(0)

    def from_main(self, value: T) -> T:
        """`value` of the main process, on every process."""
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one process fails on all, so that none waits for another; no collective may be
        inside.

        Raises:
            ValueError: on processes that did not fail themselves; it says which did, and why.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        reasons: list[Any] = [None] * self.world_size
        dist.all_gather_object(reasons, None if error is None else str(error))
        if error is not None:
            raise error
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise ValueError(f"process {rank}: {reason}")

    def stop(self) -> None:
        """Leave the process group. Models and optimizers that used it should be deleted by now."""
        if self.owns_group and dist.is_initialized():
            # Otherwise what FSDP and DDP hold in reference cycles is freed after the group that it needs,
            # and the process sometimes aborts.
            gc.collect()
            dist.destroy_process_group()


def start(config: TrainConfig, device: torch.device) -> Parallel:
    """Join the processes that torchrun started; without it, be the only one. Checks `config` against them.

    device: of `select_device`; a GPU without number becomes this process's own.

    Raises:
        ValueError: the environment is not torchrun's, or the options do not fit so many processes.
    """
    several = rendezvous()
    owns = not dist.is_initialized()
    world_size = int(os.environ["WORLD_SIZE"]) if owns and several else 1
    if not owns:
        world_size = dist.get_world_size()
    kind, tensor_ranks = choose_grid(config, world_size)
    if device.type == "cuda":
        device = own_gpu(device)
        torch.cuda.set_device(device)
    if owns:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
        if several:
            join(backend, world_size)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    shape = (world_size // tensor_ranks, tensor_ranks)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
    return Parallel(kind, mesh, device, owns)


def own_gpu(device: torch.device) -> torch.device:
    """The GPU of this process among those of its machine.

    Raises:
        ValueError: there are fewer than processes; on all of these.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)), torch.cuda.device_count()
    if processes > gpus:
        raise ValueError(
            f"nproc-per-node is {processes}; expected at most a process for each of the {gpus} GPUs here"
        )
    return torch.device("cuda", local) if device.index is None or "LOCAL_RANK" in os.environ else device


def choose_grid(config: TrainConfig, world_size: int) -> tuple[str, int]:
    """The kind of parallelism of `config` on `world_size` processes, and its number of tensor ranks.

    Raises:
        ValueError: they do not go together.
    """
    kind = config.parallel
    if kind == "auto":
        kind = "none" if world_size == 1 else "ddp"
    if kind == "none" and world_size > 1:
        raise ValueError(
            f"parallel is 'none', and there are {world_size} processes; expected ddp, fsdp, tp or fsdp+tp"
        )
    tensor_ranks = 1
    if kind == "tp":
        tensor_ranks = config.tensor_parallel or world_size
        if tensor_ranks != world_size:
            raise ValueError(
                f"tensor_parallel is {tensor_ranks}, and there are {world_size} processes; expected as many, "
                "or parallel 'fsdp+tp'"
            )
    elif kind == "fsdp+tp":
        tensor_ranks = config.tensor_parallel or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        if world_size % tensor_ranks:
            raise ValueError(
                f"tensor_parallel is {tensor_ranks}; expected a divisor of the {world_size} processes"
            )
    elif config.tensor_parallel not in (None, 1):
        raise ValueError(
            f"tensor_parallel is {config.tensor_parallel} and parallel {kind!r}; only tp and fsdp+tp have it"
        )
    data_ranks = world_size // tensor_ranks
    if config.batch_size % data_ranks:
        raise ValueError(
            f"batch_size is {config.batch_size}; expected a multiple of the {data_ranks} processes that "
            "share it"
        )
    if tensor_ranks > 1:
        sizes = {"heads": config.heads, "dim * ff_mult": config.dim * config.ff_mult}
        kv_heads = read_architecture(config.architecture).get("kv_heads")
        if isinstance(kv_heads, int) and kv_heads > 1:  # a single one is on every rank
            sizes["kv_heads"] = kv_heads
        for name, size in sizes.items():
            if size % tensor_ranks:
                raise ValueError(
                    f"{name} is {size}; expected a multiple of the {tensor_ranks} processes that share it"
                )
        if config.dropout:
            # Ranks draw the same numbers, for different heads.
            raise ValueError(f"dropout is {config.dropout}; expected 0 with parallel {kind!r}")
    return kind, tensor_ranks
