"""The optimizers of a run: which there are, and which parameters decay."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from palm_pytorch.training.adafactor import Adafactor
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.distributed import Parallel
from palm_pytorch.training.gradient_norm import pieces, sum_of_squares
from palm_pytorch.training.tensor_layout import whole_numel


def build_optimizer(model: nn.Module, config: TrainConfig, parallel: Parallel | None = None) -> Optimizer:
    """The optimizer that `config` asks for, at a learning rate of 0: `set_learning_rate` comes before a step.

    Its state is tensors alone, of the shape of their parameter or scalars.

    parallel: of `parallelize`, if that has changed the model.
    """
    if config.optimizer == "adafactor":
        # As T5X does it, embeddings and gains decay too: at lr^2 that is next to nothing, and scaled updates
        # keep the rows of rare tokens from shrinking away.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rms = None
        if parallel is not None and parallel.tensor_ranks > 1:
            rms = partial(rms_over_ranks, parallel=parallel)
        return Adafactor(trained, lr=0.0, weight_decay=config.weight_decay, rms=rms)
    return adamw(model, weight_decay=config.weight_decay)


def rms_over_ranks(shares: list[Tensor], parameters: list[nn.Parameter], parallel: Parallel) -> list[float]:
    """Root mean squares of the wholes that tensors cut as the parameters beside them are the shares of."""
    squares, sizes = [], []
    for share, parameter in zip(shares, parameters, strict=True):
        cut: dict[bool, list[Tensor]] = {True: [], False: []}
        for piece, is_split in pieces(parameter, share, parallel):
            cut[is_split].append(piece)
        # What all tensor ranks have counts once: each adds its part of it.
        replicated = sum_of_squares(cut[False], parallel.device) / parallel.tensor_ranks
        squares.append(sum_of_squares(cut[True], parallel.device) + replicated)
        sizes.append(whole_numel(parameter))
    sums = torch.stack(squares)
    dist.all_reduce(sums)
    return [math.sqrt(total / size) for total, size in zip(sums.tolist(), sizes, strict=True)]


def adamw(model: nn.Module, *, weight_decay: float) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) with the betas of GPT-3 (Brown et al. 2020), fused where it can be."""
    fused = next(model.parameters()).device.type in {"cpu", "cuda"}
    return AdamW(parameter_groups(model, weight_decay), lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: the weights of linear layers, which decay, and everything else, which does not.

    Decay bounds the weights that multiply activations. A norm's gain or a bias needs no bound. An embedding,
    also one tied to the logits, has rows to which most steps give little gradient: decay would move these by
    itself, and shrink rare tokens for being rare.
    """
    linears = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    linears -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in linears], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in linears], "weight_decay": 0.0},
    ]


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
