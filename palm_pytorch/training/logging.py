"""A run's metrics: one JSON object a line in `metrics.jsonl`, and to what else they are sent.

A row has `step` (optimizer steps done), `split` ("train", "valid" or "test"), `loss` (nats per predicted
token), `bits_per_byte`, `tokens` (input tokens that training has read so far; Perceiver AR's prefix counts,
though it is not predicted), `seconds` (that its steps took) and `tokens_per_second` (read in this row's step
or evaluation). A row of "train" is of one step, its loss with the z-loss if there is one, and has
`learning_rate`, `grad_norm` (before clipping), `memory_bytes` and, where the device's rate is known, `mfu`
too. What is no finite number is null.

What happened otherwise has a row with `event` in place of `split`: "skip", "rollback", "resume",
"checkpoint-damaged", "checkpoint-failed", "spike" (with no checkpoint to go back to).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from palm_pytorch.data.durable import write_durably
from palm_pytorch.training.evaluate import bits_per_byte
from palm_pytorch.training.meter import Meter

Row = dict[str, Any]

# Of the machine and the hour: all else in a row is a function of the run's options and its data.
MEASURED = ("seconds", "tokens_per_second", "memory_bytes", "mfu")


class Progress(Protocol):
    """The part of `TrainState` that every row tells."""

    step: int
    tokens: int
    seconds: float


class Sink(Protocol):
    """Something else that is sent every new row; `go_back` is as of `MetricsLog`."""

    def write(self, row: Row) -> None: ...

    def go_back(self, history: Sequence[Row]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """A run's metrics file, opened with the rows of `history` and then added to; `rows` counts them all.

    path: None keeps no file, as of processes other than the main one.
    sinks: what else gets each new row; they are closed with the file.
    meter: adds to each row of "train" what the step took of the machine.
    bytes_per_token: of text, for `bits_per_byte`; a row can be given its own `bits_per_byte`.
    """

    def __init__(
        self,
        path: Path | None,
        history: Sequence[Row] = (),
        *,
        sinks: Sequence[Sink] = (),
        meter: Meter | None = None,
        bytes_per_token: float = 1.0,
    ) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._sinks, self._meter, self._bytes_per_token = sinks, meter, bytes_per_token
        self._begin(history)

    def _begin(self, history: Sequence[Row]) -> None:
        self.rows = len(history)
        if self._path is not None:
            # A process that is killed here, or a machine that fails, leaves the old file whole.
            text = "".join(json.dumps(row) + "\n" for row in history)
            write_durably(self._path, text)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115, see close

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            sink.close()

    def go_back(self, history: Sequence[Row]) -> None:
        """The rows are those of `history` again, and others come in the place of the later ones."""
        if self._file is not None:
            self._file.close()
        self._begin(history)
        for sink in self._sinks:
            sink.go_back(history)

    def add(self, split: str, state: Progress, loss: float, tokens_per_second: float, **more: float) -> None:
        """Write the row of a `loss` at `state`, and hand it to the operating system at once."""
        bits = self.bits_per_byte(loss)
        row = {"step": state.step, "split": split, "loss": loss, "bits_per_byte": bits}
        row |= {"tokens": state.tokens, "seconds": round(state.seconds, 3)}
        row |= {"tokens_per_second": round(tokens_per_second, 1)}
        if split == "train" and self._meter is not None:
            row |= self._meter.read(tokens_per_second)
        self._write(row | more)

    def bits_per_byte(self, loss: float) -> float:
        return bits_per_byte(loss, self._bytes_per_token)

    def event(self, kind: str, state: Progress, **more: Any) -> None:
        """Write that something happened at `state`, with what is to be known of it."""
        self._write({"step": state.step, "event": kind, "tokens": state.tokens, **more})

    def _write(self, row: Row) -> None:
        row = finite(row)
        self.rows += 1
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        for sink in self._sinks:
            sink.write(row)


def finite(row: Row) -> Row:
    """The row with None for what is no finite number, of which JSON has none."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def read_metrics(path: Path, most: int | None = None) -> list[Row]:
    """The rows of a metrics file, without a last line that a killed process did not finish; none of no file.

    most: how many are wanted, of the first; what comes after them is not looked at.

    Raises:
        ValueError: a line is no JSON.
    """
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:most], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is no JSON: {line[:80]!r}") from error
    return rows
