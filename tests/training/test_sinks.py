"""TensorBoard and Weights & Biases get every number once, however often the run was stopped or killed."""

from __future__ import annotations

import importlib.util
import json
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from palm_pytorch.cli import main
from palm_pytorch.training import sinks
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.logging import MetricsLog, Row, read_metrics
from palm_pytorch.training.loop import train
from palm_pytorch.training.run import prepare
from palm_pytorch.training.sinks import check_sinks, open_sinks, scalars, sink_names

CONFIG = {"dim": 16, "model": "palm"}


def train_row(step: int) -> Row:
    return {"step": step, "split": "train", "loss": 1 / step, "tokens": 64 * step}


def valid_row(step: int) -> Row:
    return {"step": step, "split": "valid", "loss": 2 / step, "tokens": 64 * step}


SKIP: Row = {"step": 4, "event": "skip", "tokens": 256, "reason": "not finite"}
STRAIGHT = [train_row(1), train_row(2), valid_row(2), train_row(3), train_row(4), SKIP, valid_row(4)]


def log(name: str, folder: Path, history: Sequence[Row], rows: Sequence[Row]) -> None:
    """What a process does: it opens the sink, makes the metrics file the history, and adds rows to both."""
    folder.mkdir(exist_ok=True)
    (sink,) = open_sinks(name, folder, CONFIG, history)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*history, *rows]))
    for row in rows:
        sink.write(row)
    sink.close()


def points(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in scalars(row):
            found.setdefault(name, []).append((row["step"], pytest.approx(value)))
    return found


def test_rows_as_named_numbers() -> None:
    assert dict(scalars(valid_row(2))) == {"valid/loss": 1.0, "valid/tokens": 128}
    assert dict(scalars(SKIP)) == {"event/skip": 1.0, "event/skip/tokens": 256}


# ------------------------------------------------------------------------------------------- TensorBoard


def tensorboard_points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}


