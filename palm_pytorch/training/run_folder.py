"""The folder of a run: who may write to it, and what is in it already."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import IO

from palm_pytorch.training.checkpoint import Source, complete_checkpoints
from palm_pytorch.training.manifest import sync

LOCK = ".lock"
DAMAGED = "damaged-"


class FolderLock:
    """Keeps other processes from training in a folder, until it is released or this process ends, however.

    It is a record lock of POSIX, which a killed process cannot leave behind, and which, other than `flock`,
    its orphaned worker processes do not hold on to. Windows has none, and there nothing is locked.

    Raises:
        BlockingIOError: another process has the lock.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._file: IO[str] = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115, held on purpose
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
        self._file.close()


def check_folder(folder: Path, source: Source | None, *, restart: bool) -> None:
    """Refuse a folder in which a run, from `source` if there is one, would overwrite another's work.

    Raises:
        ValueError: it holds later checkpoints of the same run.
        FileExistsError: it holds a run. `restart` allows one that has no checkpoint yet.
        OSError: it cannot be written to.
    """
    if source is not None and is_same(folder, source.run):
        if not is_same(source.candidates[-1], complete_checkpoints(folder)[-1]):
            raise ValueError(
                f"resume is {source.candidates[-1]}, not the newest checkpoint of its run; expected the "
                "newest, or a new folder as out to branch off into"
            )
    elif (folder / "config.json").exists() and not (restart and not complete_checkpoints(folder)):
        raise FileExistsError(
            f"out is {folder}, which holds a run already; expected a new folder, or --resume to continue it"
        )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"out is {folder}, but {existing} is a file; expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"out is {folder}, but {existing} cannot be written to")


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
