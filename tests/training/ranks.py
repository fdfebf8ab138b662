"""A few processes that stand for the machines of a distributed run; each test gives them something to do."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

PATIENCE = 120  # seconds


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def environment(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    """Have the environment be that of no torchrun, but for `variables`."""
    for name in list(os.environ):
        if name.startswith("TORCHELASTIC") or name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


class Ranks:
    """Processes that live as long as a test module, since each takes seconds to import torch."""

    def __init__(self, number: int) -> None:
        # On Linux a process that has imported what they need has them all as children.
        server = "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if server else "spawn")
        if server:
            context.set_forkserver_preload(["distributed_training"])
        self.pipes, self.processes = [], []
        for _ in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on each of `world_size` ranks, in the environment that torchrun gives them; what
        it returns, by rank."""
        port = free_port()
        for rank, pipe in enumerate(self.pipes[:world_size]):
            pipe.send((rank, world_size, port, function, args))
        results = []
        for rank, pipe in enumerate(self.pipes[:world_size]):
            assert pipe.poll(PATIENCE), f"rank {rank} of {world_size} is still at {function.__name__}"
            results.append(pipe.recv())
        for rank, (_, failure) in enumerate(results):
            assert failure is None, f"rank {rank} of {world_size}: {failure}"
        return [result for result, _ in results]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills uninitialised memory with NaN
    while True:
        rank, world_size, port, function, args = pipe.recv()
        sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ |= {name: str(size) for name, size in sizes.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            pipe.send((function(*args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
