"""How the processes of a run find each other, and what a restart by torchrun goes on from.

The store of torchrun's agents outlives a restart, with the addresses of the processes before. PyTorch keeps
starts apart by the number of failures that each machine's agent has counted, and these come to differ: an
agent that sees the others meet again before its own process has failed restarts it without counting. Its
processes then wait in another place than the others, or call dead ones, until there are no restarts left. So
here the processes agree on a name of their start themselves; each brings a word that nobody has said before.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

# What torchrun sets for each process that it starts; without all of them there is one process.
RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
START_TIMEOUT = timedelta(minutes=5)  # machines do not start at once
POLL = 0.02  # seconds


def rendezvous() -> bool:
    """Whether torchrun, or another that sets the same environment, has started several processes.

    Raises:
        ValueError: it is set in part.
    """
    given = [name for name in RENDEZVOUS if name in os.environ]
    if "WORLD_SIZE" in given and len(given) < len(RENDEZVOUS):
        missing = ", ".join(name for name in RENDEZVOUS if name not in given)
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {missing} is not set; expected to be started by "
            "torchrun, which sets them all, or none of them to be set"
        )
    return "WORLD_SIZE" in given


def join(backend: str, world_size: int) -> None:
    """Make the process group of the processes that the environment tells of.

    Raises:
        ValueError: they cannot be reached.
    """
    rank, host, port = int(os.environ["RANK"]), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = meet(TCPStore(host, port, is_master=False), rank, world_size, START_TIMEOUT)
        else:
            store = TCPStore(host, port, world_size, is_master=rank == 0, timeout=START_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    except (RuntimeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"MASTER_ADDR and MASTER_PORT are {host}:{port}; expected a port that is free, and that every "
            f"process reaches ({reason})"
        ) from error


def meet(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """The part of `store` that belongs to this start of `world_size` processes alone.

    Raises:
        TimeoutError: they were not there in time.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"word/{rank}", own)
    while time.monotonic() < deadline:
        if rank == 0:
            # As of now: the word of a process from the start before is replaced, or never confirmed.
            words = known(store, [f"word/{other}" for other in range(world_size)])
            store.set("words", json.dumps(words))
        else:
            words = json.loads((known(store, ["words"]) or ["[]"])[0])
        if len(words) == world_size and words[rank] == own:
            name = hashlib.sha256("".join(words).encode()).hexdigest()
            store.set(f"{name}/{rank}", "here")
            if store.check([f"{name}/{other}" for other in range(world_size)]):
                return PrefixStore(name, store)
        time.sleep(POLL)
    raise TimeoutError(f"{world_size} processes did not meet in {timeout.total_seconds():,.0f} s")


def known(store: Store, keys: list[str]) -> list[str]:
    """What is stored under `keys`, or nothing if one of them is missing; does not wait."""
    return [value.decode() for value in store.multi_get(keys)] if store.check(keys) else []


def restarted(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options `given` to a run, to go on from its newest checkpoint if torchrun has restarted it.

    Which it does not tell to all: a machine that comes in for another has been started once. So a run that
    may be restarted goes on whenever its folder holds it.

    Raises:
        ValueError: torchrun is to restart it, and the run's folder has no fixed name.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        return dict(given)
    if not given.get("out"):
        raise ValueError("out is not given; expected a folder, so that a restart by torchrun finds the run")
    begun = (Path(given["out"]) / "config.json").exists()
    return {**given, "resume": "auto"} if begun or not given.get("resume") else dict(given)
