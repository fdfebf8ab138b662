"""What ends a run early or sets it back: when, what is left of it, and that a resumed run tells the same."""

from __future__ import annotations

import math
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from palm_pytorch.training import faults, loop, step
from palm_pytorch.training.checkpoint import complete_checkpoints, step_of
from palm_pytorch.training.faults import MOST_SKIPPED_STEPS, SPIKE_WINDOW, Stopped, StopRequest, is_spike
from palm_pytorch.training.logging import MEASURED, read_metrics
from palm_pytorch.training.loop import train
from palm_pytorch.training.run import Run, prepare
from palm_pytorch.training.step import Step, train_step

ALONE: Any = SimpleNamespace(agree=lambda flag: flag)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_asks_and_ctrl_c_after_it_stops(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with StopRequest(ALONE) as stop:
        stop.check()
        assert stop.agreed() is None
        signal.raise_signal(number)
        assert stop.agreed() == number
        with pytest.raises(Stopped):
            stop.check()
        signal.raise_signal(signal.SIGTERM)  # torchrun's, after Slurm's: once asked is enough
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.signal == number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_signal_to_any_process_stops_all() -> None:
    other: Any = SimpleNamespace(agree=lambda flag: max(flag, signal.SIGTERM))
    assert StopRequest(other).agreed() == signal.SIGTERM


@pytest.mark.parametrize(
    ("loss", "recent", "factor", "expected"),
    [
        (4.1, [2.0] * 100, 2.0, True),
        (4.0, [2.0] * 100, 2.0, False),
        (9.0, [2.0] * 99, 2.0, False),  # too early to tell
        (9.0, [2.0] * 100, 0.0, False),
        (math.inf, [2.0] * 100, 2.0, True),
        (4.1, [2.0] * 51 + [50.0] * 49, 2.0, True),  # the spike goes on, and does not count as usual
        (math.nan, [2.0] * 100, 2.0, False),
    ],
)
def test_a_spike_is_far_above_the_median(
    loss: float, recent: list[float], factor: float, expected: bool
) -> None:
    assert SPIKE_WINDOW == 100
    assert is_spike(loss, recent, factor) is expected


def parameters(run: Run) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.state.model.parameters()])


def rows(run: Run) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if name not in MEASURED}
        for row in read_metrics(run.metrics_file)
        if row.get("event") != "resume"
    ]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    where: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_loss, seen = step.batch_loss, []

    def spoiled(model: Any, *args: Any, **options: Any) -> torch.Tensor:
        loss = batch_loss(model, *args, **options)
        seen.append(parameters(run).clone())
        if len(seen) not in (2, 3):
            return loss
        first = next(model.parameters()).sum()
        # The square root of 0 is finite, and its gradient is not.
        return loss + (first * math.inf if where == "loss" else (first * 0).abs().sqrt())

    monkeypatch.setattr(step, "batch_loss", spoiled)
    run = prepare(**{**tiny, "eval_every": 0})
    train(run)
    assert torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[3], seen[4])
    assert parameters(run).isfinite().all()
    assert (run.state.skipped_steps, run.state.skipped_in_a_row, run.state.step) == (2, 0, 6)
    told = [(row["step"], row.get("split") or row["event"]) for row in rows(run)]
    assert told[:4] == [(1, "train"), (2, "skip"), (3, "skip"), (4, "train")]
    assert rows(run)[1]["grad_norm"] in ("nan", "inf")


