"""Everything that changes while a run trains, and the seeds of its random streams, which need no storing.

A step is a function of the parameters, the optimizer's state, the seed, the step's number and the number of
its batch alone: every random stream is seeded anew at its start. So no stream outlives a step, nothing of one
is stored, and a run that stopped and went on computes the same bits as one that never did. PaLM's authors
trained reproducibly bit by bit in this way (arXiv 2204.02311, section 5).
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from palm_pytorch.training.resharding import whole


@dataclass
class TrainState:
    """Model, optimizer, and the numbers that say where a run is.

    Attributes:
        step: optimizer steps done, those included whose update was skipped.
        batch_index: the global batch that is read next. Ahead of `step` once batches have been passed over.
        tokens: input tokens that were read.
        seconds: the time that the steps took.
        skipped_steps: steps without an update, because loss or gradient was not finite.
        skipped_in_a_row: how many of them were the last steps.
        rollbacks: how often the run went back to an earlier checkpoint because its loss rose suddenly.
        passed_over: batches `[first, last)` that are never read, around such a rise.
        recent_losses: of the last steps, in order: what a rise is measured against.
        best_step, best_loss: of the best validation so far, in nats per token.
        due: what the last step is still to be followed by ("valid", "sample"): a stop came before it.
        metrics_rows: how many rows of the run's metrics belong to this state.
    """

    model: nn.Module
    optimizer: Optimizer
    step: int = 0
    batch_index: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    passed_over: list[list[int]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float | None = None
    due: list[str] = field(default_factory=list)
    metrics_rows: int = 0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def advance(self, tokens: int, seconds: float, batches: int = 1) -> None:
        """Count one more step, and the batches that it read."""
        self.step += 1
        for _ in range(batches):
            self.batch_index = next_batch(self.batch_index + 1, self.passed_over)
        self.tokens += tokens
        self.seconds += seconds

    def numbers(self) -> dict[str, Any]:
        """All but model and optimizer, as plain values for JSON, which gives every float back as it was."""
        names = [spec.name for spec in fields(self) if spec.name not in ("model", "optimizer")]
        return {name: getattr(self, name) for name in names}

    def set_numbers(self, saved: Mapping[str, Any]) -> None:
        for name in self.numbers():
            if name in saved:
                setattr(self, name, saved[name])

    def tensors(self) -> dict[str, dict[str, Any]]:
        """`{"model": {name: tensor}, "optimizer": {name: {kind: tensor}}}`, by the parameters' names.

        The tensors are the live ones where they can be. Names and shapes are those of the plain model,
        however it is spread over processes, all of which call this.

        Raises:
            TypeError: the optimizer's state has something that is no tensor.
        """
        model, optimizer = dict[str, Tensor](), dict[str, dict[str, Tensor]]()
        for name, parameter in self.model.named_parameters():
            model[name] = whole(parameter, parameter.detach())
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"the optimizer's {kind} of {name} is {value!r}; expected a tensor")
                optimizer.setdefault(name, {})[kind] = whole(parameter, value)
        return {"model": model, "optimizer": optimizer}

    def set_optimizer_tensors(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Have the optimizer go on from `saved`; its hyper-parameters stay those of this run's options."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        order = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        by_index = {index: dict(saved[names[p]]) for index, p in enumerate(order) if names[p] in saved}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": by_index})


def next_batch(index: int, passed_over: list[list[int]]) -> int:
    """The first batch from `index` on that is not passed over."""
    for first, last in sorted(passed_over):
        if first <= index < last:
            index = last
    return index


# ----------------------------------------------------------------------------------------- random streams


def derive_seed(seed: int, *names: int | str) -> int:
    """A seed of 63 bits for the stream that `names` describe: a hash, so that streams share nothing."""
    text = ":".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_streams(seed: int, *names: int | str) -> None:
    """Start the random streams of Python, NumPy, PyTorch and every GPU from `seed` and `names`."""
    derived = derive_seed(seed, *names)
    random.seed(derived)
    np.random.seed(derived % 2**32)
    torch.manual_seed(derived)  # of all devices


def seed_step(seed: int, step: int, data_rank: int) -> None:
    """Start every stream for a step. Ranks that read other rows draw other numbers."""
    seed_streams(seed, "step", step, data_rank)


def compute_reproducibly(device: torch.device) -> None:
    """Have `device` compute the same bits each time.

    A CPU does so by itself for a given number of threads; CUDA has to be told.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow
