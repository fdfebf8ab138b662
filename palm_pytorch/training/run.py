"""A run: what it trains, on what, into which folder. `prepare` checks it all and builds it."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import clear_frames
from typing import Any

import torch
from torch import nn

from palm_pytorch.data.batch import Dataset
from palm_pytorch.data.dialog_dataset import DialogDataset
from palm_pytorch.data.durable import write_json
from palm_pytorch.data.opening import open_dataset
from palm_pytorch.data.tokenizer import Tokenizer, load_tokenizer
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.training.architecture import build_model, check_attention
from palm_pytorch.training.checkpoint import check_same_data, check_same_model, read_about
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.distributed import Parallel, start
from palm_pytorch.training.evaluate import count_labels
from palm_pytorch.training.logging import Row, Sink, read_metrics
from palm_pytorch.training.machine import keep_freed_memory, select_device, select_precision
from palm_pytorch.training.optim import build_optimizer
from palm_pytorch.training.parallelize import parallelize
from palm_pytorch.training.plan import Plan
from palm_pytorch.training.run_folder import FolderLock, check_folder, is_same, set_aside
from palm_pytorch.training.saver import Saver, clear_leftovers
from palm_pytorch.training.sinks import check_sinks, open_sinks
from palm_pytorch.training.state import TrainState, compute_reproducibly
from palm_pytorch.training.tensor_layout import whole_numel


@dataclass
class Run:
    """A run that is ready to train, seen from one of its processes. Training changes `state` alone.

    network: what a training step calls: the model, or what shares its work out (see `parallelize`).
    history: the rows of its metrics so far.
    events: what is to be added to them first, as kind and details.
    sinks: what else gets them.
    """

    config: TrainConfig
    data: Dataset
    precision: torch.dtype
    parallel: Parallel
    state: TrainState
    network: nn.Module
    saver: Saver
    history: list[Row]
    events: list[tuple[str, dict[str, Any]]]
    sinks: list[Sink]
    lock: FolderLock | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def __str__(self) -> str:
        """What is about to happen, for people."""
        config, state = self.config, self.state
        parameters = sum(map(whole_numel, state.model.parameters()))
        scheduled = ""
        if config.schedule_steps != config.steps:  # as of a run that goes on for longer than was planned
            scheduled = f"; learning rates of a schedule of {config.schedule_steps:,}"
        threads = f" with {torch.get_num_threads()} threads" if state.device.type == "cpu" else ""
        return (
            f"model   {config.model}: dim {config.dim}, depth {config.depth}, {config.heads} heads of "
            f"{config.dim_head}; {parameters:,} parameters\n"
            f"data    {self.data}\n"
            f"device  {state.device}{threads}, {str(self.precision).removeprefix('torch.')}\n"
            f"steps   {state.step:,} of {config.steps:,} done; one is {config.tokens_per_step:,} tokens: "
            f"{config.grad_accum} x {config.batch_size} sequences of {config.seq_len}"
            f"{f', times {config.batch_ramp}' if config.batch_ramp else ''}"
            f"{scheduled}\n"
            f"run     {self.folder}"
        )

    def resume_command(self) -> str:
        """The command line that goes on with this run, in the way that it was started."""
        script = Path(sys.argv[0])
        command = [sys.executable, str(script)] if script.suffix == ".py" else ["palm", "train"]
        resume = shlex.join(["--resume", self.config.out])
        if "TORCHELASTIC_RUN_ID" in os.environ:  # which does not tell how it was called
            return f"torchrun ... {script} {resume} --parallel {self.parallel.kind}"
        return f"{shlex.join(command)} {resume}"

    def say(self, text: str) -> None:
        """Print, once for all processes."""
        if self.parallel.is_main:
            print(text)

    def close(self) -> None:
        """Let others use the folder, and leave the process group. Nothing can be trained after that."""
        if self.lock is not None:
            self.lock.release()
        parallel = self.parallel
        # FSDP's and DDP's own must be gone before their process group is.
        del self.state, self.network, self.saver
        parallel.stop()


def prepare(**given: Any) -> Run:
    """Build the run that the `given` options of `TrainConfig` ask for, or the one that they resume.

    What can be refused is refused here, before anything is written. A damaged checkpoint is passed over for
    the one before it, unless it was named.

    Raises:
        TypeError, ValueError, OSError, ModuleNotFoundError: an option, the corpus, the checkpoint or the
            folder is not what it must be, another process is training in the folder, or Weights & Biases
            does not let this user in.
    """
    plan = Plan.of(given)
    check_sinks(plan.config.log)
    parallel, lock = start(plan.config, select_device(plan.config.device)), None
    try:
        # As the main process sees them: one that found no checkpoint would not help the others to load it.
        config, source = parallel.from_main((plan.config, plan.source))
        plan = plan._replace(config=config, source=source)
        with parallel.together():
            if parallel.is_main:
                folder = Path(config.out)
                # Not of the run itself: a process that trains there may just have written a checkpoint.
                if source is None or not is_same(folder, source.run):
                    check_folder(folder, source, restart=plan.restart)
                lock = FolderLock(folder)
                # Again: another may have begun a run there meanwhile, and none can now.
                check_folder(folder, source, restart=plan.restart)
        run = build_run(plan, parallel)
        run.lock = lock
        return run
    except BaseException as error:
        if lock is not None:
            lock.release()
        clear_frames(error.__traceback__)  # which hold the model, see Run.close
        parallel.stop()
        raise


def build_run(plan: Plan, parallel: Parallel) -> Run:
    """The run of a plan, at the newest checkpoint of its source if there is one. Its folder is locked."""
    config, source, weights, tokenizer, _ = plan
    folder = Path(config.out)
    events: list[tuple[str, dict[str, Any]]] = []
    checkpoint, about, history = None, None, []
    with parallel.together():
        if source is not None and parallel.is_main:
            checkpoint, damaged = source.choose()
            events += [("checkpoint-damaged", {"error": str(error)}) for error in damaged]
            for error in damaged:
                print(f"{error}\ngoing on from {checkpoint} instead")
    checkpoint = parallel.from_main(checkpoint)
    with parallel.together():
        if source is not None and checkpoint is not None:
            about = read_about(checkpoint)
            check_same_model(about["config"], asdict(config))
            if about["state"]["step"] > config.steps:
                raise ValueError(
                    f"steps is {config.steps}; expected at least the {about['state']['step']} done already"
                )
            history = read_metrics(source.run / "metrics.jsonl", about["state"]["metrics_rows"])
    data = open_data(config, parallel, tokenizer)
    described = describe(data)
    with parallel.together():
        if about is not None:
            check_same_data(about["data"], described)
        if weights is not None:
            weights.check_tokens(data)

    if parallel.device.type == "cpu":
        keep_freed_memory()
    compute_reproducibly(parallel.device)
    with torch.device("meta"):
        model = build_model(config, data.num_tokens)
    check_attention(model, config.dropout, parallel.device)
    check_labels(model, data, config)
    network = parallelize(model, config, parallel)
    if weights is not None:
        weights.put_into(model)
    state = TrainState(model, build_optimizer(model, config, parallel))
    saver = Saver(
        folder, parallel, {"config": asdict(config), "data": described}, config.keep, config.keep_every
    )
    if source is not None and checkpoint is not None:
        saver.load(checkpoint, state)
        events.append(("resume", {"checkpoint": checkpoint.name}))

    sinks: list[Sink] = []
    with parallel.together():
        if parallel.is_main:
            sinks = open_sinks(config.log, folder, asdict(config), history)
            clear_leftovers(folder)
            if source is not None and checkpoint is not None and is_same(folder, source.run):
                for damaged_folder in source.candidates[source.candidates.index(checkpoint) + 1 :]:
                    set_aside(damaged_folder)
            data.tokenizer.save(folder)
            write_json(folder / "config.json", asdict(config), indent=2)
    precision = select_precision(config.precision, parallel.device)
    return Run(config, data, precision, parallel, state, network, saver, history, events, sinks)


def open_data(config: TrainConfig, parallel: Parallel, tokenizer: Tokenizer | None) -> Dataset:
    """The run's data; what has to be unpacked or downloaded for them, one process does."""
    data: Dataset | None = None
    for turn in (True, False):
        with parallel.together():
            if parallel.is_main == turn:
                data = read_data(config, tokenizer)
    assert data is not None
    return data


