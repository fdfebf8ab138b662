"""What a run takes of its machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from palm_pytorch.training import machine


@pytest.fixture
def eight_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("quota", "threads"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 1),
        ("50000 100000\n", 1),
        ("6400000 100000\n", 8),
        ("max 100000\n", 8),
        (None, 8),
    ],
)
def test_threads_keep_to_the_container_s_share(
    quota: str | None, threads: int, eight_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    machine.keep_to_quota()
    assert torch.get_num_threads() == threads
    torch.set_num_threads(8)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")  # as somebody wants it
    machine.keep_to_quota()
    assert torch.get_num_threads() == 8
