"""The training loop."""

from __future__ import annotations

import math
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from palm_pytorch.training.checkpoint import Source, complete_checkpoints, step_of
from palm_pytorch.training.faults import (
    MOST_ROLLBACKS,
    MOST_SKIPPED_STEPS,
    SPIKE_WINDOW,
    Stopped,
    StopRequest,
    is_spike,
)
from palm_pytorch.training.loader import Loader
from palm_pytorch.training.logging import MetricsLog, read_metrics
from palm_pytorch.training.manifest import DamagedError
from palm_pytorch.training.observe import (
    export_model,
    open_log,
    progress_bar,
    report,
    score,
    write_sample,
)
from palm_pytorch.training.run import Run
from palm_pytorch.training.schedule import batch_size_at, batches_at
from palm_pytorch.training.state import next_batch, seed_step
from palm_pytorch.training.step import Step, train_step


@dataclass(frozen=True)
class Outcome:
    """How training ended: stopped by a signal, or with a score on the test split."""

    stopped_by: signal.Signals | None
    test_bits_per_byte: float | None


def train(run: Run) -> Outcome:
    """Train to the last of `config.steps`; a signal ends it sooner, with a checkpoint after the step it met.

    Raises:
        FloatingPointError: loss or gradient were not finite, or too high, too often.
        OSError: nothing can be written any more; what was written stays.
        KeyboardInterrupt: Ctrl-C came after a first signal.
    """
    run.say(str(run))
    with (
        StopRequest(run.parallel) as stop,
        progress_bar(run) as bar,
        open_log(run) as metrics,
        Loader(run.data, run.config, run.parallel) as loader,
    ):
        try:
            return Trainer(run, stop, bar, metrics, loader).train()
        except Exception:
            run.saver.finish()
            raise


