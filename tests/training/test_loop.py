"""Training learns, adds slices up properly, and a stop and a resume leave no trace in what it computes."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from palm_pytorch import from_pretrained
from palm_pytorch.cli import train_command
from palm_pytorch.data.batch import IGNORED, Batch
from palm_pytorch.training import loop, observe, saver
from palm_pytorch.training.checkpoint import complete_checkpoints, load_weights
from palm_pytorch.training.distributed import Parallel
from palm_pytorch.training.faults import Stopped
from palm_pytorch.training.logging import MEASURED, MetricsLog, read_metrics
from palm_pytorch.training.loop import Outcome, train
from palm_pytorch.training.observe import quoted
from palm_pytorch.training.run import Run, build_model, prepare
from palm_pytorch.training.state import seed_streams
from palm_pytorch.training.step import accumulate_gradients, train_step
from palm_pytorch.training.trained import run_checkpoint

TRAIN = Path(__file__).parents[2] / "train.py"
CHECKPOINT = (".metadata", "__0_0.distcp", "manifest.json", "state.json")
MODELS = ["palm", "palm-lite", "lamda", "perceiver-ar"]


def parameters(run: Run) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.state.model.parameters()])


def rows_that_remain(run: Run) -> list[dict[str, Any]]:
    """The run's metrics but what it measured, and where it was resumed."""
    rows = [row for row in read_metrics(run.metrics_file) if row.get("event") != "resume"]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


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
        ".lock",
        *(f"model/{name}" for name in ("config.json", "model.safetensors")),
        *(f"checkpoints/step-{n:08d}/{name}" for n in (3, 4, 6) for name in CHECKPOINT),
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
    assert str(run.folder / "loss.png") in printed or "pip install matplotlib" in printed


def slices_of(run: Run, index: int) -> list[Batch]:
    """Those of a step, without a loader."""
    size, seed = run.config.batch_size, run.config.seed
    parts = (range(part * size, (part + 1) * size) for part in range(run.config.grad_accum))
    return [run.data.batch(seed=seed, index=index, rows=rows) for rows in parts]


def test_slices_of_a_step_add_up_to_the_step(tiny: dict[str, Any]) -> None:
    gradients, losses = [], []
    for batch_size, grad_accum in ((8, 1), (4, 2), (1, 8)):
        options = {"batch_size": batch_size, "grad_accum": grad_accum, "out": f"{tiny['out']}-{grad_accum}"}
        run = prepare(**{**tiny, **options})
        losses.append(accumulate_gradients(run, slices_of(run, 3)))
        gradients.append([parameter.grad for parameter in run.state.model.parameters()])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("model", ["palm", "perceiver-ar"])