def test_too_many_skipped_steps_in_a_row_end_the_run(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(**{**tiny, "steps": 50, "save_every": 5, "eval_every": 0, "generate_every": 0})

    def fail_from_step_7(run: Run, batches: Any) -> Step:
        return train_step(run, batches) if run.state.step < 7 else Step(0.1, math.nan, math.nan, False)

    monkeypatch.setattr(loop, "train_step", fail_from_step_7)
    with pytest.raises(FloatingPointError, match=r"step 27: the loss is nan .* 20 steps in a row .*--lr"):
        train(run)
    assert MOST_SKIPPED_STEPS == 20
    assert [step_of(path) for path in complete_checkpoints(run.folder)] == [15, 20, 25]
    last = {"step": 27, "event": "skip", "tokens": 27 * 64, "loss": "nan", "grad_norm": "nan"}
    assert rows(run)[-1] == last


@pytest.fixture
def spiky(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a run in which a spike is found after five steps; `spike_at` makes one."""
    monkeypatch.setattr(faults, "SPIKE_WINDOW", 5)
    quick = {"eval_every": 0, "generate_every": 0, "save_every": 4, "keep": 9, "dropout": 0.2}
    spike = {"spike_factor": 2.0, "spike_rewind": 3, "spike_skip": 10}
    return {**tiny, **quick, **spike, "steps": 16}


def spike_at(batch: int, read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the loss rise where the batch of this number is read; the numbers of all that are go to `read`."""

    def rising(run: Run, batches: Any) -> Step:
        read.append(run.state.batch_index)
        taken = train_step(run, batches)
        rise = 10.0 if run.state.batch_index == batch else 1.0
        return Step(taken.learning_rate, taken.loss * rise, taken.grad_norm, taken.updated)

    monkeypatch.setattr(loop, "train_step", rising)


def test_a_spike_sets_the_run_back_and_its_batches_are_passed_over(
    spiky: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At batch 11: back to the checkpoint of step 8; batches 8 to 17 are never read again."""
    read: list[int] = []
    spike_at(11, read, monkeypatch)
    run = prepare(**spiky)
    train(run)
    assert read == [*range(12), *range(18, 26)]
    assert (run.state.rollbacks, run.state.passed_over, run.state.step) == (1, [[8, 18]], 16)
    told = [(row["step"], row.get("split") or row["event"]) for row in rows(run)]
    before, after = ([(step, "train") for step in steps] for steps in (range(1, 9), range(9, 17)))
    assert told[:-2] == [*before, (8, "rollback"), *after]
    event = rows(run)[8]
    assert (event["spike_step"], event["passed_over"]) == (12, [8, 18])
    assert event["spike_loss"] > 20


def test_batches_long_before_a_spike_are_read_again(
    spiky: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    spike_at(11, read, monkeypatch)
    run = prepare(**{**spiky, "save_every": 5})
    train(run)
    assert read == [*range(12), 5, 6, 7, *range(18, 26)]


@pytest.mark.parametrize("stop_at", [7, 9, 13])
def test_a_run_that_was_set_back_resumes_exactly(
    stop_at: int, spiky: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the spike, right before it, and after the roll-back."""
    spike_at(11, [], monkeypatch)
    straight = prepare(**{**spiky, "out": spiky["out"] + "-straight"})
    train(straight)
    spiking = loop.train_step

    def step_and_stop(run: Run, batches: Any) -> Step:
        if run.state.step == stop_at and (stop_at < 12 or run.state.rollbacks):
            signal.raise_signal(signal.SIGTERM)
        return spiking(run, batches)

    monkeypatch.setattr(loop, "train_step", step_and_stop)
    assert train(prepare(**spiky)).stopped_by
    monkeypatch.setattr(loop, "train_step", spiking)
    resumed = prepare(resume=spiky["out"])
    train(resumed)
    assert torch.equal(parameters(resumed), parameters(straight))
    assert rows(resumed) == rows(straight)


def test_without_a_checkpoint_to_go_back_to_the_run_goes_on(
    spiky: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spike_at(6, [], monkeypatch)
    run = prepare(**{**spiky, "steps": 8, "save_every": 5})
    train(run)
    assert run.state.rollbacks == 0 and run.state.step == 8
    told = [(row["step"], row.get("split") or row["event"]) for row in rows(run)]
    assert (6, "spike") in told and (7, "train") in told


def test_a_run_that_spikes_again_and_again_ends(
    spiky: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MOST_ROLLBACKS", 2)

    def always_at_step_11(run: Run, batches: Any) -> Step:
        taken = train_step(run, batches)
        rise = 10.0 if run.state.step == 11 else 1.0
        return Step(taken.learning_rate, taken.loss * rise, taken.grad_norm, taken.updated)

    monkeypatch.setattr(loop, "train_step", always_at_step_11)
    with pytest.raises(FloatingPointError, match=r"step 11: the loss is .* after 2 times of going back"):
        train(prepare(**spiky))
