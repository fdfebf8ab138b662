"""The training loop."""

from __future__ import annotations

import math
import os
import signal
import sys
import textwrap
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from palm_pytorch import AutoregressiveWrapper
from palm_pytorch.data.windows import batches, decode_bytes, eval_windows, train_batch
from palm_pytorch.training.checkpoint import save_checkpoint
from palm_pytorch.training.evaluate import autocast, bits_per_byte, evaluate, window_loss
from palm_pytorch.training.logging import MetricsLog, plot_metrics, read_metrics
from palm_pytorch.training.optim import clip_gradients, learning_rate, set_learning_rate
from palm_pytorch.training.run import Run


@dataclass(frozen=True)
class Outcome:
    """How training ended: stopped by a signal, or with a score on the test split."""

    stopped_by: signal.Signals | None
    test_bits_per_byte: float | None


def train(run: Run) -> Outcome:
    """Train to the last of `config.steps`; SIGINT or SIGTERM end it sooner, after the step under way.

    Raises:
        FloatingPointError: the loss or its gradient is not finite. The weights have not been updated with it.
        KeyboardInterrupt: a second signal came before the first was obeyed.
    """
    config, state = run.config, run.state
    print(run)
    with MetricsLog(run.metrics_file, run.history) as metrics:
        with StopRequest() as stop, progress_bar(run) as bar:
            for step in range(state.step, config.steps):
                started = time.perf_counter()
                rate, loss, norm = train_step(run, step)
                seconds = time.perf_counter() - started

                state.advance(config.tokens_per_step, seconds)
                speed = config.tokens_per_step / seconds
                metrics.add("train", state, loss, speed, learning_rate=rate, grad_norm=norm)
                bar.set_postfix_str(
                    f"loss {loss:.3f}, bpb {bits_per_byte(loss):.3f}, {speed:,.0f} tokens/s", False
                )
                bar.update()

                last = state.step == config.steps
                if last or is_due(config.eval_every, state.step):
                    bits = score(run, "valid", metrics)
                    bar.write(f"step {state.step:,}: {bits:.4f} bits per byte of validation text")
                if is_due(config.generate_every, state.step):
                    bar.write(write_sample(run))
                stopping = stop.signal is not None
                if last or stopping or is_due(config.save_every, state.step):
                    save_checkpoint(state, run.folder, keep=config.keep)
                if stopping:
                    break
        outcome = Outcome(stop.signal, None if stop.signal else score(run, "test", metrics))
    print(report(run, outcome))
    return outcome


def train_step(run: Run, step: int) -> tuple[float, float, float]:
    """One optimizer step: its learning rate, its loss, and the norm of its gradient before clipping."""
    config, state = run.config, run.state
    rate = learning_rate(
        step,
        peak=config.lr,
        floor=config.min_lr,
        warmup_steps=config.warmup_steps,
        total_steps=config.schedule_steps,
    )
    set_learning_rate(state.optimizer, rate)
    loss = accumulate_gradients(run, step)
    norm = clip_gradients(state.model.parameters(), config.grad_clip).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"step {step}: the loss is {loss} and the norm of its gradient {norm}. A lower --lr, more "
            f"--warmup-steps or --precision float32 may help. The checkpoints in {run.folder} are from before"
        )
    state.optimizer.step()
    state.optimizer.zero_grad()
    return rate, loss, norm


def accumulate_gradients(run: Run, step: int) -> float:
    """Leave in the parameters the gradient of the mean loss over all slices of a step; returns that loss."""
    config, model, device = run.config, run.state.model, run.state.device
    model.train()
    mean = torch.zeros((), device=device)
    for part in range(config.grad_accum):
        rows = range(part * config.batch_size, (part + 1) * config.batch_size)
        windows = train_batch(
            run.splits.train, seq_len=config.seq_len, seed=config.seed, step=step, rows=rows
        )
        loss = window_loss(model, windows.to(device), run.precision) / config.grad_accum
        loss.backward()
        mean += loss.detach()
    return mean.item()


def is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


class StopRequest:
    """While entered, a first SIGINT or SIGTERM is kept in `signal`, and a second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> StopRequest:
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        # Not by print, in the middle of which the signal may have come.
        os.write(2, f"\n{self.signal.name}: stopping after this step; once more stops at once\n".encode())


def score(run: Run, split: str, metrics: MetricsLog) -> float:
    """Bits per byte on the fixed windows of the "valid" or "test" split; adds them to the metrics."""
    config = run.config
    tokens, limit = {
        "valid": (run.splits.valid, config.eval_windows),
        "test": (run.splits.test, config.test_windows),
    }[split]
    windows = eval_windows(tokens, seq_len=config.seq_len, max_windows=limit)
    started = time.perf_counter()
    loss = evaluate(run.state.model, batches(windows, config.batch_size), run.precision)
    speed = len(windows) * config.seq_len / (time.perf_counter() - started)
    metrics.add(split, run.state, loss, speed)
    return bits_per_byte(loss)


def write_sample(run: Run) -> str:
    """How the model continues the start of the validation text, which is also kept in the run's folder.

    It depends on weights, seed and step alone, and leaves the random streams as they are.
    """
    config, state = run.config, run.state
    prompt = torch.tensor(run.splits.valid[: config.prompt_len], dtype=torch.long)
    gpus = [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), autocast(run.precision, state.device):
        torch.manual_seed(config.seed + state.step)
        writer = AutoregressiveWrapper(state.model, max_seq_len=config.seq_len)
        written = writer.generate(prompt[None].to(state.device), config.generate_length)[0].cpu()
    text = (
        f"---- step {state.step:,}, after a text that ends in\n{quoted(prompt[-100:])}\n"
        f"---- the model writes\n{quoted(written)}\n----"
    )
    file = run.folder / "samples" / f"step-{state.step:08d}.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")
    return text


def quoted(tokens: torch.Tensor) -> str:
    """Bytes as indented text. An untrained model writes control characters, which a terminal would obey."""
    text = decode_bytes(tokens)
    shown = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return textwrap.indent(shown, "| ", lambda line: True)


def progress_bar(run: Run) -> Any:
    """A bar over the steps, drawn often on a terminal and seldom into a log."""
    seconds = 0.2 if sys.stderr.isatty() else 30
    steps = {"total": run.config.steps, "initial": run.state.step, "unit": "step"}
    return tqdm(**steps, dynamic_ncols=True, mininterval=seconds, maxinterval=seconds)


def report(run: Run, outcome: Outcome) -> str:
    """How training ended and where its results are. Draws the plot that is one of them."""
    plot = run.folder / "loss.png"
    try:
        plot_metrics(read_metrics(run.metrics_file), plot, title=f"{run.config.model} on {run.corpus.name}")
        drawn = str(plot)
    except ModuleNotFoundError as error:
        drawn = f"not drawn ({error}): pip install 'palm_pytorch[train]'"
    if outcome.test_bits_per_byte is None:
        ending = f"resume  {run.resume_command()}"
    else:
        ending = f"test    {outcome.test_bits_per_byte:.4f} bits per byte"
    done = f"{run.state.step:,} steps in {run.state.seconds:,.0f} s"
    return f"run     {run.folder}: {done}\nplot    {drawn}\n{ending}"
