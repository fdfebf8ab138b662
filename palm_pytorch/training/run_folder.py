"""The folder of a run: who may write to it, and what is in it already."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

from palm_pytorch.data.durable import sync
from palm_pytorch.data.tokenizer import TOKENIZER_FILES
from palm_pytorch.training.checkpoint import Source, complete_checkpoints

LOCK = ".lock"
# By a run, or instead of others' files of these names.
WRITTEN = (
    *("config.json", "metrics.jsonl", "checkpoints", "samples", "model", "loss.png"),
    *("tensorboard", "wandb", *TOKENIZER_FILES.values()),
)
DAMAGED = "damaged-"


class FolderLock:
    """Keeps other processes from training in a folder, until it is released or this process ends, however.
    A folder that is not there yet is made.

    It is a record lock of POSIX, which a killed process cannot leave behind, and which, other than `flock`,
    its orphaned worker processes do not hold on to. Windows has none, and there nothing is locked.

    Raises:
        BlockingIOError: another process has the lock.
        OSError: the folder cannot be made, or not be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        parents = (folder, *folder.absolute().parents)
        self._made = [path for path in parents if not os.path.lexists(path)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115, held on purpose
        except OSError as error:
            raise OSError(f"out is {folder}; expected a folder that can be written to ({error})") from error
        try:
            import fcntl
        except ModuleNotFoundError:
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise BlockingIOError(
                f"out is {folder}, in which {holder or 'another process'} trains; expected another folder"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let others have the folder. If it was made for the lock, and nothing came of it, it goes again."""
        with suppress(OSError):
            if self._made and os.listdir(self._folder) == [LOCK]:
                (self._folder / LOCK).unlink()
                for folder in self._made:
                    folder.rmdir()
        self._file.close()


def check_folder(folder: Path, source: Source | None, *, restart: bool) -> None:
    """Refuse a folder in which a run, from `source` if there is one, would overwrite another's work.

    Raises:
        ValueError: it holds later checkpoints of the same run.
        FileExistsError: it holds what a run writes. `restart` allows a run that has neither a checkpoint nor
            a model yet.
    """
    if source is not None and is_same(folder, source.run):
        if not is_same(source.candidates[-1], complete_checkpoints(folder)[-1]):
            raise ValueError(
                f"resume is {source.candidates[-1]}, not the newest checkpoint of its run; expected the "
                "newest, or a new folder as out to branch off into"
            )
        return
    held = [name for name in WRITTEN if os.path.lexists(folder / name)]
    begun = "config.json" in held and "model" not in held and not complete_checkpoints(folder)
    if held and not (restart and begun):
        raise FileExistsError(
            f"out is {folder}, which holds what a run writes; expected a new folder, or --resume to continue "
            f"it (there is {', '.join(held)})"
        )


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that the run can write one of that step anew."""
    aside = folder.with_name(DAMAGED + folder.name)
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{DAMAGED}{folder.name}-{number}")
    folder.rename(aside)
    sync(folder.parent)


def is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