def read_data(config: TrainConfig, tokenizer: Tokenizer | None = None) -> Dataset:
    """The data that the options name; `tokenizer` if given, instead of theirs."""
    if tokenizer is None and config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    return open_dataset(
        config.data,
        data_dir=config.data_dir,
        seq_len=config.seq_len,
        rows_per_batch=config.batch_size * config.grad_accum,
        tokenizer=tokenizer,
        num_values=config.num_tokens,
        dtype=config.data_dtype,
        documents=config.documents,
        text_column=config.text_column,
        data_config=config.data_config,
        data_split=config.data_split,
        verify_all=config.verify_data,
    )


def check_labels(model: LanguageModel, data: Dataset, config: TrainConfig) -> None:
    """Raise a ValueError if a model with a prefix is given data that have nothing to predict behind it."""
    batches = data.held_out("valid").batches(config.seq_len, config.batch_size, config.eval_windows)
    if not any(count_labels(model, batch) for batch in batches):
        raise ValueError(
            f"cross_attn_seq_len is {config.cross_attn_seq_len}; expected less, since the held-out sequences "
            f"of {data.name} have nothing to predict behind it"
        )


def describe(data: Dataset) -> dict[str, Any]:
    """What recognises the data, and their tokenizer, again."""
    tokenizer = data.tokenizer.fingerprint
    dialog = isinstance(data, DialogDataset)
    return {"name": data.name, "fingerprint": data.fingerprint, "tokenizer": tokenizer, "dialog": dialog}
