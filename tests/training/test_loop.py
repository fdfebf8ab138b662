"""Training learns, adds slices up properly, and a stop and a resume leave no trace in what it computes."""

from __future__ import annotations

import math
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from palm_pytorch.data.windows import encode_bytes
from palm_pytorch.training import loop
from palm_pytorch.training.checkpoint import complete_checkpoints, load_checkpoint
from palm_pytorch.training.logging import read_metrics
from palm_pytorch.training.loop import Outcome, StopRequest, accumulate_gradients, quoted, train, train_step
from palm_pytorch.training.run import Run, prepare

TRAIN = Path(__file__).parents[2] / "train.py"
MODELS = ["palm", "palm-lite", "lamda", "perceiver-ar"]


def parameters(run: Run) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.state.model.parameters()])


def rows_without_time(run: Run) -> list[dict[str, Any]]:
    return [{**row, "tokens_per_second": None} for row in read_metrics(run.metrics_file)]


def test_it_learns(tiny: dict[str, Any]) -> None:
    run = prepare(**{**tiny, "dim": 32, "steps": 120, "lr": 0.02, "generate_every": 0})
    outcome = train(run)
    bits = [row["bits_per_byte"] for row in read_metrics(run.metrics_file) if row["split"] == "train"]
    assert bits[0] == pytest.approx(8, abs=1) and bits[-1] < 1.5
    assert outcome.stopped_by is None
    assert outcome.test_bits_per_byte is not None and outcome.test_bits_per_byte < 1.5


def test_what_a_run_leaves(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = prepare(**tiny)
    outcome = train(run)
    rows = read_metrics(run.metrics_file)
    assert [(row["step"], row["split"]) for row in rows] == [
        *((step, "train") for step in (1, 2, 3)),
        (3, "valid"),
        *((step, "train") for step in (4, 5, 6)),
        (6, "valid"),
        (6, "test"),
    ]
    for row in rows:
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2))
        assert row["tokens"] == row["step"] * 4 * 16 and row["tokens_per_second"] > 0
        assert ({"learning_rate", "grad_norm"} <= set(row)) == (row["split"] == "train")
    assert rows[-1]["bits_per_byte"] == outcome.test_bits_per_byte

    names = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert names - {"loss.png"} == {
        "config.json",
        "metrics.jsonl",
        *(f"samples/step-{step:08d}.txt" for step in (3, 6)),
        *(f"checkpoints/step-{step:08d}/state.pt" for step in (2, 4, 6)),
    }
    sample = (run.folder / "samples" / "step-00000003.txt").read_text(encoding="utf-8")
    assert re.match(r"---- step 3, after a text that ends in\n\| .*\n---- the model writes\n\| ", sample)
    printed = capsys.readouterr().out
    for part in (
        "0 of 6 done",
        "step 3: ",
        sample,
        f"test    {outcome.test_bits_per_byte:.4f} bits per byte",
    ):
        assert part in printed
    assert str(run.folder / "loss.png") in printed or "palm_pytorch[train]" in printed


def test_slices_of_a_step_add_up_to_the_step(tiny: dict[str, Any]) -> None:
    gradients, losses = [], []
    for batch_size, grad_accum in ((8, 1), (4, 2), (1, 8)):
        options = {"batch_size": batch_size, "grad_accum": grad_accum, "out": f"{tiny['out']}-{grad_accum}"}
        run = prepare(**{**tiny, **options})
        losses.append(accumulate_gradients(run, step=3))
        gradients.append([parameter.grad for parameter in run.state.model.parameters()])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("model", MODELS)