@pytest.mark.parametrize("checkpoint", [0, 2, 4])
def test_tensorboard_has_every_point_once(checkpoint: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    history = [row for row in STRAIGHT if row["step"] <= checkpoint]
    log("tensorboard", tmp_path / "run", [], STRAIGHT[:-1])  # killed after its steps, but for a validation
    log("tensorboard", tmp_path / "run", history, STRAIGHT[len(history) :])
    assert tensorboard_points(tmp_path / "run") == points(STRAIGHT)


def test_tensorboard_forgets_the_steps_that_were_given_up(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (sink,) = open_sinks("tensorboard", tmp_path, CONFIG, [])
    for row in STRAIGHT[:5]:
        sink.write(row)
    sink.go_back(STRAIGHT[:3])
    anew = [{**row, "loss": row["loss"] + 7} for row in STRAIGHT[3:5]]
    for row in anew:
        sink.write(row)
    sink.close()
    assert tensorboard_points(tmp_path) == points([*STRAIGHT[:3], *anew])


def test_tensorboard_gets_the_history_of_another_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log("tensorboard", tmp_path / "branch", STRAIGHT[:3], STRAIGHT[3:])
    assert tensorboard_points(tmp_path / "branch") == points(STRAIGHT)


# ----------------------------------------------------------------------------------------------- wandb


def leveldb_records(file: Path) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, in blocks of 32 KiB, behind 7 bytes of W&B's own.

    A record is in one piece (type 1) or a first, middle and last one (2, 3, 4); each has a checksum, its
    length and its type before it.
    """
    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb_records(file: Path) -> list[Any]:
    """Those of an offline run, whose last says that it is over: W&B writes them by another process."""
    from wandb.proto.wandb_internal_pb2 import Record

    until = time.monotonic() + 60
    while time.monotonic() < until:
        records = [Record.FromString(raw) for raw in leveldb_records(file)]
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.05)
    raise TimeoutError(f"{file} has no end")


def wandb_runs(folder: Path) -> list[tuple[str, dict[str, str], dict[str, list[tuple[int, float]]]]]:
    """Of each offline run, oldest first: its id, its config, and its points over our steps, which are what it
    is drawn over. Its own steps must not decrease.
    """
    runs = []
    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        identity, config, found, own, axes = "", {}, {}, -1, {}
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                identity = record.run.run_id
                config = {item.key: item.value_json for item in record.run.config.update}
            elif record.WhichOneof("record_type") == "metric":
                axes[record.metric.glob_name] = record.metric.step_metric
            elif record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item for item in record.history.item}
                values = {name: json.loads(item.value_json) for name, item in items.items()}
                step = values.pop("step")
                for name, value in values.items():
                    if not name.startswith("_"):
                        found.setdefault(name, []).append((step, value))
                assert record.history.step.num > own
                own = record.history.step.num
        assert axes["*"] == "step"
        runs.append((identity, config, found))
    return runs


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")


def test_wandb_offline_has_every_point_once_under_one_id(offline: None, tmp_path: Path) -> None:
    log("wandb", tmp_path / "run", [], STRAIGHT[:4])  # killed one step after its checkpoint
    second_of_its_folder = int(time.time())
    while int(time.time()) == second_of_its_folder:  # W&B names its folders by it
        time.sleep(0.05)
    log("wandb", tmp_path / "run", STRAIGHT[:3], STRAIGHT[3:])
    first, second = wandb_runs(tmp_path / "run")
    assert first[0] == second[0] == (tmp_path / "run" / "wandb" / "id.txt").read_text().strip() != ""
    assert {name: json.loads(value) for name, value in first[1].items() if name in CONFIG} == CONFIG
    assert first[2] == points(STRAIGHT[:4]) and second[2] == points(STRAIGHT[4:])


def test_wandb_shows_the_steps_that_were_given_up_and_those_in_their_place(
    offline: None, tmp_path: Path
) -> None:
    """After a roll-back the new losses were taken for ones that it had already, in the same process and, had
    that been killed, in the next.
    """
    folder, kept, gone = tmp_path / "run", STRAIGHT[:3], STRAIGHT[3:5]
    anew = [{**row, "loss": row["loss"] + 7} for row in [*gone, train_row(5)]]
    (sink,) = open_sinks("wandb", folder, CONFIG, [])
    with MetricsLog(folder / "metrics.jsonl", sinks=[sink]) as metrics:
        for row in [*kept, *gone]:
            metrics._write(row)
        metrics.go_back(kept)
        for row in anew[:2]:
            metrics._write(row)
    second_of_its_folder = int(time.time())
    while int(time.time()) == second_of_its_folder:
        time.sleep(0.05)
    log("wandb", folder, kept, anew)
    first, second = wandb_runs(folder)
    assert first[2] == points([*kept, *gone, *anew[:2]]) and second[2] == points(anew[2:])


def test_wandb_that_lets_nobody_in(
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**options: Any) -> None:
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConnectionError, match=r"log has 'wandb'.*no API key.*WANDB_MODE=offline"):
        open_sinks("wandb", tmp_path, CONFIG, [])
    flags = [part for name, value in tiny.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    for _ in range(2):  # it can be tried again
        assert main(["train", "--log", "wandb", *flags]) == 2
        assert "no API key" in capsys.readouterr().err
    assert not Path(tiny["out"]).exists()


# ---------------------------------------------------------------------------------------------- options


def test_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert sink_names(None) == [] and open_sinks(None, tmp_path, CONFIG, []) == []
    assert sink_names("wandb, tensorboard,wandb") == ["wandb", "tensorboard"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(sinks, "find_spec", lambda asked: None if asked == name else found(asked))
    with pytest.raises(ModuleNotFoundError, match=rf"log is '{name}'.*pip install {name}"):
        check_sinks(name)


@pytest.mark.parametrize("given", ["tensorbord", "", "wandb,"])
def test_others_are_no_option(given: str) -> None:
    with pytest.raises(ValueError, match=rf"log is '{given}'; expected 'tensorboard', 'wandb' or"):
        TrainConfig.for_machine(log=given)


def test_a_run_and_its_resumption(tiny: dict[str, Any]) -> None:
    pytest.importorskip("tensorboard")
    options = {"generate_every": 0, "log": "tensorboard", "steps": 4}
    for given in ({**tiny, **options}, {"resume": tiny["out"], "steps": 6}):
        run = prepare(**given)
        train(run)
        run.close()
    rows = read_metrics(run.metrics_file)
    assert [row["split"] for row in rows if "split" in row].count("test") == 1
    assert all(0 < row["mfu"] < 1 and row["memory_bytes"] > 0 for row in rows if row.get("split") == "train")
    found = tensorboard_points(run.folder)
    for name, places in points(rows).items():
        # TensorBoard keeps float32.
        assert [step for step, _ in found[name]] == [step for step, _ in places], name
        assert [value for _, value in found[name]] == pytest.approx([p.expected for _, p in places], rel=1e-6)
    assert len(found["train/loss"]) == 6
