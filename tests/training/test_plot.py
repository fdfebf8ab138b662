"""Runs become one picture with what their metrics say, and what has no metrics is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from palm_pytorch.cli import main
from palm_pytorch.training.plot import PlotOptions, curve, labels, plot_metrics, plot_runs

ROWS: list[dict[str, Any]] = [
    {"step": 1, "split": "train", "bits_per_byte": 8.0, "tokens": 1_000_000, "seconds": 2.5},
    {"step": 1, "event": "skip", "tokens": 1_000_000},
    {"step": 2, "split": "train", "bits_per_byte": 5.0, "tokens": 2_000_000, "seconds": 4.5},
    {"step": 2, "split": "valid", "bits_per_byte": 6.0, "tokens": 2_000_000, "seconds": 4.5},
]
TEST: dict[str, Any] = {"step": 2, "split": "test", "bits_per_byte": 6.5, "tokens": 2_000_000, "seconds": 4.5}


def write_run(folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Any:
    """pyplot, whose figures stay open until the test ends."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", lambda figure: None)
        yield pyplot
    pyplot.close("all")


def drawn(pyplot: Any) -> list[tuple[str, list[float], list[float]]]:
    (axes,) = pyplot.gcf().axes
    lines = [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
    return [("" if label.startswith("_") else label, x, y) for label, x, y in lines]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], [*ROWS, TEST], [TEST]])
def test_the_plot_is_a_picture(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_metrics({"a run": rows}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_one_run(tmp_path: Path, figures: Any) -> None:
    plot_metrics({"palm": [*ROWS, TEST]}, tmp_path / "loss.png")
    assert drawn(figures) == [
        ("", [1, 2], [8, 5]),  # the steps themselves, behind their means
        ("palm: train 5.000", [1, 2], [8, 5]),
        ("palm: valid 6.000, test 6.500", [2], [6]),
        ("", [2], [6.5]),
    ]
    (axes,) = figures.gcf().axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training tokens, in millions", "bits per byte")


def test_scores_have_the_room(tmp_path: Path, figures: Any) -> None:
    """Not the first steps, which are far above; unless there are few scores to look at."""
    more = [{**ROWS[3], "step": step, "tokens": step, "bits_per_byte": 8 / step} for step in (2, 3, 4)]
    for rows, top in ((ROWS[:3] + more, 4.2), (ROWS[:3] + more[:2], 8.0)):
        plot_metrics({"palm": rows}, tmp_path / "loss.png")
        found = figures.gcf().axes[0].get_ylim()[1]
        assert found == pytest.approx(top) if top < 8 else found >= top


@pytest.mark.parametrize(("x", "places"), [("tokens", [1, 2]), ("steps", [1, 2]), ("seconds", [2.5, 4.5])])
def test_several_runs(x: Any, places: list[float], tmp_path: Path, figures: Any) -> None:
    runs = [write_run(tmp_path / name, rows) for name, rows in (("a", ROWS), ("b", [*ROWS, TEST]))]
    out = plot_runs(runs, PlotOptions(out=str(tmp_path / "both.svg"), x=x))
    assert "<svg" in out.read_text()
    assert drawn(figures) == [
        ("", places, [8, 5]),
        ("a: valid 6.000", places[1:], [6]),
        ("", places, [8, 5]),
        ("b: valid 6.000, test 6.500", places[1:], [6]),
        ("", places[1:], [6.5]),
    ]
    (axes,) = figures.gcf().axes
    colors = [line.get_color() for line in axes.get_lines()]
    assert colors == ["C0", "C0", "C1", "C1", "C1"]


@pytest.mark.parametrize("name", ["_hidden", "a$^$b"])
def test_runs_of_any_name(name: str, tmp_path: Path, figures: Any) -> None:
    plot_runs([write_run(tmp_path / name, ROWS)], PlotOptions(out=str(tmp_path / "a.png")))
    told = [text.get_text() for text in figures.gcf().axes[0].get_legend().get_texts()]
    assert len(told) == 2 and all(name.strip("_")[0] in text for text in told)


def test_steps_that_were_taken_again_are_drawn_once() -> None:
    """After rolling back from step 3 to step 1."""
    row = {"split": "train", "tokens": 10**6}
    steps = [(1, 8.0), (2, 7.0), (3, 99.0), (2, 6.5), (3, 6.0)]
    rows = [{**row, "step": step, "bits_per_byte": bits} for step, bits in steps]
    assert curve(rows, "train", "steps").tolist() == [[1, 8], [2, 6.5], [3, 6]]


def test_labels_tell_runs_apart() -> None:
    assert labels(["runs/a", "runs/b/"]) == ["a", "b"]
    assert labels(["one/palm", "two/palm", "two/lamda"]) == ["one/palm", "two/palm", "two/lamda"]


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"), ROWS)
    assert main(["plot", "a"]) == 0
    assert Path("runs.png").exists() and capsys.readouterr().out == "runs.png\n"
    assert main(["plot", "a", "--out", "picture"]) == 0
    assert Path("picture.png").exists() and capsys.readouterr().out == "picture.png\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere: expected a run's folder, and it has no metrics.jsonl"),
        (["a", "empty"], "metrics.jsonl has no scores over tokens yet"),
        (["old", "--x", "seconds"], "metrics.jsonl has no scores over seconds yet"),
        (["a", "./a"], "a run is given twice: a, ./a"),
        (["a", "--out", "a.xyz"], "'xyz' is not supported"),
        (["a", "--out", "no/where.png"], "no/where.png"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"), ROWS)
    write_run(Path("empty"), [])
    write_run(Path("old"), [{name: value for name, value in ROWS[0].items() if name != "seconds"}])
    assert main(["plot", *arguments]) == 2
    told = capsys.readouterr().err
    assert says in told and told.startswith("palm: error: ") and told.count("\n") == 1


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install matplotlib"):
        plot_metrics({"": ROWS}, tmp_path / "loss.png")
