"""The metrics file is whole lines of JSON, whatever happened to the process, and becomes a picture."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from palm_pytorch.training.logging import MetricsLog, plot_metrics, read_metrics

ROWS: list[dict[str, Any]] = [
    {"step": 1, "split": "train", "bits_per_byte": 8.0, "tokens": 1_000_000},
    {"step": 2, "split": "train", "bits_per_byte": 5.0, "tokens": 2_000_000},
    {"step": 2, "split": "valid", "bits_per_byte": 6.0, "tokens": 2_000_000},
]


def test_rows_are_on_disk_as_soon_as_they_are_added(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, ROWS[:1]) as metrics:
        metrics.add("valid", SimpleNamespace(step=4, tokens=90), math.log(2), 12.345, grad_norm=2.0)  # type: ignore[arg-type]
        row = {"step": 4, "split": "valid", "loss": math.log(2), "bits_per_byte": 1.0, "tokens": 90}
        assert read_metrics(path) == [ROWS[0], {**row, "tokens_per_second": 12.3, "grad_norm": 2.0}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 3, "spl')
    assert read_metrics(path) == ROWS
    path.write_text("")
    assert read_metrics(path) == []


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is no JSON: '\{\"step\": '"):
        read_metrics(path)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_the_plot_is_a_picture(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_metrics(rows, tmp_path / "loss.png", title="a title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_shows_the_rows_with_labelled_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    plot_metrics(ROWS, tmp_path / "loss.png", title="a title")
    (axes,) = pyplot.gcf().axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert lines.pop("_child0") == ([1, 2], [8, 5])  # the steps themselves, behind their means
    assert lines == {"train (last: 5.000)": ([1, 2], [8, 5]), "valid (last: 6.000)": ([2], [6])}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training tokens, in millions", "bits per byte")
    monkeypatch.undo()
    pyplot.close("all")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        plot_metrics(ROWS, tmp_path / "loss.png", title="")
