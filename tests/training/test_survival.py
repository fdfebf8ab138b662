"""Real processes that are killed, interrupted, or find their newest checkpoint damaged: what comes of it is
what an undisturbed run gives, to the last bit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import real_process
import torch
from safetensors.torch import load_file

from palm_pytorch.training.checkpoint import Reader, complete_checkpoints, read_about, read_tensors
from palm_pytorch.training.logging import MEASURED, read_metrics
from palm_pytorch.training.manifest import check_manifest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can fork")

KILLS_AT_RANDOM, KILLS_WHILE_WRITING = 30, 20


@pytest.fixture
def options(tiny: dict[str, Any]) -> dict[str, Any]:
    """A run with everything that could be lost: dropout, slices, samples, scores, many checkpoints."""
    often = {"save_every": 2, "eval_every": 5, "generate_every": 7, "keep": 2, "steps": 40}
    return {**tiny, **often, "dropout": 0.3, "grad_accum": 2, "batch_size": 2, "eval_windows": 2}


def start(options: dict[str, Any], told: Path, fatal_call: int = 0) -> ForkServerProcess:
    """A process that trains; see `real_process.start`."""
    return real_process.start(["train", *real_process.flags(options)], told, fatal_call=fatal_call)


def finish(options: dict[str, Any], told: Path) -> None:
    process = start(options, told)
    process.join(300)
    assert process.exitcode == 0, told.read_text()


def everything(run: Path) -> dict[str, Any]:
    """All that a run leaves but what it measured: tensors, numbers, metrics, samples, the saved model."""
    newest = complete_checkpoints(run)[-1]
    index = Reader(newest).read_metadata()
    tensors = {
        name: torch.full(tuple(saved.size), torch.nan, dtype=saved.properties.dtype)
        for name, saved in index.state_dict_metadata.items()
    }
    read_tensors(tensors, Reader(newest), None)
    exported = load_file(run / "model" / "model.safetensors")
    state = read_about(newest)["state"]
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row.get("event") != "resume"]
    return {
        "tensors": tensors | {f"exported {name}": tensor for name, tensor in exported.items()},
        "state": {name: value for name, value in state.items() if name not in ("seconds", "metrics_rows")},
        "rows": [{name: value for name, value in row.items() if name not in MEASURED} for row in rows],
        "samples": {path.name: path.read_bytes() for path in (run / "samples").iterdir()},
    }


def assert_same(run: Path, other: Path) -> None:
    ours, theirs = everything(run), everything(other)
    torch.testing.assert_close(ours.pop("tensors"), theirs.pop("tensors"), rtol=0, atol=0)
    assert ours == theirs


RUNS: dict[str, Path] = {}


@pytest.fixture
def undisturbed(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that was left alone; the same for all tests, which must not change it."""
    if not RUNS:
        RUNS["undisturbed"] = tmp_path_factory.mktemp("undisturbed") / "run"
        finish({**options, "out": RUNS["undisturbed"]}, RUNS["undisturbed"].with_name("told"))
    return RUNS["undisturbed"]


