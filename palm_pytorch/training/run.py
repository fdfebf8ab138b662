"""A run: what it trains, on what, into which folder. `prepare` checks it all and builds it."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR
from palm_pytorch.data.corpus import Corpus, open_corpus
from palm_pytorch.data.windows import NUM_TOKENS, Splits, split_corpus
from palm_pytorch.training.checkpoint import (
    TrainState,
    check_same_model,
    complete_checkpoints,
    find_checkpoint,
    load_checkpoint,
    seed_everything,
)
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.logging import Row, read_metrics
from palm_pytorch.training.machine import keep_freed_memory, select_device, select_precision
from palm_pytorch.training.optim import build_optimizer


@dataclass(frozen=True)
class Run:
    """A run that is ready to train. Only `state` changes; `history` is the metrics of the steps done."""

    config: TrainConfig
    corpus: Corpus
    splits: Splits
    precision: torch.dtype
    state: TrainState
    history: list[Row]

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
        sizes = ", ".join(f"{name} {len(part):,}" for name, part in self.splits._asdict().items())
        threads = f" with {torch.get_num_threads()} threads" if state.device.type == "cpu" else ""
        return (
            f"model   {config.model}: dim {config.dim}, depth {config.depth}, {config.heads} heads of "
            f"{config.dim_head}; {parameters:,} parameters\n"
            f"data    {self.corpus.name}: {self.corpus.origin}; bytes to {sizes}\n"
            f"device  {state.device}{threads}, {str(self.precision).removeprefix('torch.')}\n"
            f"steps   {state.step:,} of {config.steps:,} done; one is {config.tokens_per_step:,} tokens: "
            f"{config.grad_accum} x {config.batch_size} sequences of {config.seq_len}\n"
            f"run     {self.folder}"
        )

    def resume_command(self) -> str:
        """The command line that goes on with this run, in the way that it was started."""
        script = Path(sys.argv[0])
        command = [sys.executable, str(script)] if script.suffix == ".py" else ["palm", "train"]
        return shlex.join([*command, "--resume", self.config.out])


def prepare(**given: Any) -> Run:
    """Build the run that the `given` options of `TrainConfig` ask for, or the one that they resume.

    What can be refused is refused here, before anything is written.

    Raises:
        TypeError, ValueError, OSError, ModuleNotFoundError: an option, the corpus, the checkpoint or the
            folder is not what it must be.
    """
    checkpoint = find_checkpoint(given["resume"], given.get("out")) if given.get("resume") else None
    if checkpoint is None:
        config, saved, history = TrainConfig.for_machine(**given), None, []
    else:
        saved = load_checkpoint(checkpoint)
        check_same_model(saved["config"], given)
        source = checkpoint.parent.parent
        config = TrainConfig(**{**saved["config"], "out": str(source), **given})
        if saved["step"] > config.steps:
            raise ValueError(f"steps is {config.steps}; expected at least the {saved['step']} done already")
        history = history_until(saved["step"], source / "metrics.jsonl")
    check_folder(Path(config.out), checkpoint, restart=bool(config.resume) and checkpoint is None)

    device = select_device(config.device)
    corpus = open_corpus(config.data, config.data_dir)
    splits = split_corpus(corpus, config.seq_len)

    if device.type == "cpu":
        keep_freed_memory()
    seed_everything(config.seed, device)
    model = build_model(config).to(device)
    optimizer = build_optimizer(model, weight_decay=config.weight_decay)
    state = TrainState(model, optimizer, config, corpus)
    if saved is not None:
        state.load_state_dict(saved)

    run = Run(config, corpus, splits, select_precision(config.precision, device), state, history)
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
    return run


def build_model(config: TrainConfig) -> nn.Module:
    """The model of `config`, for bytes, with newly drawn weights."""
    shape: dict[str, Any] = {"num_tokens": NUM_TOKENS, "dim": config.dim, "depth": config.depth}
    shape |= {"heads": config.heads, "dim_head": config.dim_head, "ff_mult": config.ff_mult}
    if config.model == "palm":
        return PaLM(**shape, attn_dropout=config.dropout, ff_dropout=config.dropout)
    if config.model == "palm-lite":
        return PaLMLite(**shape, attn_dropout=config.dropout, ff_dropout=config.dropout)
    if config.model == "lamda":
        return LaMDA(**shape, dropout=config.dropout)
    shape |= {"max_seq_len": config.seq_len, "cross_attn_seq_len": config.cross_attn_seq_len}
    shape |= {"perceive_depth": config.perceive_depth, "cross_attn_dropout": config.cross_attn_dropout}
    return PerceiverAR(**shape, dropout=config.dropout)


def history_until(step: int, metrics: Path) -> list[Row]:
    """The rows up to `step`. That of the test goes: it belongs to the end of a run, which is to come."""
    rows = read_metrics(metrics) if metrics.exists() else []
    return [row for row in rows if row["step"] <= step and row["split"] != "test"]


def check_folder(folder: Path, checkpoint: Path | None, *, restart: bool) -> None:
    """Refuse a folder in which a run, from `checkpoint` if there is one, would overwrite another's work.

    Raises:
        ValueError: it holds later checkpoints of the same run.
        FileExistsError: it holds a run. `restart` allows one that has no checkpoint yet.
    """
    if checkpoint is not None and folder.resolve() == checkpoint.parent.parent.resolve():
        newest = complete_checkpoints(folder)[-1:]
        if [path.resolve() for path in newest] != [checkpoint.resolve()]:
            raise ValueError(
                f"resume is {checkpoint}, not the newest checkpoint of its run; expected the newest, or "
                "a new folder as out to branch off into"
            )
    elif (folder / "config.json").exists() and not (restart and not complete_checkpoints(folder)):
        raise FileExistsError(
            f"out is {folder}, which holds a run already; expected a new folder, or --resume to continue it"
        )
