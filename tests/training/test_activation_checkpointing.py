from __future__ import annotations

from typing import Any

import distributed_training as cases
import pytest
import torch
from torch import Tensor, nn

from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR
from palm_pytorch.training.activation_checkpointing import recompute

DROPOUT = {
    "palm": lambda: PaLM(**cases.SHAPE, attn_dropout=0.2, ff_dropout=0.2),
    "palm-lite": lambda: PaLMLite(**cases.SHAPE, attn_dropout=0.2, ff_dropout=0.2),
    "lamda": lambda: LaMDA(**cases.SHAPE, dropout=0.2),
    "perceiver-ar": lambda: PerceiverAR(**cases.SHAPE, **cases.PREFIX, dropout=0.2, cross_attn_dropout=0.5),
}


def loss_and_gradients(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    loss = model(rows[:, :-1], labels=rows[:, 1:])
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("name", DROPOUT)
def test_what_is_computed_again_is_the_same_with_dropout_too(name: str) -> None:
    model, rows = DROPOUT[name](), cases.tokens()[0, 0]
    expected = loss_and_gradients(model, rows)
    blocks = [*getattr(model, "perceive_layers", []), *model.layers]
    kept = {"none": saved_elements(model, rows)}
    for what in ("attention", "block"):
        model.load_state_dict(model.state_dict())  # names are what they were
        for block in blocks:
            recompute(block, what)
        found = loss_and_gradients(model, rows)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), (what, key)
        kept[what] = saved_elements(model, rows)
    assert kept["block"] < kept["attention"] < kept["none"]


def saved_elements(model: nn.Module, rows: Tensor) -> int:
    """How many numbers a forward pass keeps for the backward pass."""
    kept: dict[Any, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(rows[:, :-1], labels=rows[:, 1:])
    del loss
    return sum(kept.values())
