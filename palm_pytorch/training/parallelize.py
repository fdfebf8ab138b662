"""A model spread over the processes of a run, from outside: nothing in it knows of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from palm_pytorch.training.activation_checkpointing import recompute
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.distributed import Parallel
from palm_pytorch.training.resharding import fill
from palm_pytorch.training.tensor_layout import layout_of
from palm_pytorch.training.tensor_parallel import split_over


def parallelize(model: nn.Module, config: TrainConfig, parallel: Parallel) -> nn.Module:
    """Spread `model`, on the meta device, over the processes, in place, and return what a training step calls
    in its stead.

    Everything else, evaluation, sampling, checkpoints and the optimizer, goes on using `model`: the names of
    its parameters stay what they were. The two differ for "ddp" alone.

    It gets memory for this process's share only, and the weights that `config.seed` stands for: the same ones
    for any number of processes.
    """
    if parallel.tensor_ranks > 1:
        group = parallel.mesh.get_group("tensor")
        for block in blocks(model):
            split_over(block, parallel.tensor_rank, group)
    layouts = {name: layout_of(parameter) for name, parameter in model.named_parameters()}
    for block in blocks(model):
        if config.compile:
            block.forward = torch.compile(block.forward)  # not the hooks, of which FSDP has some
        recompute(block, config.activation_checkpointing)

    if "fsdp" in parallel.kind:
        # No lower precision here: autocast casts what it casts in one process, so that both compute the
        # same, with the stream, gains and gradients in float32. Weights travel in float32 for it.
        for block in blocks(model):
            fully_shard(block, mesh=parallel.mesh["data"])
        fully_shard(model, mesh=parallel.mesh["data"])
        model.register_forward_hook(reshard_unless_training)
    model.to_empty(device=parallel.device)
    for name, parameter in model.named_parameters():
        if layouts[name] is not None:  # which FSDP's parameters do not keep
            parameter.tensor_layout = layouts[name]  # type: ignore[attr-defined]
    torch.manual_seed(config.seed)
    with WholeDraws():
        model.init_weights()  # type: ignore[operator]
    if parallel.kind == "ddp":
        return DistributedDataParallel(model, process_group=parallel.mesh.get_group("data"))
    return model


def reshard_unless_training(model: nn.Module, inputs: Any, out: Any) -> None:
    """Embedding and final norm stay whole after a forward pass, for the backward pass to come. Where none
    comes, `parameters` would go on giving the whole ones, of which the optimizer knows nothing."""
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        model.reshard()


def blocks(model: nn.Module) -> list[nn.Module]:
    """Those of a model, in order."""
    return [block for part in model.children() if isinstance(part, nn.ModuleList) for block in part]


# How weights are drawn. The functions of `nn.init` come here before the methods that they call.
DRAWS = {Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_}


class WholeDraws(TorchFunctionMode):
    """While entered, a parameter of which a process has a share is drawn as a whole, and the share kept.

    So each process draws the numbers that one alone would, and has memory for one whole parameter at a time.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS:
            share, *options = (kwargs.pop("tensor"), *args) if "tensor" in kwargs else args
            layout = layout_of(share)
            whole_shape = share.shape if layout is None else layout.whole_shape(share.shape)
            drawn = torch.empty(whole_shape, dtype=share.dtype, device=share.device)
            fill(share, share, func(drawn, *options, **kwargs))
            return share
        return func(*args, **kwargs)


def accumulating(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around forward and backward of a slice of a step: gradients travel after the `last` one only.

    network: of `parallelize`.
    """
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
    return nullcontext()
