from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import distributed_training as cases
import pytest
import torch
import torch.distributed as dist
from ranks import environment
from torch._C._distributed_c10d import HashStore, Store

from palm_pytorch.training.distributed import start
from palm_pytorch.training.rendezvous import meet, restarted

SOON = timedelta(seconds=30)


def meet_all(store: Store, ranks: range, size: int) -> list[Store]:
    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(lambda rank: meet(store, rank, size, SOON), ranks))


def test_each_start_has_a_part_of_the_store_of_its_own() -> None:
    """Of the start before everything is still there; a process of it that nobody waits for, too."""
    store = HashStore()
    first = meet_all(store, range(3), 3)
    first[0].set("address", "of the first start")
    with pytest.raises(TimeoutError, match="3 processes did not meet"):
        meet(store, 0, 3, timedelta(seconds=0.2))  # killed before the others were there
    with ThreadPoolExecutor(1) as early:
        others = early.submit(meet_all, store, range(1, 3), 3)
        second = [meet(store, 0, 3, SOON), *others.result()]
    assert not any(each.check(["address"]) for each in second)
    second[2].set("address", "of the second start")
    assert [each.get("address") for each in second] == [b"of the second start"] * 3
    assert first[1].get("address") == b"of the first start"


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, WORLD_SIZE=2, RANK=0)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT is not set"):
        start(cases.config_of("ddp"), torch.device("cpu"))


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if dist.is_initialized():  # by a run of another test, and a process has one group
        dist.destroy_process_group()
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        environment(monkeypatch, WORLD_SIZE=1, RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}; expected a port that is free"):
            start(cases.config_of("none"), torch.device("cpu"))


def test_what_may_be_restarted_goes_on_in_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment(monkeypatch)
    assert restarted({"steps": 3}) == {"steps": 3}
    environment(monkeypatch, TORCHELASTIC_MAX_RESTARTS=2, TORCHELASTIC_RESTART_COUNT=0)
    with pytest.raises(ValueError, match="out is not given; expected a folder"):
        restarted({"steps": 3})
    given = {"out": str(tmp_path), "resume": "another"}
    assert restarted(given) == given
    (tmp_path / "config.json").write_text("{}")
    assert restarted(given) == {"out": str(tmp_path), "resume": "auto"}
    assert restarted({"out": str(tmp_path)}) == {"out": str(tmp_path), "resume": "auto"}
