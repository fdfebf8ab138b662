"""A run's metrics: one JSON object a line in `metrics.jsonl`, and their plot.

Every row has `step` (optimizer steps done), `split` ("train", "valid" or "test"), `loss` (nats per predicted
token), `bits_per_byte`, `tokens` (input tokens that training has read so far; Perceiver AR's prefix counts,
though it is not predicted) and `tokens_per_second` (read in this row's step or evaluation). A row of "train"
is of one step, and has `learning_rate` and, before clipping, `grad_norm` too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palm_pytorch.training.checkpoint import TrainState
from palm_pytorch.training.evaluate import bits_per_byte

Row = dict[str, Any]


class MetricsLog:
    """A run's metrics file, opened with the rows of `history` and then added to."""

    def __init__(self, path: Path, history: Sequence[Row] = ()) -> None:
        partial = path.with_suffix(".partial")  # a process killed here leaves the old file whole
        partial.write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
        self._file = open(partial.replace(path), "a", encoding="utf-8")  # noqa: SIM115, see __exit__

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(
        self, split: str, state: TrainState, loss: float, tokens_per_second: float, **more: float
    ) -> None:
        """Write the row of a `loss` at `state`, and hand it to the operating system at once."""
        row = {"step": state.step, "split": split, "loss": loss, "bits_per_byte": bits_per_byte(loss)}
        row |= {"tokens": state.tokens, "tokens_per_second": round(tokens_per_second, 1), **more}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file, without a last line that a killed process did not finish.

    Raises:
        ValueError: a line is no JSON.
    """
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is no JSON: {line[:80]!r}") from error
    return rows


def plot_metrics(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw bits per byte over training tokens, of every split in `rows`, to a PNG.

    Training steps are drawn as they are, faintly, and as means over a hundredth of them.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles: dict[str, dict[str, Any]] = {
        "train": {"color": "tab:blue"},
        "valid": {"color": "tab:orange", "marker": "."},
        "test": {"color": "tab:green", "marker": "*", "markersize": 12, "linestyle": ""},
    }
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for split, style in styles.items():
        points = np.array(
            [(row["tokens"] / 1e6, row["bits_per_byte"]) for row in rows if row["split"] == split]
        )
        if split == "train" and len(points):
            axes.plot(*points.T, linewidth=0.5, alpha=0.3, **style)
            points = np.array([part.mean(axis=0) for part in np.array_split(points, min(100, len(points)))])
        if len(points):
            axes.plot(*points.T, label=f"{split} (last: {points[-1][1]:.3f})", **style)
    axes.set(title=title, xlabel="training tokens, in millions", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
