"""A run: what it trains, on what, into which folder. `prepare` checks it all and builds it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from traceback import clear_frames
from typing import Any

import torch
from torch import nn

from palm_pytorch.data.batch import Dataset
from palm_pytorch.data.dialog_dataset import DialogDataset
from palm_pytorch.data.opening import open_dataset
from palm_pytorch.data.tokenizer import Tokenizer, load_tokenizer, stored_tokenizer
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.training.architecture import build_model, check_attention
from palm_pytorch.training.checkpoint import Source, check_same_data, check_same_model, read_about
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.distributed import Parallel, start
from palm_pytorch.training.evaluate import count_labels
from palm_pytorch.training.initial_weights import InitialWeights
from palm_pytorch.training.logging import Row, Sink, read_metrics
from palm_pytorch.training.machine import keep_freed_memory, select_device, select_precision
from palm_pytorch.training.manifest import DamagedError, write_durably
from palm_pytorch.training.optim import build_optimizer
from palm_pytorch.training.parallelize import parallelize
from palm_pytorch.training.rendezvous import restarted
from palm_pytorch.training.run_folder import FolderLock, check_folder, is_same, set_aside
from palm_pytorch.training.saver import Saver, clear_leftovers
from palm_pytorch.training.sinks import check_sinks, open_sinks
from palm_pytorch.training.state import TrainState, compute_reproducibly

OF_ONE_START = ("parallel", "tensor_parallel")  # options that describe its machines, not the run


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
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
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
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
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
    if given.get("init") and given.get("resume") and not (given["resume"] == "auto" and given.get("out")):
        raise ValueError(
            f"init is {given['init']!r} and resume {given['resume']!r}; expected one of them, or resume "
            "'auto' and out, to start from init where out has no checkpoint yet"
        )
    given = restarted(given)
    source = Source.find(given["resume"], given.get("out")) if given.get("resume") else None
    restart = bool(given.get("resume")) and source is None
    weights, tokenizer = None, None
    if source is None:
        if restart:
            given = keep_precision(given, stored_config(Path(given["out"])))
        if given.get("init"):
            weights = InitialWeights.read(given["init"], given)
            given, tokenizer = {**given, **weights.options}, weights.tokenizer
        config = TrainConfig.for_machine(**given)
    else:
        saved = read_config(source)
        check_same_model(saved, given)
        tokenizer = stored_tokenizer(source.run)
        kept = {name: value for name, value in saved.items() if name not in OF_ONE_START}
        if "lr" in given and kept.get("min_lr") == kept["lr"] / 10:  # which was worked out, and is anew
            del kept["min_lr"]
        config = TrainConfig.for_machine(**{**kept, "out": str(source.run), **keep_precision(given, saved)})
    if given.get("tokenizer") is not None:
        tokenizer = load_tokenizer(given["tokenizer"])
    check_sinks(config.log)
    parallel, lock = start(config, select_device(config.device)), None
    try:
        # As the main process sees them: one that found no checkpoint would not help the others to load it.
        config, source = parallel.from_main((config, source))
        with parallel.together():
            if parallel.is_main:
                folder = Path(config.out)
                # Not of the run itself: a process that trains there may just have written a checkpoint.
                if source is None or not is_same(folder, source.run):
                    check_folder(folder, source, restart=restart)
                lock = FolderLock(folder)
                # Again: another may have begun a run there meanwhile, and none can now.
                check_folder(folder, source, restart=restart)
        return build_run(config, source, parallel, lock, weights, tokenizer)
    except BaseException as error:
        if lock is not None:
            lock.release()
        clear_frames(error.__traceback__)  # which hold the model, see Run.close
        parallel.stop()
        raise


def keep_precision(given: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with the precision that "auto" was when the run began: measured anew it might be another."""
    if "precision" in saved and given.get("precision", "auto") == "auto":
        return {**given, "precision": saved["precision"]}
    return given


def stored_config(run: Path) -> dict[str, Any]:
    """The options that the run in a folder was last started with; none where the folder does not tell."""
    try:
        options = dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    return options if "model" in options else {}


def read_config(source: Source) -> dict[str, Any]:
    """The options of the run that is resumed: those that it was last started with, or a checkpoint's.

    Raises:
        DamagedError: neither the run's folder nor one of its checkpoints tells them.
    """
    if saved := stored_config(source.run):
        return saved
    damaged: list[DamagedError] = []
    for folder in reversed(source.candidates):
        try:
            return dict(read_about(folder)["config"])
        except DamagedError as error:
            damaged.append(error)
    raise DamagedError("; ".join(map(str, damaged)))


def build_run(
    config: TrainConfig,
    source: Source | None,
    parallel: Parallel,
    lock: FolderLock | None,
    weights: InitialWeights | None,
    tokenizer: Tokenizer | None,
) -> Run:
    """The run of `config`, at the state of a checkpoint of `source` if that is given, or at the start, from
    `weights` if they are. `tokenizer` is that of the options, or else of what it goes on from; `lock`, of the
    main process, is on the run's folder.
    """
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
            history = read_history(source.run, about["state"]["metrics_rows"])
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
            write_durably(folder / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    precision = select_precision(config.precision, parallel.device)
    return Run(config, data, precision, parallel, state, network, saver, history, events, sinks, lock)


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


def read_history(run: Path, rows: int) -> list[Row]:
    """The first `rows` rows of a run's metrics: those that belong to a checkpoint that counted them."""
    metrics = run / "metrics.jsonl"
    return read_metrics(metrics, rows) if metrics.exists() else []