@dataclass
class Trainer:
    """A run under way: what it reads from and writes to."""

    run: Run
    stop: StopRequest
    bar: Any
    metrics: MetricsLog
    loader: Loader

    def train(self) -> Outcome:
        run, state = self.run, self.run.state
        for kind, details in run.events:
            self.metrics.event(kind, state, **details)
        self.loader.seek(state)
        while True:
            stopping = self.follow_up()
            last = state.step == run.config.steps
            if last or stopping or self.save_is_due():
                self.save()
            if last or stopping:
                break
            self.take_step()
        self.settle(run.saver.wait(), last=True)
        bits = None
        if not stopping:
            try:
                _, bits = score(run, "test", self.metrics, self.stop)
                export_model(run)
            except Stopped:
                pass
        if run.parallel.is_main:
            self.bar.close()
            print(report(run, bits))
        return Outcome(None if bits is not None else self.stop.agreed(), bits)

    def take_step(self) -> None:
        """One step of the run, or the way back from a spike."""
        run, config, state = self.run, self.run.config, self.run.state
        started = time.perf_counter()
        batches = self.loader.read()
        seed_step(config.seed, state.step, run.parallel.data_rank)
        step = train_step(run, batches)
        seconds = time.perf_counter() - started

        if is_spike(step.loss, state.recent_losses, config.spike_factor) and self.roll_back(step.loss):
            return
        tokens = batch_size_at(state.step, config) * config.seq_len
        state.advance(tokens, seconds, batches_at(state.step, config))
        speed = tokens / seconds
        if step.updated:
            state.skipped_in_a_row = 0
            if config.spike_factor:
                state.recent_losses = [*state.recent_losses, step.loss][-SPIKE_WINDOW:]
            self.metrics.add(
                "train", state, step.loss, speed, learning_rate=step.learning_rate, grad_norm=step.grad_norm
            )
        else:
            self.skip(step)
        last = state.step == config.steps
        if last or is_due(config.eval_every, state.step):
            state.due.append("valid")
        if config.generate_every and (last or is_due(config.generate_every, state.step)):
            state.due.append("sample")
        bits = self.metrics.bits_per_byte(step.loss)
        told = f"loss {step.loss:.3f}, bpb {bits:.3f}, {speed:,.0f} tokens/s"
        self.bar.set_postfix_str(told, False)
        self.bar.update()

    def skip(self, step: Step) -> None:
        """Count a step without an update; give up after too many in a row."""
        state = self.run.state
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        # As text, which tells infinite from undefined.
        self.metrics.event("skip", state, loss=str(step.loss), grad_norm=str(step.grad_norm))
        if state.skipped_in_a_row >= MOST_SKIPPED_STEPS:
            raise FloatingPointError(
                f"step {state.step}: the loss is {step.loss} and the norm of its gradient {step.grad_norm}; "
                f"of {state.skipped_in_a_row} steps in a row none could be taken. A lower --lr, more "
                "--warmup-steps or --precision float32 may help. The checkpoints in "
                f"{self.run.folder} are from before"
            )

    def follow_up(self) -> bool:
        """Score and sample as is due; returns whether the run is to stop, which cuts them short."""
        run, state = self.run, self.run.state
        try:
            while state.due:
                self.stop.check()
                if state.due[0] == "valid":
                    loss, bits = score(run, "valid", self.metrics, self.stop)
                    if math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss):
                        state.best_step, state.best_loss = state.step, loss
                    unit = run.data.tokenizer.unit
                    self.tell(f"step {state.step:,}: {bits:.4f} bits per {unit} of validation data")
                else:
                    self.tell(write_sample(run, self.stop))
                state.due.pop(0)
        except Stopped:
            return True
        return self.stop.agreed() is not None

    def save_is_due(self) -> bool:
        state = self.run.state
        return state.step > 0 and (
            is_due(self.run.config.save_every, state.step) or state.best_step == state.step
        )

    def save(self) -> None:
        """Begin a checkpoint, in the background."""
        self.run.state.metrics_rows = self.metrics.rows
        self.settle(self.run.saver.save(self.run.state))

    def settle(self, failure: OSError | None, *, last: bool = False) -> None:
        """Tell of a checkpoint that could not be written; the run goes on, unless it was the last."""
        if failure is None:
            return
        self.metrics.event("checkpoint-failed", self.run.state, error=str(failure))
        if last:
            raise failure
        self.tell(f"{failure}\nThe run goes on; the checkpoints before are as they were")

    def roll_back(self, loss: float) -> bool:
        """Go back to before a spike, and pass over the batches around it (PaLM, section 5.1).

        Returns whether there was a checkpoint to go back to. The rows since then leave the metrics, and the
        later checkpoints the folder: the run is now one that never took these steps.
        """
        run, config, state = self.run, self.run.config, self.run.state
        if state.rollbacks >= MOST_ROLLBACKS:
            raise FloatingPointError(
                f"step {state.step}: the loss is {loss}, above spike_factor={config.spike_factor} times the "
                f"median before, after {state.rollbacks} times of going back; a lower --lr may help"
            )
        self.settle(run.saver.wait())
        folder = None
        if run.parallel.is_main:
            before = state.step - config.spike_rewind
            early = [path for path in complete_checkpoints(run.folder) if step_of(path) <= before]
            with suppress(DamagedError):
                folder, _ = Source(run.folder, early).choose()
        folder = run.parallel.from_main(folder)
        details: dict[str, Any] = {"spike_step": state.step + 1, "spike_loss": loss}
        told = f"step {state.step + 1:,}: the loss is {loss:.3f}"
        if folder is None:
            self.metrics.event("spike", state, **details)
            self.tell(f"{told}, and no checkpoint is old enough to go back to")
            return False
        batches = batches_at(state.step, config)  # in a step
        first = max(0, state.batch_index - config.spike_rewind * batches)
        passed_over = [*state.passed_over, [first, first + config.spike_skip * batches]]
        rollbacks = state.rollbacks + 1
        run.saver.load(folder, state)
        state.rollbacks, state.passed_over = rollbacks, passed_over
        state.batch_index = next_batch(state.batch_index, passed_over)
        run.saver.remove_after(state.step)

        self.metrics.go_back(read_metrics(run.metrics_file, state.metrics_rows))
        self.metrics.event("rollback", state, **details, passed_over=passed_over[-1])
        self.loader.seek(state)
        self.tell(f"{told}; back to step {state.step:,}")
        self.bar.n = state.step
        self.bar.refresh()
        return True

    def tell(self, text: str) -> None:
        """Print above the progress bar, once for all processes."""
        if self.run.parallel.is_main:
            self.bar.write(text)


def is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