def test_fifty_kills_leave_no_trace(options: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    """Thirty at any moment, from the start of the process on; twenty at a call that changes the disk: among
    them between two files of a checkpoint, before its manifest, before and after it gets its name, and while
    old ones are removed. A run that comes near its end is finished, compared, and begun anew.
    """
    run, told, draws, inside_a_write = Path(options["out"]), tmp_path / "killed", random.Random(1), 0
    plan = [False] * KILLS_AT_RANDOM + [True] * KILLS_WHILE_WRITING
    draws.shuffle(plan)
    for _ in range(500):
        newest = complete_checkpoints(run)[-1:]
        if not plan or (newest and read_about(newest[0])["state"]["step"] > options["steps"] - 10):
            finish({**options, "resume": "auto"}, told)
            assert_same(run, undisturbed)
            assert not list(run.glob("checkpoints/.partial-*"))
            shutil.rmtree(run)
        if not plan:
            break
        process = start(
            {**options, "resume": "auto"}, told, fatal_call=draws.randrange(1, 60) if plan[-1] else 0
        )
        if not plan[-1]:
            time.sleep(draws.uniform(0.02, 0.5))
            process.kill()
        process.join(120)
        if process.exitcode == -signal.SIGKILL:  # or it was done before
            plan.pop()
            inside_a_write += bool(list(run.glob("checkpoints/.partial-*")))
        for folder in complete_checkpoints(run):
            assert {path.name for path in folder.iterdir()} >= {"manifest.json", "state.json", ".metadata"}
    assert not plan and inside_a_write >= 10, told.read_text()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "name"), [(flip, "__0_0.distcp"), (cut, "__0_0.distcp"), (Path.unlink, ".metadata")]
)
def test_a_damaged_newest_checkpoint_leaves_no_trace_but_a_row(
    damage: Callable[[Path], None], name: str, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    run, told = tmp_path / "damaged", tmp_path / "told-of-damage"
    shutil.copytree(undisturbed, run)
    newest = complete_checkpoints(run)[-1]
    damage(newest / name)
    finish({"resume": run}, told)
    says = f"{newest / name} is {'missing' if name == '.metadata' else 'damaged'}"
    assert says in told.read_text()
    rows = read_metrics(run / "metrics.jsonl")
    (event,) = [row for row in rows if row.get("event") == "checkpoint-damaged"]
    assert says in event["error"] and event["step"] == 38
    assert (run / "checkpoints" / f"damaged-{newest.name}").is_dir()
    kept = [json.dumps(row) for row in rows if row.get("event") != "checkpoint-damaged"]
    (run / "metrics.jsonl").write_text("".join(row + "\n" for row in kept))
    assert_same(run, undisturbed)


def children(pid: int | None) -> list[int]:
    """The workers of a process, where the system tells."""
    told = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in told.read_text().split()] if told.exists() else []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_process_with_its_status_and_leaves_no_trace(
    number: signal.Signals, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    told, metrics = tmp_path / f"told-{number}", Path(options["out"]) / "metrics.jsonl"
    process = start({**options, "num_workers": 2}, told)
    while process.is_alive() and not (metrics.exists() and len(read_metrics(metrics)) >= 9):
        time.sleep(0.01)
    for pid in [process.pid, *children(process.pid)]:  # as a scheduler does, or Ctrl-C on a terminal
        os.kill(pid, number)
    process.join(120)
    assert process.exitcode == 128 + number, told.read_text()
    assert told.read_text().count(f"{number.name}: saving after this step") == 1
    assert f"--resume {options['out']}" in told.read_text()
    done = read_metrics(metrics)[-1]["step"]
    assert complete_checkpoints(Path(options["out"]))[-1].name == f"step-{done:08d}"
    finish({"resume": options["out"], "num_workers": 0}, told)
    assert_same(Path(options["out"]), undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_no_trace(
    options: dict[str, Any], undisturbed: Path, small_disk: Path, tmp_path: Path
) -> None:
    run, told = small_disk / "run", tmp_path / "told-of-disk"
    options = {**options, "out": run}
    process = start(options, told)
    while process.is_alive() and not complete_checkpoints(run):
        time.sleep(0.01)
    with suppress(OSError), open(small_disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    process.join(120)
    assert process.exitcode == 3, told.read_text()
    # Not always the last line: Python 3.13 tells too what torch's own file makes of it as it is dropped. And
    # torch's archive, if that is what did not fit, only that it is not where it should be.
    errors = [line for line in told.read_text().splitlines() if line.startswith("palm: error: ")]
    assert any(said in errors[-1] for said in ("No space left on device", "could not be written: [enforce"))
    (small_disk / "ballast").unlink()
    for folder in complete_checkpoints(run):
        check_manifest(folder)
    finish({**options, "resume": "auto"}, told)
    assert_same(run, undisturbed)


def test_two_processes_cannot_train_in_one_folder(options: dict[str, Any], tmp_path: Path) -> None:
    first = start({**options, "steps": 100_000}, tmp_path / "first")
    lock = Path(options["out"]) / ".lock"
    while first.is_alive() and not (lock.exists() and lock.read_text()):
        time.sleep(0.01)
    second = start({**options, "resume": "auto"}, tmp_path / "second")
    second.join(60)
    first.kill()
    first.join()
    assert second.exitcode == 2
    told = (tmp_path / "second").read_text()
    assert f"out is {options['out']}, in which process {first.pid} on " in told and "trains" in told
