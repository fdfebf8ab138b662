"""What each rank does in the tests of distributed training, and the same by one process alone."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR
from palm_pytorch.data.batch import Batch
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.training import faults, step
from palm_pytorch.training.checkpoint import step_folder
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.distributed import Parallel, start
from palm_pytorch.training.evaluate import batch_loss
from palm_pytorch.training.gradient_norm import clip_gradients, pieces
from palm_pytorch.training.loop import train as train_run
from palm_pytorch.training.optim import build_optimizer, set_learning_rate
from palm_pytorch.training.parallelize import accumulating, parallelize
from palm_pytorch.training.resharding import whole
from palm_pytorch.training.run import prepare
from palm_pytorch.training.saver import Saver
from palm_pytorch.training.state import TrainState
from palm_pytorch.training.tensor_layout import whole_numel

# A vocabulary and a width that no number of ranks divides.
SHAPE: dict[str, Any] = {"num_tokens": 257, "dim": 30, "depth": 2, "heads": 4, "dim_head": 6, "ff_mult": 2}
PREFIX: dict[str, Any] = {"max_seq_len": 16, "cross_attn_seq_len": 6}
MODELS: dict[str, Callable[[], LanguageModel]] = {
    "palm": lambda: PaLM(**SHAPE, qk_norm=True, xpos=True),
    "palm-lite": lambda: PaLMLite(**SHAPE, qk_norm=True),
    "lamda": lambda: LaMDA(**SHAPE),
    "lamda-4-kv-heads": lambda: LaMDA(**SHAPE, kv_heads=4, tie_embeddings=False, bias=True),
    "perceiver-ar": lambda: PerceiverAR(**SHAPE, **PREFIX, perceive_depth=2),
    "perceiver-ar-1-kv-head": lambda: PerceiverAR(**SHAPE, **PREFIX, kv_heads=1),
}
STEPS, SLICES, ROWS, MAX_NORM, Z_LOSS = 2, 2, 4, 0.5, 1e-3


class Trained(NamedTuple):
    """Of a few steps: the loss and gradient norm of each, the first's gradient before clipping, and the
    parameters at the end, and how many numbers these are, all of the whole model; and what is on every tensor
    rank."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    size: int
    replicas: dict[str, Tensor]


def tokens() -> Tensor:
    """(steps, slices, rows, positions)"""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, SHAPE["num_tokens"], (STEPS, SLICES, ROWS, 17), generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # A large epsilon, without which a gradient of next to 0 has its rounding errors blown up.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, fused=True)


def config_of(kind: str, **options: Any) -> TrainConfig:
    shape = {name: size for name, size in SHAPE.items() if name != "num_tokens"}
    return TrainConfig.for_machine(device="cpu", parallel=kind, batch_size=ROWS, **{**shape, **options})


def new_model(name: str) -> LanguageModel:
    with torch.device("meta"):
        return MODELS[name]()


def train_alone(name: str) -> Trained:
    """By one process and PyTorch's own means, all slices of a step at once."""
    model = new_model(name).to_empty(device="cpu")
    torch.manual_seed(config_of("none").seed)
    model.init_weights()
    optimizer = optimizer_of(model)
    losses, norms, gradients = [], [], {}
    for rows in tokens().flatten(1, 2):
        loss = model(rows[:, :-1], labels=rows[:, 1:], z_loss=Z_LOSS)
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters()}
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    size = sum(parameter.numel() for parameter in model.parameters())
    return Trained(losses, norms, gradients, {n: p.detach() for n, p in model.named_parameters()}, size, {})


@contextmanager
def started(config: TrainConfig) -> Iterator[Parallel]:
    parallel = start(config, torch.device("cpu"))
    try:
        yield parallel
    finally:
        parallel.stop()
        if config.compile:
            torch.compiler.reset()


def train_together(names: list[str], kind: str, options: dict[str, Any]) -> list[Trained]:
    config = config_of(kind, **options)
    with started(config) as parallel:
        return [train(name, config, parallel) for name in names]