def test_every_label_that_counts_weighs_as_much_as_any_other(model: str, tiny: dict[str, Any]) -> None:
    """Slices with few labels, or none, against the mean over all labels at once."""
    run = prepare(**{**tiny, "model": model, "batch_size": 2, "grad_accum": 3})
    tokens, labels = torch.randint(256, (2, 6, 16), generator=torch.Generator().manual_seed(3))
    labels[0, 1:] = labels[2:4] = labels[5, :9] = IGNORED
    parts = [Batch(tokens[at : at + 2], labels[at : at + 2]) for at in (0, 2, 4)]
    mean = accumulate_gradients(run, parts)
    ours = [p.grad.clone() for p in run.state.model.parameters() if p.grad is not None]
    run.state.optimizer.zero_grad()
    expected = run.state.model(tokens, labels=labels)
    expected.backward()
    assert mean == pytest.approx(expected.item(), rel=1e-6)
    theirs = [p.grad for p in run.state.model.parameters() if p.grad is not None]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def assert_same(run: Run, other: Run) -> None:
    """Bit for bit: weights, optimizer, numbers, metrics, samples, the saved model."""
    torch.testing.assert_close(run.state.tensors(), other.state.tensors(), rtol=0, atol=0)
    numbers = [each.state.numbers() | {"seconds": 0, "metrics_rows": 0} for each in (run, other)]
    assert numbers[0] == numbers[1]
    assert rows_that_remain(run) == rows_that_remain(other)
    for sample in (other.folder / "samples").iterdir():
        assert (run.folder / "samples" / sample.name).read_bytes() == sample.read_bytes()
    models = [load_file(each.folder / "model" / "model.safetensors") for each in (run, other)]
    torch.testing.assert_close(*models, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "precision"), [*((model, "float32") for model in MODELS), ("palm", "bfloat16")]
)
def test_a_stop_and_a_resume_change_nothing(
    model: str, precision: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, with dropout, slices, and batches read by none or two processes."""
    options = {**tiny, "model": model, "precision": precision, "dropout": 0.3, "grad_accum": 2}
    options["num_workers"] = 0
    if model == "perceiver-ar":
        options["cross_attn_dropout"] = 0.4
    straight = prepare(**{**options, "out": tiny["out"] + "-straight"})
    train(straight)
    stop_in_step(2, signal.SIGTERM, monkeypatch)
    stopped = prepare(**{**options, "num_workers": 2})
    assert train(stopped).stopped_by == signal.SIGTERM
    monkeypatch.undo()
    torch.manual_seed(0)
    resumed = prepare(resume=tiny["out"])
    assert (resumed.state.step, resumed.config.num_workers) == (3, 2)
    train(resumed)
    assert_same(resumed, straight)


@pytest.mark.parametrize("doing", ["valid", "sample", "test"])
def test_a_stop_while_scoring_or_sampling_changes_nothing(
    doing: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was cut short is done first when the run goes on."""
    options = {**tiny, "eval_windows": 12, "test_windows": 12}
    straight = prepare(**{**options, "out": tiny["out"] + "-straight"})
    train(straight)

    def seed_and_stop(seed: int, *names: Any) -> None:
        seed_streams(seed, *names)
        if names[0] == doing:
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(observe, "seed_streams", seed_and_stop)
    stopped = prepare(**options)
    assert train(stopped) == Outcome(signal.SIGUSR1, None)
    assert stopped.state.step == (6 if doing == "test" else 3)
    assert stopped.state.due == {"valid": ["valid", "sample"], "sample": ["sample"], "test": []}[doing]
    assert not (stopped.folder / "model").exists()
    monkeypatch.undo()
    resumed = prepare(resume=tiny["out"])
    train(resumed)
    assert_same(resumed, straight)


def test_a_best_score_that_a_stop_cut_short_is_found(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint was written before it was made up for, and RUN/best was the one before."""
    losses = iter([3.0, None, 2.0, 2.5])  # after 3 steps, 6, 6 again, and of the test

    def scored(run: Run, split: str, metrics: MetricsLog, stop: Any) -> tuple[float, float]:
        if (loss := next(losses)) is None:
            signal.raise_signal(signal.SIGTERM)
            raise Stopped
        metrics.add(split, run.state, loss, 1.0)
        return loss, 8.0

    monkeypatch.setattr(loop, "score", scored)
    train(prepare(**tiny))
    assert run_checkpoint(f"{tiny['out']}/best").name == "step-00000003"
    train(prepare(resume=tiny["out"]))
    assert run_checkpoint(f"{tiny['out']}/best").name == "step-00000006"


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
    assert [row.get("split") for row in read_metrics(again.metrics_file)].count("test") == 1


def test_without_matplotlib_the_run_ends_well(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train(prepare(**tiny)).test_bits_per_byte is not None
    assert "pip install matplotlib" in capsys.readouterr().out


def test_samples_cannot_control_the_terminal() -> None:
    assert quoted("a\x1b[2Jb\n\x07\tc") == "| a�[2Jb\n| �\tc"


def stop_in_step(step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a signal come while the step after `step` others is taken."""

    def step_with_signal(run: Run, batches: Any) -> Any:
        if run.state.step == step:
            signal.raise_signal(number)
        return train_step(run, batches)

    monkeypatch.setattr(loop, "train_step", step_with_signal)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    number: signal.Signals,
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_in_step(3, number, monkeypatch)
    run = prepare(**{**tiny, "save_every": 0, "eval_every": 0})
    assert train(run) == Outcome(stopped_by=number, test_bits_per_byte=None)
    assert [path.name for path in complete_checkpoints(run.folder)] == ["step-00000004"]
    assert f"resume  {run.resume_command()}\n" in capsys.readouterr().out


def test_a_second_ctrl_c_stops_at_once(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def two_signals(run: Run, batches: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "train_step", two_signals)
    run = prepare(**{**tiny, "num_workers": 2})
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert complete_checkpoints(run.folder) == [] and multiprocessing.active_children() == []


def test_the_best_by_validation_is_kept_and_exported(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.25, 4.0, 4.0, 1.0])

    def scored(run: Run, split: str, *_: Any) -> tuple[float, float]:
        return next(losses), 8.0

    monkeypatch.setattr(loop, "score", scored)
    run = prepare(**{**tiny, "eval_every": 1, "save_every": 0, "keep": 1, "generate_every": 0})
    train(run)
    assert [path.name for path in complete_checkpoints(run.folder)] == ["step-00000002", "step-00000006"]
    assert (run.state.best_step, run.state.best_loss) == (2, 2.0)
    best = build_model(run.config, 256)
    load_weights(complete_checkpoints(run.folder)[0], best)
    exported = from_pretrained(run.folder / "model").state_dict()
    torch.testing.assert_close(exported, best.state_dict(), rtol=0, atol=0)


def test_a_best_that_is_damaged_is_not_exported_without_a_word(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(run: Run) -> None:
        (complete_checkpoints(run.folder)[0] / "state.json").write_text("{}")
        export(run)

    losses, export = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]), loop.export_model
    monkeypatch.setattr(loop, "score", lambda *_: (next(losses), 8.0))
    monkeypatch.setattr(loop, "export_model", damage)
    run = prepare(**{**tiny, "eval_every": 1, "generate_every": 0})
    with pytest.warns(UserWarning, match=r"step-00000001.*damaged"):
        train(run)
    exported = from_pretrained(run.folder / "model").state_dict()
    last = build_model(run.config, 256)
    load_weights(complete_checkpoints(run.folder)[-1], last)
    torch.testing.assert_close(exported, last.state_dict(), rtol=0, atol=0)


def test_a_score_that_is_no_number_is_not_the_best(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other was below it, and so the best stayed that of the first validation."""
    losses = iter([math.nan, 3.0, 2.0, math.nan, math.inf, 2.5, 1.0])

    def scored(run: Run, split: str, *_: Any) -> tuple[float, float]:
        return next(losses), 8.0

    monkeypatch.setattr(loop, "score", scored)
    run = prepare(**{**tiny, "eval_every": 1, "save_every": 0, "keep": 1, "generate_every": 0})
    train(run)
    assert (run.state.best_step, run.state.best_loss) == (3, 2.0)
    assert [path.name for path in complete_checkpoints(run.folder)] == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize(
    ("error", "status"), [(FloatingPointError, 3), (KeyboardInterrupt, None), (ZeroDivisionError, None)]
)
def test_the_model_is_gone_before_the_process_group_whatever_ends_a_run(
    error: type[BaseException], status: int | None, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frames of a traceback hold on to it, and processes of FSDP and DDP sometimes abort then."""
    seen, alive, stop = [], [], Parallel.stop

    def fail(run: Run, batches: Any) -> None:
        model = run.state.model
        seen.extend(map(weakref.ref, [model, run.state.optimizer, *model.parameters()]))
        raise error

    def stop_and_look(parallel: Parallel) -> None:
        gc.collect()
        alive.append([each() is not None for each in seen])
        stop(parallel)

    monkeypatch.setattr(loop, "train_step", fail)
    monkeypatch.setattr(Parallel, "stop", stop_and_look)
    if status is None:
        with pytest.raises(error):
            train_command(**tiny)
    else:
        assert train_command(**tiny) == status
    assert len(seen) > 3 and alive == [[False] * len(seen)]


def test_a_checkpoint_that_fails_does_not_end_the_run(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = saver.write_tensors

    def fail_at_step_two(tensors: Any, partial: Path, group: Any) -> None:
        if partial.name.endswith("2"):
            raise OSError(28, "No space left on device")
        write(tensors, partial, group)

    monkeypatch.setattr(saver, "write_tensors", fail_at_step_two)
    run = prepare(**{**tiny, "eval_every": 0})
    assert train(run).test_bits_per_byte is not None
    assert [path.name[-1] for path in complete_checkpoints(run.folder)] == ["4", "6"]
    (event,) = [row for row in read_metrics(run.metrics_file) if row.get("event") == "checkpoint-failed"]
    assert "No space left" in event["error"] and event["step"] == 4
    assert "No space left" in capsys.readouterr().out


def test_a_last_checkpoint_that_fails_is_an_error(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: Any, partial: Path, group: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "write_tensors", fail)
    run = prepare(**{**tiny, "eval_every": 0, "save_every": 0})
    with pytest.raises(OSError, match="No space left"):
        train(run)
    assert not (run.folder / "model").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_and_the_command_that_it_prints(tiny: dict[str, Any]) -> None:
    options = {**tiny, "steps": 1_000_000, "save_every": 0, "eval_every": 0, "generate_every": 0}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    python = os.path.abspath(sys.executable)  # as a process of its own names it
    command = [python, str(TRAIN), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        metrics = Path(tiny["out"]) / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and len(read_metrics(metrics)) >= 3):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "SIGINT: saving after this step" in output

    done = len(read_metrics(metrics))
    (checkpoint,) = complete_checkpoints(Path(tiny["out"]))
    assert checkpoint.name == f"step-{done:08d}"
    (command_line,) = re.findall(r"^resume  (.*)$", output, flags=re.MULTILINE)
    assert command_line == shlex.join([python, str(TRAIN), "--resume", tiny["out"]])

    resumed = subprocess.run([*shlex.split(command_line), "--steps", str(done + 2)], **pipes)
    assert resumed.returncode == 0, resumed.stdout
    steps = [row["step"] for row in read_metrics(metrics) if row.get("split") == "train"]
    assert steps == list(range(1, done + 3))
