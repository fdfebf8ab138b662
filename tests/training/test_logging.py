"""The metrics file is whole lines of JSON, whatever happened to the process."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from palm_pytorch.training.logging import MEASURED, MetricsLog, read_metrics
from palm_pytorch.training.meter import Meter
from palm_pytorch.training.plot import curve

ROWS: list[dict[str, Any]] = [
    {"step": 1, "split": "train", "bits_per_byte": 8.0, "tokens": 1_000_000},
    {"step": 2, "split": "train", "bits_per_byte": 5.0, "tokens": 2_000_000},
    {"step": 2, "split": "valid", "bits_per_byte": 6.0, "tokens": 2_000_000},
]
STATE: Any = SimpleNamespace(step=4, tokens=90, seconds=1.23456)


class Recorder:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.closed = 0

    def write(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def go_back(self, history: Sequence[Mapping[str, Any]]) -> None:
        self.rows = list(history)

    def close(self) -> None:
        self.closed += 1


def test_rows_are_on_disk_as_soon_as_they_are_added(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, ROWS[:1]) as metrics:
        metrics.add("valid", STATE, math.log(2), 12.345, grad_norm=2.0)
        row = {"step": 4, "split": "valid", "loss": math.log(2), "bits_per_byte": 1.0, "tokens": 90}
        row |= {"seconds": 1.235, "tokens_per_second": 12.3, "grad_norm": 2.0}
        assert read_metrics(path) == [ROWS[0], row]
        metrics.event("skip", STATE, reason="the loss is not finite", count=3)
        event = {"step": 4, "event": "skip", "tokens": 90, "reason": "the loss is not finite", "count": 3}
        assert read_metrics(path) == [ROWS[0], row, event]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_every_row_is_json(tmp_path: Path) -> None:
    """Which has no numbers for infinite and undefined; pandas and others would refuse the file."""
    path, sink = tmp_path / "metrics.jsonl", Recorder()
    with MetricsLog(path, sinks=[sink]) as metrics:
        metrics.add("valid", STATE, math.nan, math.inf)
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", path.read_text()))
    (row,) = read_metrics(path)
    assert row["loss"] is row["bits_per_byte"] is row["tokens_per_second"] is None and [row] == sink.rows
    assert curve([row], "valid", "tokens").size == 0


def test_rows_of_training_tell_what_they_took_of_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, meter=Meter(torch.device("cpu"), 2e3, 1e6)) as metrics:
        metrics.add("train", STATE, 1.0, 100.0)
        metrics.add("valid", STATE, 1.0, 100.0)
    train, valid = read_metrics(path)
    assert train["mfu"] == 0.2 and train["memory_bytes"] > 0
    assert not {"mfu", "memory_bytes"} & set(valid)
    assert set(train) - set(MEASURED) == {"step", "split", "loss", "bits_per_byte", "tokens"}


def test_bits_are_per_byte_of_text(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, bytes_per_token=4.0) as metrics:
        metrics.add("train", STATE, 6 * math.log(2), 1.0)
        metrics.add("test", STATE, 6 * math.log(2), 1.0, bits_per_byte=2.0)
    assert [row["bits_per_byte"] for row in read_metrics(path)] == [pytest.approx(1.5), 2.0]


def test_sinks_get_the_new_rows_and_are_closed(tmp_path: Path) -> None:
    sinks = [Recorder(), Recorder()]
    with (
        pytest.raises(ZeroDivisionError),
        MetricsLog(tmp_path / "metrics.jsonl", ROWS, sinks=sinks) as metrics,
    ):
        metrics.add("train", STATE, 1.0, 100.0)
        metrics.event("rollback", STATE)
        raise ZeroDivisionError
    for sink in sinks:
        assert sink.rows == read_metrics(tmp_path / "metrics.jsonl")[3:] and sink.closed == 1


def test_rows_that_were_given_up_are_gone(tmp_path: Path) -> None:
    path, sink = tmp_path / "metrics.jsonl", Recorder()
    with MetricsLog(path, ROWS[:1], sinks=[sink]) as metrics:
        metrics.event("spike", STATE)
        metrics.go_back(ROWS[:1])
        assert metrics.rows == 1 and read_metrics(path) == ROWS[:1]
        metrics.event("rollback", STATE)
        assert metrics.rows == 2
    told = [*ROWS[:1], {"step": 4, "event": "rollback", "tokens": 90}]
    assert read_metrics(path) == told == sink.rows


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