def test_a_stop_and_a_resume_change_nothing(model: str, tiny: dict[str, Any]) -> None:
    """Bit for bit, in float32 on the CPU, with dropout and accumulation: weights to samples."""
    options = {**tiny, "model": model, "dropout": 0.3, "grad_accum": 2}
    straight = prepare(**{**options, "out": tiny["out"] + "-straight"})
    train(straight)
    halves = prepare(**{**options, "steps": 3, "schedule_steps": 6})
    train(halves)
    torch.manual_seed(0)
    resumed = prepare(resume=tiny["out"], steps=6)
    assert resumed.state.step == 3
    train(resumed)

    assert torch.equal(parameters(resumed), parameters(straight))
    last = [load_checkpoint(complete_checkpoints(run.folder)[-1]) for run in (resumed, straight)]
    for key in ("step", "tokens", "model", "optimizer"):
        torch.testing.assert_close(last[0][key], last[1][key], rtol=0, atol=0)
    assert torch.equal(last[0]["random"]["torch"], last[1]["random"]["torch"])
    assert rows_without_time(resumed) == rows_without_time(straight)
    for sample in (straight.folder / "samples").iterdir():
        assert (resumed.folder / "samples" / sample.name).read_bytes() == sample.read_bytes()


def test_evaluations_and_samples_do_not_touch_the_training(tiny: dict[str, Any]) -> None:
    often, never = {"eval_every": 1, "generate_every": 1}, {"eval_every": 0, "generate_every": 0}
    weights = []
    for name, options in (("often", often), ("never", never)):
        run = prepare(**{**tiny, "dropout": 0.3, "out": f"{tiny['out']}-{name}", **options})
        train(run)
        weights.append(parameters(run))
    assert torch.equal(*weights)


def test_a_finished_run_that_is_resumed_is_tested_again(tiny: dict[str, Any]) -> None:
    first = train(prepare(**tiny))
    again = prepare(resume=tiny["out"])
    assert train(again) == first
    assert [row["split"] for row in read_metrics(again.metrics_file)].count("test") == 1


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(**tiny)
    before = parameters(run).clone()
    monkeypatch.setattr(loop, "window_loss", lambda model, *_: next(model.parameters()).sum() * math.nan)
    with pytest.raises(FloatingPointError, match=r"step 0: the loss is nan .* --lr"):
        train(run)
    assert torch.equal(parameters(run), before)
    assert complete_checkpoints(run.folder) == [] and read_metrics(run.metrics_file) == []


def test_without_matplotlib_the_run_ends_well(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train(prepare(**tiny)).test_bits_per_byte is not None
    assert "pip install 'palm_pytorch[train]'" in capsys.readouterr().out


def test_samples_cannot_control_the_terminal() -> None:
    assert quoted(encode_bytes("a\x1b[2Jb\n\x07\tc")) == "| a�[2Jb\n| ��c"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    number: signal.Signals,
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def step_with_signal(run: Run, step: int) -> Any:
        if step == 3:
            signal.raise_signal(number)
        return train_step(run, step)

    monkeypatch.setattr(loop, "train_step", step_with_signal)
    run = prepare(**{**tiny, "save_every": 0})
    assert train(run) == Outcome(stopped_by=number, test_bits_per_byte=None)
    assert [path.name for path in complete_checkpoints(run.folder)] == ["step-00000004"]
    assert f"resume  {run.resume_command()}\n" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_and_the_command_that_it_prints(tiny: dict[str, Any]) -> None:
    options = {**tiny, "steps": 1_000_000, "save_every": 0, "eval_every": 0, "generate_every": 0}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, str(TRAIN), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        metrics = Path(tiny["out"]) / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and len(read_metrics(metrics)) >= 3):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "SIGINT: stopping after this step" in output

    done = len(read_metrics(metrics))
    (checkpoint,) = complete_checkpoints(Path(tiny["out"]))
    assert checkpoint.name == f"step-{done:08d}"
    (command_line,) = re.findall(r"^resume  (.*)$", output, flags=re.MULTILINE)
    assert command_line == shlex.join([sys.executable, str(TRAIN), "--resume", tiny["out"]])

    resumed = subprocess.run([*shlex.split(command_line), "--steps", str(done + 2)], **pipes)
    assert resumed.returncode == 0, resumed.stdout
    steps = [row["step"] for row in read_metrics(metrics) if row["split"] == "train"]
    assert steps == list(range(1, done + 3))
