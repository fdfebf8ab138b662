"""Learning rates and batch sizes at known steps, and ramps that are written wrongly."""

from __future__ import annotations

from typing import Any

import pytest

from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.schedule import batch_size_at, batches_at, learning_rate


def config(**given: Any) -> TrainConfig:
    return TrainConfig.for_machine(device="cpu", **given)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.2), (1, 0.4), (3, 0.8), (4, 1.0), (6, 0.868198), (8, 0.55), (10, 0.231802), (12, 0.1), (99, 0.1)],
)
def test_cosine_at_known_points(step: int, rate: float) -> None:
    made = config(lr=1.0, min_lr=0.1, warmup_steps=4, steps=200, schedule_steps=12)
    assert learning_rate(step, made) == pytest.approx(rate, abs=1e-6)


def test_cosine_without_warm_up_or_without_cosine() -> None:
    made = config(lr=3.0, min_lr=0.0, warmup_steps=0, steps=10)
    assert learning_rate(0, made) == 3.0
    assert learning_rate(5, made) == pytest.approx(1.5)
    assert learning_rate(9, config(lr=3.0, min_lr=1.0, warmup_steps=9, steps=9)) == 3.0


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.01), (9_998, 0.01), (9_999, 0.01), (10_000, 0.00999950), (39_999, 0.005), (254_999, 0.00198030)],
)
def test_palm_s_rate(step: int, rate: float) -> None:
    """1e-2 for the first 10,000 steps, then 1/sqrt(k)."""
    made = config(recipe="palm", steps=255_000)
    assert learning_rate(step, made) == pytest.approx(rate, rel=1e-5)


def test_palm_s_rate_after_a_warm_up() -> None:
    made = config(lr_schedule="palm", lr=0.5, warmup_steps=4, steps=20)
    rates = [learning_rate(step, made) for step in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 5**-0.5, 6**-0.5])


def test_a_constant_rate() -> None:
    made = config(lr_schedule="constant", lr=0.5, warmup_steps=1, steps=20)
    assert [learning_rate(step, made) for step in (0, 1, 2, 500)] == [0.25, 0.5, 0.5, 0.5]


def test_batches_grow_where_the_ramp_says() -> None:
    made = config(batch_size=3, grad_accum=5, batch_ramp="2:2, 7:4", steps=10)
    assert [batches_at(step, made) for step in range(9)] == [1, 1, 2, 2, 2, 2, 2, 4, 4]
    assert [batch_size_at(step, made) for step in (0, 6, 7, 999)] == [15, 30, 60, 60]
    assert batch_size_at(123, config(batch_size=3, grad_accum=5)) == 15


def test_palm_s_ramp() -> None:
    """512 sequences, 1,024 from step 50,000 on and 2,048 from 115,000 on, of 255,000 (section 5)."""
    made = config(recipe="palm", batch_size=512, steps=255_000)
    begins = [51_000, 114_750]  # the paper's, in whole percent
    sizes = [batch_size_at(step, made) for first in begins for step in (first - 1, first)]
    assert sizes == [512, 1024, 1024, 2048]
    assert [batches_at(step, config(batch_ramp="50%:3", steps=5)) for step in range(5)] == [1, 1, 1, 3, 3]
    back = config(batch_ramp="1:3,3:1", steps=5)
    assert [batches_at(step, back) for step in range(5)] == [1, 3, 3, 1, 1]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_palm_s_ramp_of_a_few_steps(steps: int) -> None:
    made = config(recipe="palm", steps=steps)
    assert [batches_at(step, made) for step in range(steps)] == [[1], [1, 4], [1, 2, 4]][steps - 1]


@pytest.mark.parametrize(
    ("ramp", "says"),
    [
        ("", "expected STEP:TIMES"),
        ("100", "expected STEP:TIMES"),
        ("100:2,", "expected STEP:TIMES"),
        ("100:0", "with '100:0'; expected STEP:TIMES"),
        ("100:2.5", "expected STEP:TIMES"),
        ("-1:2", "expected STEP:TIMES"),
        ("101%:2", "with '101%:2'; expected STEP:TIMES"),
        ("200:2,100:4", "they begin at steps 200, 100 of 1000"),
        ("100:2,100:4", "they begin at steps 100, 100 of 1000"),
    ],
)
def test_bad_ramps_are_named(ramp: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        config(batch_ramp=ramp, steps=1000)
    assert str(error.value).startswith(f"batch_ramp is {ramp!r}") and says in str(error.value)
