"""Losses without gradients, and bits per byte: what a model of text is judged by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from palm_pytorch.data.batch import IGNORED, Batch, HeldOut


class Reduction(Protocol):
    """The part of `Parallel` that scores need: sums over the processes that read different data."""

    def sum(self, values: Sequence[float]) -> list[float]: ...


def bits_per_byte(loss: float, bytes_per_token: float = 1.0) -> float:
    """A mean loss in nats per token as bits, for each byte of the text that a token stands for."""
    return loss / math.log(2) / bytes_per_token


def bytes_per_token(held_out: HeldOut) -> float:
    """Bytes of text for each token that is predicted."""
    return held_out.num_bytes / max(1, held_out.num_labels)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    precision: torch.dtype = torch.float32,
    parallel: Reduction | None = None,
) -> float:
    """The mean loss, in nats per token that is predicted, over all `batches`.

    It is the mean over all labels that count, in float64, however they are spread over batches and, with
    `parallel`, over processes. Dropout is off meanwhile, and the model's mode restored.

    Raises:
        ValueError: no label counts, anywhere.
    """
    device = next(model.parameters()).device
    was_training = model.training
    total, counted = 0.0, 0.0
    model.eval()
    try:
        for batch in batches:
            loss, labels = nats(model, batch.to(device), precision)
            total, counted = total + loss, counted + labels
    finally:
        model.train(was_training)
    if parallel is not None:
        total, counted = parallel.sum([total, counted])
    if not counted:
        raise ValueError("batches have no label that counts; expected at least one to evaluate on")
    return total / counted


def nats(model: nn.Module, batch: Batch, precision: torch.dtype) -> tuple[float, int]:
    """The sum of a batch's losses in nats, and over how many labels."""
    labels = int(count_labels(model, batch))
    return float(batch_loss(model, batch, precision)) * labels, labels


def count_labels(model: nn.Module, batch: Batch) -> Tensor:
    """How many labels of a batch count, a scalar: not `IGNORED`, and not in the prefix of a Perceiver AR."""
    return (batch.labels[:, getattr(model, "prefix_len", 0) :] != IGNORED).sum()


def batch_loss(model: nn.Module, batch: Batch, precision: torch.dtype, **inputs: Any) -> Tensor:
    """The mean loss of a batch over the labels that count. inputs: of the model's `forward`."""
    more = {"document_ids": batch.document_ids, "prefix_mask": batch.prefix_mask}
    inputs |= {name: tensor for name, tensor in more.items() if tensor is not None}
    with autocast(precision, batch.tokens.device):
        loss: Tensor = model(batch.tokens, labels=batch.labels, **inputs)
    return loss


def autocast(precision: torch.dtype, device: torch.device) -> torch.autocast:
    """Matrix products in `precision`; weights and gradients stay float32 (Micikevicius et al. 2018)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)