class Training:
    """A model in training on these processes."""

    def __init__(self, name: str, config: TrainConfig, parallel: Parallel) -> None:
        self.parallel, self.model = parallel, new_model(name)
        # Compiled code as it is traced, without what a backend would make of it.
        with mock.patch("torch.compile", wraps=partial(torch.compile, backend="eager")) as compile:
            self.network = parallelize(self.model, config, parallel)
        shape = self.model.config
        blocks = shape["depth"] + shape.get("perceive_depth", 0)
        assert compile.call_count == (blocks if config.compile else 0)
        self.optimizer = optimizer_of(self.model)

    def slice_loss(self, rows: Tensor, *, last: bool) -> float:
        """Of this process's rows, whose gradient is added to the others'."""
        mine = self.parallel.rows(len(rows))
        part = rows[mine.start : mine.stop]
        with accumulating(self.network, last):
            loss = self.network(part[:, :-1], labels=part[:, 1:], z_loss=Z_LOSS) / SLICES
            loss.backward()
        return loss.item()

    def accumulate(self, slices: Tensor) -> float:
        """Of all slices of a step and all processes."""
        total = sum(self.slice_loss(rows, last=n == SLICES - 1) for n, rows in enumerate(slices))
        return self.parallel.sum([total])[0] / self.parallel.data_ranks

    def update(self) -> float:
        """Take the step; returns the norm of its gradient."""
        norm = clip_gradients(self.model, MAX_NORM, self.parallel)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()

    def gradients(self) -> dict[str, Tensor]:
        return {name: full(p, p.grad) for name, p in self.model.named_parameters()}

    def parameters(self) -> dict[str, Tensor]:
        return {name: full(p, p) for name, p in self.model.named_parameters()}

    def replicas(self) -> dict[str, Tensor]:
        """What every tensor rank has of itself, and should have alike."""
        return {
            f"{name} {number}": piece.clone()
            for name, parameter in self.model.named_parameters()
            for number, (piece, split) in enumerate(pieces(parameter, local(parameter), self.parallel))
            if not split
        }

    def state(self) -> dict[str, Tensor]:
        """Model and optimizer, of the whole model."""
        state = {
            f"{name} {kind}": full(parameter, value)
            for name, parameter in self.model.named_parameters()
            for kind, value in self.optimizer.state[parameter].items()
        }
        return state | self.parameters()


def train(name: str, config: TrainConfig, parallel: Parallel) -> Trained:
    training = Training(name, config, parallel)
    losses, norms, gradients = [], [], {}
    for slices in tokens():
        losses.append(training.accumulate(slices))
        clip_gradients(training.model, 1000.0, parallel)  # leaves one alone that is smaller
        gradients = gradients or training.gradients()
        norms.append(training.update())
    size = sum(map(whole_numel, training.model.parameters()))
    return Trained(losses, norms, gradients, training.parameters(), size, training.replicas())


