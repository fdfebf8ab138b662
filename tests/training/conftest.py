from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TEXT = "the quick brown fox jumps over the lazy dog; " * 400


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """Options of a run that takes a second, on a text that is easy to learn."""
    (tmp_path / "text.txt").write_text(TEXT)
    return {
        "data": str(tmp_path / "text.txt"),
        "data_dir": str(tmp_path / "data"),
        "out": str(tmp_path / "run"),
        **{"dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "ff_mult": 2, "seq_len": 16, "batch_size": 4},
        **{"steps": 6, "eval_windows": 5, "test_windows": 7, "generate_every": 3, "generate_length": 4},
        **{"eval_every": 3, "save_every": 2, "device": "cpu", "precision": "float32", "seed": 7},
        "peak_flops": 1e12,
    }


@pytest.fixture(autouse=True)
def keep_random_streams_and_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
