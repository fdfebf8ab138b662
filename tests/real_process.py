"""The command `palm` in a process of its own, to be killed. It is forked from a server that has imported
everything and computed nothing, so that it is there in a moment.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401, which PyTorch imports late, at the cost of a second

import palm_pytorch
from palm_pytorch.cli import main

with suppress(ModuleNotFoundError):
    import matplotlib.pyplot  # noqa: F401

ROOT = Path(palm_pytorch.__file__).parents[1]
# What every write to a disk goes through, one way or the other.
FILE_CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def flags(options: Mapping[str, Any]) -> list[str]:
    pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in options.items())
    return [part for pair in pairs for part in pair]


def start(
    arguments: Sequence[str],
    told: Path,
    *,
    fatal_call: int = 0,
    constants: Mapping[str, Any] | None = None,
) -> ForkServerProcess:
    """Start `palm` with `arguments`; what it prints goes to the file `told`.

    fatal_call: the how many-eth call of those in `FILE_CALLS` is its last; 0: none is.
    constants: values for names in modules, as {"palm_pytorch.data.blocks.BLOCK": 4096}.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["real_process"])
    # The server is started with the first process, and takes its path from the environment.
    paths = (str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    process = context.Process(target=run, args=(list(arguments), told, fatal_call, dict(constants or {})))
    process.start()
    return process


def run(arguments: list[str], told: Path, fatal_call: int, constants: dict[str, Any]) -> None:
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        setattr(sys.modules[module], constant, value)
    multiprocessing.set_start_method("fork", force=True)  # of its workers, as in a process of a user
    with open(told, "a") as file:  # of the process itself, below Python
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if fatal_call:
        die_at(fatal_call)
    status = main(arguments)
    sys.stdout.flush()
    sys.exit(status)


def die_at(fatal_call: int) -> None:
    calls = 0

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fatal_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in FILE_CALLS:
        setattr(os, name, counted(getattr(os, name)))
