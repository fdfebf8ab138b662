"""Where metrics go besides `metrics.jsonl`: TensorBoard and Weights & Biases, each an extra.

A run that is resumed goes on in the same place, with no point twice, although it takes the steps since its
last checkpoint again. One that had no such place yet brings its history along. When one goes back to before a
spike, TensorBoard forgets the steps that it gives up; Weights & Biases, which cannot, shows both.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from palm_pytorch.training.logging import MEASURED, Row, Sink, read_metrics
from palm_pytorch.training.options import Rule


def sink_names(log: str | None) -> list[str]:
    """Those that the option `log` names, with commas between them, each once."""
    return list(dict.fromkeys(name.strip() for name in log.split(","))) if log else []


LOGS = Rule(
    "'tensorboard', 'wandb' or 'tensorboard,wandb'",
    lambda log: bool(log) and {*sink_names(log)} <= {"tensorboard", "wandb"},
)


def check_sinks(log: str | None) -> None:
    """Refuse what `open_sinks` could not open for want of a library.

    Raises:
        ModuleNotFoundError: the library is not installed; says which extra has it.
    """
    for name in sink_names(log):
        if find_spec(name) is None:
            raise ModuleNotFoundError(
                f"log is {log!r}, and {name} is not installed: pip install {name}", name=name
            )


def open_sinks(
    log: str | None, folder: Path, config: Mapping[str, Any], history: Sequence[Row]
) -> list[Sink]:
    """Those that `log` names, for the run in `folder` with the rows of `history` behind it.

    Raises:
        ModuleNotFoundError: as `check_sinks`.
        ConnectionError: Weights & Biases does not let this user in.
    """
    check_sinks(log)
    kinds: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    return [kinds[name](folder, config, history) for name in sink_names(log)]


def scalars(row: Row) -> Iterator[tuple[str, float]]:
    """The numbers of a row, named as `valid/loss`; an event is a 1 under its name."""
    group = row.get("split") or f"event/{row['event']}"
    if "event" in row:
        yield group, 1.0
    for name, value in row.items():
        if name != "step" and isinstance(value, int | float):
            yield f"{group}/{name}", value


class TensorBoard:
    """`RUN/tensorboard`, one folder for all of a run."""

    def __init__(self, folder: Path, config: Mapping[str, Any], history: Sequence[Row]) -> None:
        self.folder = folder / "tensorboard"
        self._open(history)

    def _open(self, history: Sequence[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # The reader drops all that was written before and is of that step or later: the last step of the
        # history too, whose rows may not all have been kept.
        files = [*self.folder.glob("events.*")]
        purged = max((row["step"] for row in history), default=0) if files else 0
        # It takes files in the order of their names, which is that of time but within a second.
        newest = max((file.stat().st_ctime for file in files), default=0.0)
        time.sleep(min(1.0, max(0.0, newest + 1 - time.time())))
        self.writer = SummaryWriter(str(self.folder), purge_step=purged)
        for row in history:
            if row["step"] >= purged:
                self.write(row)

    def write(self, row: Row) -> None:
        for name, value in scalars(row):
            self.writer.add_scalar(name, value, row["step"])

    def go_back(self, history: Sequence[Row]) -> None:
        self.close()
        self._open(history)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases under `RUN/wandb`, with the same id whenever it is resumed.

    Its own settings hold: WANDB_MODE=offline, WANDB_PROJECT (default: palm_pytorch), WANDB_ENTITY.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], history: Sequence[Row]) -> None:
        import wandb

        file = folder / "wandb" / "id.txt"
        self.sent: set[str] = set()
        identity = secrets.token_hex(8)
        if file.exists():
            identity = file.read_text(encoding="utf-8").strip()
            # What a process before this one has sent cannot be taken back, nor needs to be: the steps after
            # its last checkpoint come out the same. Its metrics file is still as it left it.
            self.sent = {lasting(row) for row in read_metrics(folder / "metrics.jsonl")}
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "palm_pytorch"),
                dir=str(folder),
                id=identity,
                name=folder.name,
                config=dict(config),
                resume="allow",
            )
        except wandb.Error as error:
            raise ConnectionError(
                f"log has 'wandb', which does not work: {error}. `wandb login` or WANDB_MODE=offline may help"
            ) from error
        file.parent.mkdir(exist_ok=True)
        file.write_text(identity + "\n", encoding="utf-8")
        # Its own count of steps, which it draws over by default, must not go back; a column of ours may.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.ahead = 0  # of ours, its count
        for row in history:
            self.write(row)

    def write(self, row: Row) -> None:
        if lasting(row) in self.sent:
            return
        if row["step"] + self.ahead < self.run.step:
            self.ahead = self.run.step + 1 - row["step"]
        self.run.log({"step": row["step"], **dict(scalars(row))}, step=row["step"] + self.ahead)

    def go_back(self, history: Sequence[Row]) -> None:
        """Nothing: the steps that were given up stay, and those in their place are drawn beside them."""

    def close(self) -> None:
        self.run.finish()


def lasting(row: Row) -> str:
    """All of a row that comes out the same when its step is taken again."""
    return json.dumps({name: value for name, value in row.items() if name not in MEASURED})
