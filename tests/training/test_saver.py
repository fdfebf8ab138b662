"""Checkpoints are written beside the training, whole or not at all, and the right ones are kept."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from palm_pytorch.training import saver as saver_module
from palm_pytorch.training.checkpoint import check_manifest, complete_checkpoints, load_state, step_of
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.distributed import Parallel, start
from palm_pytorch.training.saver import MOST_FAILURES, Saver
from palm_pytorch.training.state import TrainState

ABOUT: dict[str, Any] = {"config": {"model": "palm"}, "data": {}}


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    alone = start(TrainConfig.for_machine(out="run", device="cpu"), torch.device("cpu"))
    yield alone
    alone.stop()


def new_state(width: int = 3) -> TrainState:
    model = nn.Linear(width, 2)
    return TrainState(model, AdamW(model.parameters()))


def steps(run: Path) -> list[int]:
    return [step_of(path) for path in complete_checkpoints(run)]


def test_newest_best_and_every_mth_are_kept(tmp_path: Path, parallel: Parallel) -> None:
    saver, state = Saver(tmp_path, parallel, ABOUT, keep=2, keep_every=4), new_state()
    for step in range(1, 11):
        state.step = step
        if step == 3:
            state.best_step = 3
        saver.save(state)
    assert saver.wait() is None
    assert steps(tmp_path) == [3, 4, 8, 9, 10]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [f"step-{n:08d}" for n in (3, 4, 8, 9, 10)]


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, go = new_state(), threading.Event()
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    write = saver_module.write_tensors

    def wait_and_write(*args: Any) -> None:
        assert go.wait(60)
        write(*args)

    monkeypatch.setattr(saver_module, "write_tensors", wait_and_write)
    saver = Saver(tmp_path, parallel, ABOUT, keep=1)
    saver.save(state)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(7.0)
    state.step = 99
    assert steps(tmp_path) == []
    go.set()
    assert saver.wait() is None and steps(tmp_path) == [0]
    loaded = new_state()
    load_state(complete_checkpoints(tmp_path)[0], loaded)
    assert all(torch.equal(x, y) for x, y in zip(loaded.model.parameters(), before, strict=True))


def test_a_step_is_written_once(tmp_path: Path, parallel: Parallel) -> None:
    saver, state = Saver(tmp_path, parallel, ABOUT, keep=1), new_state()
    saver.save(state)
    saver.wait()
    (written,) = complete_checkpoints(tmp_path)
    before = (written / "manifest.json").stat()
    saver.save(state)
    assert saver.wait() is None and (written / "manifest.json").stat() == before


def test_the_remains_of_a_killed_process_are_cleared(tmp_path: Path, parallel: Parallel) -> None:
    for name in (".partial-step-00000000", ".partial-step-00000009"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "__0_0.distcp").write_bytes(b"half of it")
    saver = Saver(tmp_path, parallel, ABOUT, keep=1)
    saver.save(new_state())
    assert saver.wait() is None
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000000"]


def test_later_steps_are_removed_when_a_run_goes_back(tmp_path: Path, parallel: Parallel) -> None:
    saver, state = Saver(tmp_path, parallel, ABOUT, keep=9), new_state()
    for step in (2, 4, 6):
        state.step = step
        saver.save(state)
    saver.wait()
    saver.remove_after(4)
    assert steps(tmp_path) == [2, 4]


@pytest.fixture(params=["a small tmpfs", "a writer that fails"])
def full_disk(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with room for one checkpoint of `new_state(30_000)`, which are 750 kB, and not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "a small tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)]
        try:
            mounted = subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            mounted = False
        if not mounted:
            pytest.skip("needs the right to mount")
        yield folder
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    write = saver_module.write_tensors

    def write_if_there_is_room(tensors: Any, partial: Path, group: Any) -> None:
        if complete_checkpoints(folder):
            (partial / "__0_0.distcp").write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        write(tensors, partial, group)

    monkeypatch.setattr(saver_module, "write_tensors", write_if_there_is_room)
    yield folder


def test_a_full_disk_leaves_what_was_there_and_is_noticed(full_disk: Path, parallel: Parallel) -> None:
    saver, state = Saver(full_disk, parallel, ABOUT, keep=1), new_state(30_000)
    state.model(torch.ones(1, 30_000)).sum().backward()
    state.optimizer.step()
    for step in (1, 2):
        state.step = step
        assert saver.save(state) is None
    failure = saver.wait()
    assert failure is not None and "No space left on device" in str(failure)
    assert os.listdir(full_disk / "checkpoints") == ["step-00000001"]
    check_manifest(full_disk / "checkpoints" / "step-00000001")
    load_state(full_disk / "checkpoints" / "step-00000001", new_state(30_000))


def test_training_does_not_go_on_without_checkpoints_for_ever(
    tmp_path: Path, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = True

    def fail(tensors: Any, partial: Path, group: Any, write: Any = saver_module.write_tensors) -> None:
        if failing:
            raise OSError(5, "Input/output error")
        write(tensors, partial, group)

    monkeypatch.setattr(saver_module, "write_tensors", fail)
    saver, state = Saver(tmp_path, parallel, ABOUT, keep=1), new_state()
    saver.save(state)
    for _ in range(MOST_FAILURES - 1):
        failure = saver.save(state)
        assert failure is not None and "Input/output error" in str(failure)
    with pytest.raises(OSError, match=r"3 checkpoints in a row could not be written; .*Input/output error"):
        saver.save(state)
    failing = False
    saver = Saver(tmp_path, parallel, ABOUT, keep=1, failures=MOST_FAILURES - 1)
    saver.save(state)
    assert saver.wait() is None and saver.failures == 0 and steps(tmp_path) == [0]
