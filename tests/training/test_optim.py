"""The groups of every model, AdamW against its formula, and which optimizer a run gets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from palm_pytorch.training.adafactor import Adafactor
from palm_pytorch.training.architecture import build_model
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.optim import adamw, build_optimizer, parameter_groups, set_learning_rate


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
    optimizer = adamw(model, weight_decay=0.1)
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


@pytest.mark.parametrize("model", ["palm", "palm-lite", "lamda", "perceiver-ar"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_every_optimizer_trains_every_parameter(optimizer: str, model: str) -> None:
    """And keeps nothing but tensors, of the parameter's shape or scalars: that is what checkpoints hold."""
    shape = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "seq_len": 12}
    config = TrainConfig.for_machine(model=model, optimizer=optimizer, device="cpu", **shape)
    net = build_model(config)
    net.requires_grad_(True).norm.requires_grad_(False)  # type: ignore[union-attr]
    trained = build_optimizer(net, config)
    set_learning_rate(trained, 0.1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    tokens = torch.randint(256, (3, 13))
    net(tokens[:, :-1], labels=tokens[:, 1:]).backward()
    trained.step()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
        for value in trained.state[parameter].values():
            assert isinstance(value, torch.Tensor) and value.shape in ((), parameter.shape)


def test_which_optimizer_a_run_gets() -> None:
    net = Tied()
    by_default = build_optimizer(net, TrainConfig.for_machine(device="cpu", weight_decay=0.3))
    assert isinstance(by_default, torch.optim.AdamW)
    assert [group["weight_decay"] for group in by_default.param_groups] == [0.3, 0.0]
    palm = build_optimizer(net, TrainConfig.for_machine(device="cpu", recipe="palm"))
    assert isinstance(palm, Adafactor)
    (group,) = palm.param_groups
    assert (group["weight_decay"], group["beta1"], group["decay_exponent"]) == (1.0, 0.9, 0.8)
    assert len(group["params"]) == len([p for p in net.parameters() if p.requires_grad])
