"""A step's random numbers are a function of seed, step and rank; the state is named and survives JSON."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW

from palm_pytorch.training.state import TrainState, derive_seed, next_batch, seed_step, seed_streams


def draw() -> tuple[float, ...]:
    return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(()).item()


def test_every_stream_starts_anew_at_a_step_whatever_was_drawn_before() -> None:
    seed_step(5, step=3, data_rank=0)
    first = draw()
    draw()
    seed_step(5, step=4, data_rank=0)
    seed_step(5, step=3, data_rank=0)
    assert draw() == first


def test_seeds_steps_ranks_and_purposes_share_no_draws() -> None:
    drawn = []
    for seed, names in (
        (5, ("step", 3, 0)),
        (5, ("step", 3, 1)),
        (5, ("step", 30, 0)),
        (5, ("sample", 3)),
        (53, ("step", 0)),
        (2**63 - 1, ("step", 3, 0)),  # more than NumPy takes
    ):
        seed_streams(seed, *names)
        drawn += draw()
    assert len(set(drawn)) == len(drawn)


def test_derived_seeds_are_what_they_were() -> None:
    """A resumed run of an older version draws the same: SHA-256 of "7:step:12:0", eight bytes, halved."""
    assert derive_seed(7, "step", 12, 0) == 3965480295442179607


@pytest.mark.parametrize(
    ("index", "expected"), [(0, 0), (4, 4), (5, 9), (8, 9), (9, 9), (10, 10), (12, 17), (19, 20)]
)
def test_batches_are_passed_over(index: int, expected: int) -> None:
    assert next_batch(index, [[12, 17], [5, 9], [18, 20]]) == expected


def test_a_step_advances_to_the_next_batch_that_is_read() -> None:
    state = TrainState(nn.Linear(2, 2), AdamW([nn.Parameter(torch.zeros(1))]), passed_over=[[2, 7]])
    for _ in range(3):
        state.advance(tokens=10, seconds=0.5)
    assert (state.step, state.batch_index, state.tokens, state.seconds) == (3, 8, 30, 1.5)


def test_numbers_survive_json_to_the_last_bit() -> None:
    state = TrainState(nn.Linear(2, 2), AdamW([nn.Parameter(torch.zeros(1))]))
    state.seconds, state.recent_losses, state.due = 0.1 + 0.2, [1 / 3, 2.0**-1074], ["valid"]
    state.best_step, state.best_loss, state.passed_over = 4, 1e-17, [[1, 2]]
    other = TrainState(state.model, state.optimizer)
    other.set_numbers(json.loads(json.dumps(state.numbers())))
    assert other.numbers() == state.numbers() and other.seconds == 0.1 + 0.2


def two_layers() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def stepped(model: nn.Module, groups: Any) -> TrainState:
    optimizer = AdamW(groups, lr=0.1)
    model(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()
    return TrainState(model, optimizer)


def test_names_do_not_depend_on_the_order_of_the_optimizer() -> None:
    plain = two_layers()
    one = stepped(plain, plain.parameters()).tensors()
    other_model = two_layers()
    last_first = [{"params": [p]} for p in reversed(list(other_model.parameters()))]
    other = stepped(other_model, last_first).tensors()
    assert list(one["model"]) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert set(one["optimizer"]["1.bias"]) == {"step", "exp_avg", "exp_avg_sq"}
    torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_a_tied_weight_is_there_once() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    assert list(TrainState(model, AdamW(model.parameters())).tensors()["model"]) == ["0.weight"]


def test_an_optimizer_goes_on_from_another_ones_state_with_its_own_options() -> None:
    straight = stepped(model := two_layers(), model.parameters())
    resumed = TrainState(copy := two_layers(), AdamW(copy.parameters(), lr=0.5, weight_decay=0.25))
    saved = straight.tensors()
    resumed.set_optimizer_tensors({name: dict(kinds) for name, kinds in saved["optimizer"].items()})
    torch.testing.assert_close(resumed.tensors()["optimizer"], saved["optimizer"], rtol=0, atol=0)
    (group,) = resumed.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)


def test_what_is_no_tensor_is_named() -> None:
    state = stepped(model := two_layers(), model.parameters())
    state.optimizer.state[model[0].bias]["count"] = 3
    with pytest.raises(TypeError, match=r"the optimizer's count of 0\.bias is 3; expected a tensor"):
        state.tensors()
