"""The same batches in the same order, however they are read: by no worker or several, from any step on."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from palm_pytorch.data.batch import Batch
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.loader import Loader
from palm_pytorch.training.state import TrainState


class Numbers:
    """Each row holds seed, batch number and row number."""

    def batch(self, *, seed: int, index: int, rows: range) -> Batch:
        tokens = torch.tensor([[seed, index, row] for row in rows])
        return Batch(tokens, tokens)


class Broken:
    def batch(self, **wanted: Any) -> Batch:
        raise RuntimeError("a disk has failed")


class Rank(SimpleNamespace):
    """Of several processes that share a batch, as `Parallel` has it."""

    device = torch.device("cpu")

    def rows(self, batch_size: int) -> range:
        share = batch_size // self.data_ranks
        return range(self.data_rank * share, (self.data_rank + 1) * share)


ONE: Any = Rank(data_rank=0, data_ranks=1)


def new_state(**numbers: Any) -> TrainState:
    return TrainState(nn.Linear(1, 1), AdamW([nn.Parameter(torch.zeros(1))]), **numbers)


def config(**options: Any) -> TrainConfig:
    shape = {"steps": 6, "batch_size": 4, "grad_accum": 2, "seed": 9, "out": "run", "device": "cpu"}
    return TrainConfig.for_machine(**{**shape, **options})


def read_all(loader: Loader, state: TrainState, steps: int) -> list[list[Tensor]]:
    loader.seek(state)
    return [[batch.tokens for batch in loader.read()] for _ in range(steps)]


def rows(read: list[list[Tensor]]) -> list[list[list[list[int]]]]:
    return [[part.tolist() for part in step] for step in read]


def test_a_step_reads_its_slices_of_its_batch() -> None:
    with Loader(Numbers(), config(), ONE) as loader:  # type: ignore[arg-type]
        read = rows(read_all(loader, new_state(), 2))
    assert read[1] == [
        [[9, 1, row] for row in (0, 1, 2, 3)],
        [[9, 1, row] for row in (4, 5, 6, 7)],
    ]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_workers_and_restarts_change_nothing(num_workers: int) -> None:
    skips = [[2, 4]]
    with Loader(Numbers(), config(), ONE) as loader:  # type: ignore[arg-type]
        straight = rows(read_all(loader, new_state(passed_over=skips), 6))
    assert [step[0][0][1] for step in straight] == [0, 1, 4, 5, 6, 7]
    with Loader(Numbers(), config(num_workers=num_workers), ONE) as loader:  # type: ignore[arg-type]
        state = new_state(passed_over=skips)
        first = rows(read_all(loader, state, 3))
        for _ in range(3):
            state.advance(1, 1.0)
        rest = rows(read_all(loader, state, 3))
    assert first + rest == straight


def test_ranks_read_the_rows_of_a_batch_once_each() -> None:
    with Loader(Numbers(), config(), ONE) as loader:  # type: ignore[arg-type]
        (whole,) = read_all(loader, new_state(), 1)
    shares = []
    for rank in range(2):
        with Loader(Numbers(), config(), Rank(data_rank=rank, data_ranks=2)) as loader:  # type: ignore[arg-type]
            (share,) = read_all(loader, new_state(), 1)
        shares.append(share)
    assert all(torch.equal(torch.cat(parts), part) for *parts, part in zip(*shares, whole, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pytorchs_own_stream_is_left_alone(num_workers: int) -> None:
    state = new_state()  # whose layer draws its weights
    before = torch.get_rng_state()
    with Loader(Numbers(), config(num_workers=num_workers), ONE) as loader:  # type: ignore[arg-type]
        read_all(loader, state, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_end_with_the_run_also_when_it_fails() -> None:
    with (
        pytest.raises(RuntimeError, match="a disk has failed") as failure,
        Loader(Broken(), config(num_workers=2), ONE) as loader,  # type: ignore[arg-type]
    ):
        loader.seek(new_state())
        assert len(multiprocessing.active_children()) == 2
        loader.read()
    assert multiprocessing.active_children() == []
    assert failure.traceback  # which still holds the frames that the loader was in
