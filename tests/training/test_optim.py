"""The schedule at known points, the groups of every model, AdamW against its formula, and clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from palm_pytorch.training.run import build_model


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.2), (1, 0.4), (3, 0.8), (4, 1.0), (6, 0.868198), (8, 0.55), (10, 0.231802), (12, 0.1), (99, 0.1)],
)
def test_learning_rate_at_known_points(step: int, rate: float) -> None:
    given = learning_rate(step, peak=1.0, floor=0.1, warmup_steps=4, total_steps=12)
    assert given == pytest.approx(rate, abs=1e-6)


def test_learning_rate_without_warm_up_or_without_cosine() -> None:
    assert learning_rate(0, peak=3.0, floor=0.0, warmup_steps=0, total_steps=10) == 3.0
    assert learning_rate(5, peak=3.0, floor=0.0, warmup_steps=0, total_steps=10) == pytest.approx(1.5)
    assert learning_rate(9, peak=3.0, floor=1.0, warmup_steps=9, total_steps=9) == 3.0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4, bias=True)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.logits = nn.Linear(4, 7, bias=False)
        self.logits.weight = self.embedding.weight


def test_only_matrices_that_multiply_activations_decay() -> None:
    model = Tied()
    decayed, kept = parameter_groups(model, 0.3)
    assert [id(p) for p in decayed["params"]] == [id(model.hidden.weight)]
    assert {id(p) for p in kept["params"]} == {
        id(p) for p in (model.embedding.weight, model.hidden.bias, model.norm.weight, model.norm.bias)
    }
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize("model", ["palm", "palm-lite", "lamda", "perceiver-ar"])
def test_every_parameter_of_a_model_is_in_one_group(model: str) -> None:
    net = build_model(TrainConfig.for_machine(model=model, dim=32, depth=2, heads=2, dim_head=16, seq_len=16))
    decayed, kept = ([id(p) for p in group["params"]] for group in parameter_groups(net, 0.1))
    assert sorted(decayed + kept) == sorted(id(p) for p in net.parameters())
    names = {id(p): name for name, p in net.named_parameters()}
    assert not [
        names[p] for p in decayed if any(word in names[p] for word in ("norm", "emb", "bias", "table"))
    ]
    # Nearly everything but embeddings is in matrices.
    embeddings = sum(p.numel() for m in net.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    size = {id(p): p.numel() for p in net.parameters()}
    assert sum(size[p] for p in decayed) > 0.95 * (sum(size.values()) - embeddings)


def test_steps_follow_the_formula_of_adamw() -> None:
    """Against a float64 transcription of algorithm 2 of Loshchilov & Hutter (2019), at changing rates."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=True)
    weight, bias = (p.detach().double().clone() for p in (model.weight, model.bias))
    optimizer = build_optimizer(model, weight_decay=0.1)
    moments = {
        name: (torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)) for name in "wb"
    }
    for step, rate in enumerate((0.1, 0.05, 0.2), start=1):
        set_learning_rate(optimizer, rate)
        for name, parameter, decay in (("w", model.weight, 0.1), ("b", model.bias, 0.0)):
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient
            first, second = moments[name]
            first = 0.9 * first + 0.1 * gradient.double()
            second = 0.95 * second + 0.05 * gradient.double() ** 2
            moments[name] = first, second
            update = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
            if name == "w":
                weight = weight - rate * decay * weight - rate * update
            else:
                bias = bias - rate * decay * bias - rate * update
        optimizer.step()
    torch.testing.assert_close(model.weight.double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.bias.double(), bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("limit", "expected"), [(1.0, (0.6, 0.8)), (10.0, (3.0, 4.0)), (0.0, (3.0, 4.0))])
def test_gradients_are_clipped_by_their_common_norm(limit: float, expected: tuple[float, float]) -> None:
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, 1))]
    for parameter, gradient in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.full_like(parameter, gradient)
    assert clip_gradients(parameters, limit).item() == 5.0
    grads = [p.grad.item() for p in parameters if p.grad is not None]
    assert grads == pytest.approx(expected, rel=1e-5)


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([math.nan, 1.0])
    assert math.isnan(clip_gradients([parameter], 1.0).item())
