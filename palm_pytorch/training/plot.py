"""Metrics as pictures: one run's losses, or several runs beside each other (`palm plot`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from palm_pytorch.training.logging import Row, read_metrics
from palm_pytorch.training.options import Options, option

# What a curve may run over: the column of the metrics, its unit, and what to call it.
AXES: dict[str, tuple[str, float, str]] = {
    "tokens": ("tokens", 1e6, "training tokens, in millions"),
    "steps": ("step", 1, "training steps"),
    "seconds": ("seconds", 1, "seconds of training"),
}
POINTS = 100  # that a curve of training steps is smoothed to, as means


@dataclass(frozen=True, kw_only=True)
class PlotOptions(Options):
    """Options of `palm plot`."""

    out: str = option("picture", "where to; the suffix decides the format (none: png)", default="runs.png")
    x: Literal["tokens", "steps", "seconds"] = option("picture", "what curves run over", default="tokens")


def plot_runs(folders: Sequence[str], options: PlotOptions) -> Path:
    """Draw the metrics of several runs' folders into one picture; returns where it is.

    Raises:
        FileNotFoundError, ValueError: a folder has no metrics, or none of that kind; no such format.
        ModuleNotFoundError: matplotlib is not installed.
    """
    runs: dict[str, list[Row]] = {}
    for folder, label in zip(folders, labels(folders), strict=True):
        path = Path(folder) / "metrics.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: expected a run's folder, and it has no {path.name}")
        runs[label] = read_metrics(path)
        if not any(curve(runs[label], split, options.x).size for split in ("train", "valid")):
            raise ValueError(f"{path} has no scores over {options.x} yet")
    out = Path(options.out)
    out = out if out.suffix else out.with_suffix(".png")
    plot_metrics(runs, out, x=options.x)
    return out


def labels(folders: Sequence[str]) -> list[str]:
    """What to call runs: their folders' names, with as much of the path as tells them apart."""
    paths = [Path(folder).resolve().parts for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError(f"a run is given twice: {', '.join(folders)}")
    shown = 1
    while len({path[-shown:] for path in paths}) < len(paths):
        shown += 1
    return ["/".join(path[-shown:]) for path in paths]


def curve(rows: Sequence[Row], split: str, x: str) -> np.ndarray:
    """Points `(n, 2)` of a split: the axis `x` of `AXES`, and bits per byte. Rows that lack one are left out.

    Steps that were taken again, after rolling back, count as they were last.
    """
    column, unit, _ = AXES[x]
    points: dict[int, tuple[float, float]] = {}
    for row in rows:
        if row.get("split") != split or None in (row.get(column), row.get("bits_per_byte")):
            continue
        while points and next(reversed(points)) >= row["step"]:
            points.popitem()
        points[row["step"]] = (row[column] / unit, row["bits_per_byte"])
    return np.array([*points.values()])


def smoothed(points: np.ndarray) -> np.ndarray:
    """Means over equal parts of a curve; no more of them than `POINTS`."""
    return np.array([part.mean(axis=0) for part in np.array_split(points, min(POINTS, len(points)))])


def plot_metrics(runs: Mapping[str, Sequence[Row]], path: Path, *, x: str = "tokens") -> None:
    """Draw bits per byte of the rows of each of `runs`, by label, into a picture.

    Of training only means over a hundredth are drawn, faintly, with the single steps behind them if there is
    one run; of validation every score; the final test is a star. The legend has the last scores.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the suffix of `path` is none of its formats.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib: pip install matplotlib", name=error.name
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    first_scores = []
    try:
        for number, (label, rows) in enumerate(runs.items()):
            # To matplotlib a $ begins a formula, and a label with _ in front is not to be shown.
            label = label.replace("$", r"\$")
            label = f" {label}" if label.startswith("_") else label
            colors = [f"C{number}"] * 3 if len(runs) > 1 else ["C0", "C1", "C2"]
            train, valid, test = (curve(rows, split, x) for split in ("train", "valid", "test"))
            scores = {name: points for name, points in (("valid", valid), ("test", test)) if points.size}
            last = ", ".join(f"{name} {points[-1, 1]:.3f}" for name, points in scores.items())
            if train.size:
                if len(runs) == 1:
                    axes.plot(*train.T, linewidth=0.5, alpha=0.3, color=colors[0])
                alone = len(runs) == 1 or not last
                name = f"{label}: train {smoothed(train)[-1, 1]:.3f}" if alone else None
                axes.plot(*smoothed(train).T, alpha=1 if alone else 0.35, color=colors[0], label=name)
            if len(valid) > 2:
                first_scores.append(valid[0, 1])
            if valid.size:
                axes.plot(*valid.T, marker=".", color=colors[1], label=f"{label}: {last}")
            if test.size:
                name = None if valid.size else f"{label}: {last}"
                axes.plot(*test.T, "*", markersize=12, color=colors[2], label=name)
        axes.set(xlabel=AXES[x][2], ylabel="bits per byte")
        if len(first_scores) == len(runs):  # or the first few steps would take most of the room
            axes.set_ylim(top=1.05 * max(first_scores))
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=150)
    finally:
        pyplot.close(figure)
