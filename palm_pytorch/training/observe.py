"""What a run does beside its steps: metrics, scores, samples, the bar, the report, the saved model."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from tqdm import tqdm

from palm_pytorch import AutoregressiveWrapper
from palm_pytorch.data.batch import IGNORED, Batch
from palm_pytorch.data.durable import sync, write_durably
from palm_pytorch.training.architecture import build_model
from palm_pytorch.training.checkpoint import Source, step_folder
from palm_pytorch.training.distributed import Parallel
from palm_pytorch.training.evaluate import autocast, bits_per_byte, bytes_per_token, evaluate
from palm_pytorch.training.faults import StopRequest
from palm_pytorch.training.flops import peak_flops, training_flops
from palm_pytorch.training.generating import visible
from palm_pytorch.training.logging import MetricsLog, read_metrics
from palm_pytorch.training.meter import Meter
from palm_pytorch.training.plot import plot_metrics
from palm_pytorch.training.run import Run
from palm_pytorch.training.state import seed_streams
from palm_pytorch.training.trained import load_model

SAMPLE_CHUNK = 32  # tokens drawn between two looks at whether to stop


def open_log(run: Run) -> MetricsLog:
    """The run's metrics, with its history behind them and all that they are sent to."""
    if not run.parallel.is_main:
        return MetricsLog(None, run.history)
    config, device = run.config, run.state.device
    with torch.device("meta"):
        model = build_model(config, run.data.num_tokens)
    peak = config.peak_flops or peak_flops(device, run.precision)
    all_peaks = None if peak is None else peak * run.parallel.world_size
    meter = Meter(device, training_flops(model, config.seq_len) / config.seq_len, all_peaks)
    per_token = bytes_per_token(run.data.held_out("valid"))
    return MetricsLog(run.metrics_file, run.history, sinks=run.sinks, meter=meter, bytes_per_token=per_token)


def score(
    run: Run, split: Literal["valid", "test"], metrics: MetricsLog, stop: StopRequest
) -> tuple[float, float]:
    """The mean loss on the fixed windows of the "valid" or "test" split, and bits per byte; adds them to the
    metrics.

    Raises:
        Stopped: a signal came meanwhile. The metrics are as before.
    """
    config = run.config
    limit = {"valid": config.eval_windows, "test": config.test_windows}[split]
    held_out = run.data.held_out(split)
    windows = len(held_out.positions(config.seq_len, limit))
    batches = held_out.batches(config.seq_len, config.batch_size, limit)
    shares = (share_of(batch, run.parallel) for batch in batches)
    started = time.perf_counter()
    seed_streams(config.seed, split, run.state.step)
    loss = evaluate(run.state.model, until_stopped(shares, stop), run.precision, run.parallel)
    speed = windows * config.seq_len / (time.perf_counter() - started)
    bits = bits_per_byte(loss, bytes_per_token(held_out))
    metrics.add(split, run.state, loss, speed, bits_per_byte=bits)
    return loss, bits


def share_of(batch: Batch, parallel: Parallel) -> Batch:
    """This process's rows of a batch. Every data rank gets as many, of which the last may not count."""
    size = len(batch.tokens)
    rows = torch.tensor(list(parallel.rows(size + -size % parallel.data_ranks)))
    mine = rows.clamp(max=size - 1)
    labels = batch.labels[mine].masked_fill((rows >= size)[:, None], IGNORED)
    documents, mask = (None if part is None else part[mine] for part in batch[2:])
    return Batch(batch.tokens[mine], labels, documents, mask)


def until_stopped(batches: Iterable[Batch], stop: StopRequest) -> Iterator[Batch]:
    for batch in batches:
        stop.check()
        yield batch


def write_sample(run: Run, stop: StopRequest) -> str:
    """How the model continues the start of the validation text, which is also kept in the run's folder.

    It depends on weights, seed and step alone.

    Raises:
        Stopped: a signal came meanwhile. Nothing is written.
    """
    config, state = run.config, run.state
    prompt = torch.tensor(run.data.held_out("valid").tokens[: config.prompt_len].astype("int64"))
    text = prompt[None].to(state.device)
    seed_streams(config.seed, "sample", state.step)
    with autocast(run.precision, state.device):
        writer = AutoregressiveWrapper(state.model, max_seq_len=config.seq_len)
        for done in range(0, config.generate_length, SAMPLE_CHUNK):
            stop.check()
            length = min(SAMPLE_CHUNK, config.generate_length - done)
            text = torch.cat([text, writer.generate(text, length)], dim=1)
    written = text[0, len(prompt) :].cpu()
    decode = run.data.tokenizer.decode
    told = (
        f"---- step {state.step:,}, after a text that ends in\n{quoted(decode(prompt[-100:]))}\n"
        f"---- the model writes\n{quoted(decode(written))}\n----"
    )
    if run.parallel.is_main:
        file = run.folder / "samples" / f"step-{state.step:08d}.txt"
        file.parent.mkdir(exist_ok=True)
        write_durably(file, told + "\n")
    return told


def quoted(text: str) -> str:
    """Indented text."""
    return textwrap.indent(visible(text), "| ", lambda line: True)


def progress_bar(run: Run) -> Any:
    """A bar over the steps, drawn often on a terminal and seldom into a log."""
    seconds = 0.2 if sys.stderr.isatty() else 30
    steps = {"total": run.config.steps, "initial": run.state.step, "unit": "step"}
    hidden = not run.parallel.is_main
    return tqdm(**steps, dynamic_ncols=True, mininterval=seconds, maxinterval=seconds, disable=hidden)


def report(run: Run, test_bits: float | None) -> str:
    """How training ended and where its results are. Draws the plot that is one of them."""
    plot = run.folder / "loss.png"
    try:
        rows = read_metrics(run.metrics_file)
        plot_metrics({f"{run.config.model} on {run.data.name}": rows}, plot)
        drawn = str(plot)
    except Exception as error:  # what was trained is not lost for want of a picture
        drawn = f"not drawn: {error}"
    if test_bits is None:
        ending = f"resume  {run.resume_command()}"
    else:
        ending = f"model   {run.folder / 'model'}\ntest    {test_bits:.4f} bits per {run.data.tokenizer.unit}"
    done = f"{run.state.step:,} steps in {run.state.seconds:,.0f} s"
    return f"run     {run.folder}: {done}\nplot    {drawn}\n{ending}"


def export_model(run: Run) -> None:
    """Save the run's best model by validation, else its last, in RUN/model, to be shared: no pickle in it."""
    if not run.parallel.is_main:
        return
    state = run.state
    steps = [state.step] if state.best_step is None else [state.step, state.best_step]
    folder = Source(run.folder, [step_folder(run.folder, step) for step in steps]).undamaged()
    model = load_model(folder, run.config, run.data.num_tokens)
    partial, final = run.folder / ".partial-model", run.folder / "model"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, tokenizer=run.data.tokenizer)
    for path in partial.iterdir():
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(run.folder)
