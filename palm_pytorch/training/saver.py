"""Checkpoints written while training goes on, and how many of them are kept.

    main thread                   background thread, on every rank         of rank 0 alone
    copy the tensors to the CPU   write this rank's part, durably          state.json, manifest.json
    train                         wait until all ranks have written        rename: from now on it is found
                                                                           remove what is not to be kept

A process that is killed, a disk that is full or a rank that is lost, at whatever moment, leaves a folder of
another name, which nobody takes for a checkpoint and the next save removes. The one before stays until the
new one has its name.
"""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from palm_pytorch.data.durable import sync, write_json
from palm_pytorch.training.checkpoint import (
    STATE_FILE,
    complete_checkpoints,
    copy_to_cpu,
    load_state,
    step_folder,
    step_of,
    write_tensors,
)
from palm_pytorch.training.distributed import Parallel
from palm_pytorch.training.manifest import write_manifest
from palm_pytorch.training.state import TrainState
from palm_pytorch.version import __version__

PARTIAL = ".partial-"
MOST_FAILURES = 3  # saves in a row that may fail before training stops: it would go on for nothing


@dataclass
class Saver:
    """Writes the checkpoints of a run, one at a time. Every rank makes one, and calls the same methods.

    about: what the checkpoints say of the run beside its state: `config` and `data`.
    keep: so many of the newest stay, and the best by validation.
    keep_every: and each whose step is a multiple of this; 0: no others.
    """

    run: Path
    parallel: Parallel
    about: dict[str, Any]
    keep: int
    keep_every: int = 0
    failures: int = 0
    _group: Any = field(init=False, repr=False)
    _thread: threading.Thread | None = field(init=False, default=None, repr=False)
    _error: Exception | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        # Of its own: its messages must not get between those of the training, which run at the same time.
        self._group = dist.new_group(backend="gloo")

    def save(self, state: TrainState) -> OSError | None:
        """Begin to write `state`, after waiting for the save before; returns what went wrong with that one.

        Raises:
            OSError: `MOST_FAILURES` in a row have failed.
        """
        failure = self.wait()
        if self.failures >= MOST_FAILURES:
            raise OSError(f"{self.failures} checkpoints in a row could not be written; the last: {failure}")
        if self.parallel.agree(step_of(step_folder(self.run, state.step))) == state.step:
            return failure  # resumed from, with no step since
        work = (copy_to_cpu(state.tensors()), json.loads(json.dumps(state.numbers())))
        # A daemon, so that a second Ctrl-C does not wait for a slow disk.
        self._thread = threading.Thread(target=self._write, args=work, name="checkpoint", daemon=True)
        self._thread.start()
        return failure

    def wait(self) -> OSError | None:
        """Wait for the save under way on all ranks; returns what went wrong with it on any of them."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if not self.parallel.agree(int(error is not None)):
            self.failures = 0
            return None
        self.failures += 1
        if isinstance(error, OSError):
            return error
        return OSError(f"a checkpoint could not be written: {error or 'another process failed'}")

    def finish(self) -> None:
        """Wait for the save under way on this process alone, which has failed; others may be gone."""
        if self._thread is not None:
            self._thread.join(timeout=60)

    def load(self, folder: Path, state: TrainState) -> None:
        """Put a checkpoint into `state`."""
        load_state(folder, state, self._group)

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: the run has gone back to `step`."""
        if self.parallel.is_main:
            for folder in complete_checkpoints(self.run):
                if step_of(folder) > step:
                    remove(folder)
        self.parallel.barrier()

    def _write(self, tensors: dict[str, Any], numbers: dict[str, Any]) -> None:
        final = step_folder(self.run, numbers["step"])
        partial = final.with_name(PARTIAL + final.name)
        try:
            self._make_folder(partial)
            write_tensors(tensors, partial, self._group)
            if self.parallel.is_main:
                self._publish(partial, final, numbers)
        except Exception as error:
            self._error = error
            if self.parallel.is_main:
                shutil.rmtree(partial, ignore_errors=True)

    def _make_folder(self, partial: Path) -> None:
        """Have one rank make the folder, before any other would by writing into it.

        Raises:
            OSError: on all ranks; it could not.
        """
        failure: list[OSError | None] = [None]
        if self.parallel.is_main:
            try:
                partial.parent.mkdir(parents=True, exist_ok=True)
                clear_leftovers(self.run)
                partial.mkdir()
            except OSError as error:
                failure = [error]
        dist.broadcast_object_list(failure, src=0, group=self._group, device=torch.device("cpu"))
        if failure[0] is not None:
            raise failure[0]

    def _publish(self, partial: Path, final: Path, numbers: dict[str, Any]) -> None:
        write_json(partial / STATE_FILE, {"state": numbers, **self.about})
        versions = {"palm_pytorch": __version__, "torch": torch.__version__}
        ranks = {"world_size": self.parallel.world_size, "kind": self.parallel.kind}
        write_manifest(partial, {"step": numbers["step"], "versions": versions, **ranks})
        metrics = self.run / "metrics.jsonl"
        if metrics.exists():  # the rows up to this step are to last as long as it does
            sync(metrics)
        partial.rename(final)
        sync(final.parent)
        self._prune(numbers["best_step"])

    def _prune(self, best_step: int | None) -> None:
        complete = complete_checkpoints(self.run)
        for folder in complete[: -self.keep]:
            step = step_of(folder)
            if step != best_step and not (self.keep_every and step % self.keep_every == 0):
                remove(folder)


def clear_leftovers(run: Path) -> None:
    """Remove what processes that were killed had half written, or half removed. Nobody may be writing."""
    for leftover in run.glob(f"checkpoints/{PARTIAL}*"):
        shutil.rmtree(leftover)


def remove(folder: Path) -> None:
    """Remove a checkpoint in such a way that a kill leaves no half of it under its name."""
    shutil.rmtree(folder.rename(folder.with_name(PARTIAL + folder.name)))
