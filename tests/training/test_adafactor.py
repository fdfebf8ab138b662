"""Adafactor against a float64 transcription of its formulas, whole and sharded."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from palm_pytorch.training import adafactor
from palm_pytorch.training.adafactor import Adafactor
from palm_pytorch.training.architecture import build_model
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.distributed import Parallel, start
from palm_pytorch.training.optim import build_optimizer, set_learning_rate
from palm_pytorch.training.parallelize import parallelize
from palm_pytorch.training.tensor_layout import layout_of


class Definition:
    """The formulas of the PaLM paper (section 5) and of T5X, a parameter at a time, in float64."""

    def __init__(self, parameters: list[Tensor], weight_decay: float = 1.0) -> None:
        self.p = [parameter.detach().double().clone() for parameter in parameters]
        self.m = [torch.zeros_like(p) for p in self.p]
        self.v = [torch.zeros_like(p) for p in self.p]
        self.k, self.weight_decay = 0, weight_decay
        self.clipped: list[bool] = []

    def step(self, gradients: list[Tensor], lr: float) -> None:
        self.k += 1
        b2 = 1.0 - self.k ** (-0.8)
        for i, gradient in enumerate(gradients):
            g = gradient.double()
            scale = max(math.sqrt((self.p[i] ** 2).mean().item()), 1e-3)
            self.v[i] = b2 * self.v[i] + (1 - b2) * (g**2 + 1e-30)
            u = g * self.v[i] ** -0.5
            rms = math.sqrt((u**2).mean().item())
            self.clipped.append(rms > 1.0)
            u = u / max(1.0, rms / 1.0)
            self.m[i] = 0.9 * self.m[i] + (1 - 0.9) * (lr * scale * u)
            self.p[i] = (1 - self.weight_decay * lr**2) * self.p[i] - self.m[i]


def parameters() -> list[nn.Parameter]:
    """A kernel, an embedding of RMS 1, a gain, a vector below the floor of the scale, and a scalar."""
    torch.manual_seed(0)
    tensors = [torch.randn(17, 5) * 0.3, torch.randn(11, 8), torch.ones(7), torch.randn(3) * 1e-5]
    return [nn.Parameter(tensor) for tensor in [*tensors, torch.tensor(0.5)]]


def gradients(trained: list[nn.Parameter], step: int) -> list[Tensor]:
    """They grow from step to step, so that updates are clipped; some are zero or tiny."""
    drawn = [torch.randn_like(p) * 3.0**step * 10.0 ** -(3 * i) for i, p in enumerate(trained)]
    drawn[0][3] = 0
    drawn[3] = drawn[3] * 1e-12
    return drawn


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-12, 0), (torch.float32, 1e-5, 1e-7)])
@pytest.mark.parametrize(("bunch", "weight_decay"), [(0, 1.0), (50, 30.0), (1 << 26, 0.0)])
def test_steps_follow_the_formulas(
    dtype: torch.dtype,
    rtol: float,
    atol: float,
    bunch: int,
    weight_decay: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(adafactor.BUNCH, "cpu", bunch)
    trained = [nn.Parameter(parameter.data.to(dtype)) for parameter in parameters()]
    definition = Definition(trained, weight_decay)
    optimizer = Adafactor(trained, weight_decay=weight_decay)
    for step, lr in enumerate((0.1, 0.01, 0.05, 0.2, 0.01, 0.03)):
        drawn = gradients(trained, step)
        for parameter, gradient in zip(trained, drawn, strict=True):
            parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        definition.step(drawn, lr)
        for i, parameter in enumerate(trained):
            state = optimizer.state[parameter]
            found = (parameter, state["exp_avg"], state["exp_avg_sq"])
            for tensor, expected in zip(found, (definition.p, definition.m, definition.v), strict=True):
                torch.testing.assert_close(tensor.double(), expected[i], rtol=rtol, atol=max(atol, 1e-29))
            assert state["step"].item() == step + 1
    assert any(definition.clipped) and not all(definition.clipped)


def test_the_first_step_is_a_tenth_of_the_sign_of_the_gradient() -> None:
    """By hand: b2 is 0, so u is the sign; momentum starts from zero, and nothing corrects for it."""
    parameter = nn.Parameter(torch.tensor([3.0, -4.0]))
    parameter.grad = torch.tensor([1e-4, -70.0])
    Adafactor([parameter], lr=0.01).step()
    moved = 0.1 * 0.01 * math.sqrt(12.5)
    expected = [3.0 * (1 - 1e-4) - moved, -4.0 * (1 - 1e-4) + moved]
    assert parameter.tolist() == pytest.approx(expected, rel=1e-6)


def test_what_has_no_gradient_stays_and_is_not_counted() -> None:
    first, second = parameters()[:2]
    before = second.detach().clone()
    optimizer = Adafactor([first, second])
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert torch.equal(second, before) and second not in optimizer.state
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (first, second)] == [2, 1]


def test_a_reloaded_state_goes_on_with_the_same_bits() -> None:
    trained = parameters()
    optimizer = Adafactor(trained)
    drawn = [gradients(trained, step) for step in range(4)]

    def train(trained: list[nn.Parameter], optimizer: Adafactor, steps: range) -> None:
        for step in steps:
            for parameter, gradient in zip(trained, drawn[step], strict=True):
                parameter.grad = gradient
            optimizer.step()

    train(trained, optimizer, range(2))
    twins = [nn.Parameter(p.detach().clone()) for p in trained]
    twin = Adafactor(twins, lr=0.7)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(trained, optimizer, range(2, 4))
    train(twins, twin, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(trained, twins, strict=True))


def test_a_closure_computes_the_gradients() -> None:
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = Adafactor([parameter])

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0 and parameter.item() < 2


@pytest.mark.parametrize(
    "given",
    [{"lr": -1.0}, {"beta1": 1.0}, {"decay_exponent": 0.0}, {"weight_decay": math.nan}, {"clip_rms": 0.0}],
    ids=str,
)
def test_bad_settings_are_named(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=f"{name} is .*; expected"):
        Adafactor(parameters(), **given)


def shards_agree() -> None:
    """On two processes: DTensors and a plain parameter, of lengths that two does not divide; then a PaLM."""
    shape = {"dim": 30, "depth": 1, "heads": 2, "dim_head": 6, "ff_mult": 2}
    config = TrainConfig.for_machine(device="cpu", parallel="tp", optimizer="adafactor", **shape)
    parallel = start(config, torch.device("cpu"))
    dtensors_agree(parallel.mesh["tensor"])
    tensor_parallel_agrees(config, parallel)
    parallel.stop()


def dtensors_agree(mesh: DeviceMesh) -> None:
    """Sharded rows, sharded columns, a replica, and a plain parameter."""
    whole = parameters()[:4]
    definition = Definition(whole)
    layouts = ([Shard(0)], [Shard(1)], [Replicate()])

    def laid_out(tensors: list[Tensor]) -> list[Tensor]:
        sharded = [distribute_tensor(t.detach(), mesh, p) for t, p in zip(tensors, layouts, strict=False)]
        return [*sharded, tensors[3].detach()]

    trained = [nn.Parameter(tensor) for tensor in laid_out([p.clone() for p in whole])]
    optimizer = Adafactor(trained, lr=0.05)
    for step in range(4):
        drawn = gradients(whole, step)
        for parameter, gradient in zip(trained, laid_out(drawn), strict=True):
            parameter.grad = gradient
        optimizer.step()
        definition.step(drawn, 0.05)
    for parameter, expected in zip(trained, definition.p, strict=True):
        found = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
        assert type(optimizer.state[parameter]["exp_avg"]) is type(parameter.data)


def tensor_parallel_agrees(config: TrainConfig, parallel: Parallel) -> None:
    """Its projections are cut by their parts, the one key/value head is on both processes."""
    whole = build_model(config)
    torch.manual_seed(config.seed)
    whole.init_weights()  # type: ignore[operator]
    alone = list(whole.parameters())
    definition = Definition(alone)
    with torch.device("meta"):
        model = build_model(config)
    parallelize(model, config, parallel)
    trained = list(model.parameters())
    layouts = [layout_of(parameter) for parameter in trained]
    optimizer = build_optimizer(model, config, parallel)
    set_learning_rate(optimizer, 0.05)
    for _ in range(3):
        drawn = [torch.randn_like(parameter) for parameter in alone]
        for parameter, gradient, layout in zip(trained, drawn, layouts, strict=True):
            parameter.grad = gradient if layout is None else layout.take(gradient)
        optimizer.step()
        definition.step(drawn, 0.05)
    assert any(layouts) and not all(layouts)
    for parameter, expected, layout in zip(trained, definition.p, layouts, strict=True):
        share = expected if layout is None else layout.take(expected)
        torch.testing.assert_close(parameter.double(), share, rtol=1e-5, atol=1e-6)


def test_shards_are_updated_as_the_whole() -> None:
    ranks = Ranks(2)
    try:
        ranks.run(2, shards_agree)
    finally:
        ranks.stop()
