"""The batches of a run in order, read ahead by worker processes if there are any.

A batch is a function of seed, batch number and rows (see `data.batch.Dataset`), so that neither the number of
workers, nor that of processes, nor a restart changes which tokens a step reads.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from palm_pytorch.data.batch import Batch, Dataset
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.distributed import Parallel
from palm_pytorch.training.faults import STOP_SIGNALS
from palm_pytorch.training.prefix_truncation import truncated_prefix
from palm_pytorch.training.schedule import batches_at
from palm_pytorch.training.state import TrainState, next_batch


class Slice(NamedTuple):
    """What one process reads of one slice of a step: these rows of the global batch of this number."""

    batch: int
    rows: range


@dataclass(frozen=True)
class Slices(MapDataset[Batch]):
    """A data set that is read by slices, in workers too."""

    data: Dataset
    config: TrainConfig

    def __getitem__(self, wanted: Slice) -> Batch:
        config, (index, rows) = self.config, wanted
        share, prefix_len = config.prefix_truncation, config.cross_attn_seq_len
        batch = self.data.batch(seed=config.seed, index=index, rows=rows)
        if not share or prefix_len is None:
            return batch
        mask = truncated_prefix(share=share, prefix_len=prefix_len, seed=config.seed, index=index, rows=rows)
        return batch._replace(prefix_mask=mask)


def slices(
    config: TrainConfig, parallel: Parallel, *, step: int, index: int, passed_over: list[list[int]]
) -> Iterator[Slice]:
    """What this process reads from `step` on, whose first batch is number `index`.

    A step reads `batches_at` whole batches, so that a batch ramp leaves their order as it is.
    """
    size = config.batch_size
    mine = parallel.rows(size)
    for number in range(step, config.steps):
        for _ in range(batches_at(number, config)):
            for part in range(config.grad_accum):
                yield Slice(index, range(part * size + mine.start, part * size + mine.stop))
            index = next_batch(index + 1, passed_over)


class Loader:
    """The slices of a run, step by step. `seek` before the first `read`, and after going back.

    Workers end with the `with` statement, whatever ends that.
    """

    def __init__(self, data: Dataset, config: TrainConfig, parallel: Parallel) -> None:
        self.data, self.config, self.parallel = data, config, parallel
        self._batches: Iterator[Batch] | None = None
        self._step = 0

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def seek(self, state: TrainState) -> None:
        """Go on at the batch that `state` reads next."""
        self.close()
        self._step = state.step
        wanted = slices(
            self.config,
            self.parallel,
            step=state.step,
            index=state.batch_index,
            passed_over=state.passed_over,
        )
        loader: Any = DataLoader(
            Slices(self.data, self.config),
            batch_size=None,
            sampler=wanted,
            num_workers=self.config.num_workers,
            worker_init_fn=leave_signals_alone,
            pin_memory=self.parallel.device.type == "cuda",
            # Its workers' seeds come from here, or opening it would draw from PyTorch's own stream.
            generator=torch.Generator(),
        )
        self._batches = iter(loader)

    def read(self) -> list[Batch]:
        """The slices of one step, on the CPU."""
        assert self._batches is not None, "seek comes first"
        number = batches_at(self._step, self.config) * self.config.grad_accum
        batches = [next(self._batches) for _ in range(number)]
        self._step += 1
        return batches

    def close(self) -> None:
        """End the workers."""
        batches, self._batches = self._batches, None
        shut_down = getattr(batches, "_shutdown_workers", None)  # else a traceback would keep them alive
        if shut_down is not None:
            shut_down()


def leave_signals_alone(worker: int) -> None:
    """Have a worker live until its run ends: signals to stop come to all processes, and the run needs batches
    to finish its step.
    """
    for name in STOP_SIGNALS:
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)