def save(names: list[str], folder: Path, kind: str, options: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Train for a step, validate, and write a checkpoint of each model; what is in them."""
    saved = {}
    config = config_of(kind, **options)
    with started(config) as parallel:
        for name in names:
            training = Training(name, config, parallel)
            training.accumulate(tokens()[0])
            training.update()
            with torch.no_grad():
                training.model(tokens()[1, 0, :, :-1])
            saved[name] = training.state()
            saver = Saver(folder / name, parallel, {"config": {}, "data": {}}, keep=1)
            saver.save(TrainState(training.model, training.optimizer, step=1))
            assert saver.wait() is None
    return saved


def load(names: list[str], folders: list[Path], kind: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What is in the checkpoints of each model in each folder; read into models of another seed."""
    config, found = config_of(kind, seed=1, **options), []
    with started(config) as parallel:
        for folder in folders:
            loaded = {}
            for name in names:
                training = Training(name, config, parallel)
                saver = Saver(folder / name, parallel, {}, keep=1)
                saver.load(step_folder(folder / name, 1), TrainState(training.model, training.optimizer))
                loaded[name] = training.state()
            found.append(loaded)
    return found


def synchronized(kind: str, options: dict[str, Any]) -> list[bool]:
    """After each slice of a step, whether the processes have the same gradient of the embedding."""
    same = []
    config = config_of(kind, **options)
    with started(config) as parallel:
        training = Training("palm", config, parallel)
        for number, rows in enumerate(tokens()[0]):
            training.slice_loss(rows, last=number == SLICES - 1)
            gradient = training.model.token_emb.weight.grad
            values: list[Any] = [None] * parallel.world_size
            dist.all_gather_object(values, None if gradient is None else full(gradient, gradient))
            same.append(values[0] is not None and all(torch.equal(v, values[0]) for v in values))
    return same


def train_poisoned(kind: str, options: dict[str, Any]) -> tuple[list[bool], list[dict[str, Tensor]]]:
    """Two steps as `palm train` takes them, of which the first has an infinite loss on the last process:
    whether each was taken, and the parameters before and after them."""
    config = config_of(kind, **options)
    with started(config) as parallel:
        training = Training("palm", config, parallel)
        state = TrainState(training.model, training.optimizer)
        run: Any = SimpleNamespace(
            config=config, state=state, network=training.network, parallel=parallel, precision=torch.float32
        )
        updated, parameters = [], [training.parameters()]
        for number, slices in enumerate(tokens()):
            mine = parallel.rows(ROWS)
            rows = [part[mine.start : mine.stop] for part in slices]
            batches = [Batch(part[:, :-1], part[:, 1:]) for part in rows]
            factor = math.inf if number == 0 and parallel.rank == parallel.world_size - 1 else 1.0
            with mock.patch.object(
                step, "batch_loss", lambda *inputs, f=factor, **more: f * batch_loss(*inputs, **more)
            ):
                updated.append(step.train_step(run, batches).updated)
            parameters.append(training.parameters())
        return updated, parameters


def train_through_faults(
    run_options: dict[str, Any], kind: str, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A run as `palm train` makes it, of which the last process alone finds an infinite loss at batch 3 and
    a spike at batch 11: the numbers of its state at the end, but the seconds, and its parameters."""
    run = prepare(**run_options, parallel=kind, **options)

    def wrong_loss(*inputs: Any, **more: Any) -> Tensor:
        loss = batch_loss(*inputs, **more)
        if run.parallel.rank == run.parallel.world_size - 1:
            wrong = {3: math.inf, 11: 1000.0}  # the gradient is right
            loss = loss + wrong.get(run.state.batch_index, 0.0)
        return loss

    try:
        with (
            mock.patch.object(faults, "SPIKE_WINDOW", 5),
            mock.patch.object(step, "batch_loss", wrong_loss),
        ):
            train_run(run)
        numbers = {name: value for name, value in run.state.numbers().items() if name != "seconds"}
        return numbers, {name: full(p, p) for name, p in run.state.model.named_parameters()}
    finally:
        run.close()


def held_after_backward(kind: str, options: dict[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of tensors that keep a graph alive when the backward pass of each model is over."""
    held = {}
    config = config_of(kind, **options)
    with started(config) as parallel:
        for name in MODELS:
            training = Training(name, config, parallel)
            before = with_a_graph()  # a compiler's own
            training.slice_loss(tokens()[0, 0], last=True)
            held[name] = [tuple(t.shape) for number, t in with_a_graph().items() if number not in before]
    return held


def with_a_graph() -> dict[int, Tensor]:
    """All tensors in memory that a graph goes through, by their ids."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return {id(tensor): tensor for tensor in tensors if tensor.grad_fn is not None}


def train_by_recipe(name: str, kind: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """The parameters after steps of PaLM's optimizer."""
    config = config_of(kind, optimizer="adafactor", **options)
    with started(config) as parallel:
        training = Training(name, config, parallel)
        training.optimizer = build_optimizer(training.model, config, parallel)
        set_learning_rate(training.optimizer, 1e-2)
        for slices in tokens():
            training.accumulate(slices)
            training.update()
        return training.parameters()


def full(parameter: Tensor, tensor: Tensor | None) -> Tensor:
    """A copy, of the whole model."""
    assert tensor is not None
    tensor = whole(parameter, tensor.detach())
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
