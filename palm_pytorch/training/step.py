"""One optimizer step: the gradient of all its slices on all processes, clipped, and the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from palm_pytorch.data.batch import Batch
from palm_pytorch.training.evaluate import batch_loss, count_labels
from palm_pytorch.training.gradient_norm import clip_gradients
from palm_pytorch.training.optim import set_learning_rate
from palm_pytorch.training.parallelize import accumulating
from palm_pytorch.training.run import Run
from palm_pytorch.training.schedule import learning_rate


@dataclass(frozen=True)
class Step:
    """What one optimizer step was: its rate and loss, and the norm of its gradient before clipping.

    updated: whether the weights have been; they are not where loss or gradient is not finite.
    """

    learning_rate: float
    loss: float
    grad_norm: float
    updated: bool


def train_step(run: Run, batches: Sequence[Batch]) -> Step:
    """One optimizer step on this process's slices of a batch, unless loss or gradient are not finite."""
    config, state = run.config, run.state
    rate = learning_rate(state.step, config)
    set_learning_rate(state.optimizer, rate)
    loss = accumulate_gradients(run, batches)
    norm = float(clip_gradients(state.model, config.grad_clip, run.parallel))
    # All processes or none: weights that were updated on some only would drift apart.
    updated = not run.parallel.agree(not (math.isfinite(loss) and math.isfinite(norm)))
    if updated:
        state.optimizer.step()
    state.optimizer.zero_grad()
    return Step(rate, loss, norm, updated)


def accumulate_gradients(run: Run, batches: Sequence[Batch]) -> float:
    """Leave in the parameters the gradient of a step's loss, which is returned.

    That is the mean over all labels that count in all slices on all processes, however they are spread.
    """
    model, network, device = run.state.model, run.network, run.state.device
    model.train()
    counts = [int(count_labels(model, batch)) for batch in batches]
    (total,) = run.parallel.sum([sum(counts)])
    nats = torch.zeros((), device=device)
    for number, (batch, count) in enumerate(zip(batches, counts, strict=True), start=1):
        batch = batch.to(device, non_blocking=True)
        with accumulating(network, last=number == len(batches)):
            loss = batch_loss(network, batch, run.precision, z_loss=run.config.z_loss)
            # Processes take the mean of their gradients, where the sum is wanted.
            loss = loss / (total / (count * run.parallel.data_ranks)) if count else loss * 0
            loss.backward()
        nats += loss.detach()
    (mean,) = run.parallel.sum([nats.item() / run.parallel.data_ranks])
    return mean
