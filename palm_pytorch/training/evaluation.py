"""`palm evaluate`: the score of a trained model on a whole split of a text, with sliding context.

All bytes of the split count, its new lines too; on Enwik8 these are its last 5,000,000 for "test". The first
is predicted from the one byte before the split, and each other from up to `seq_len` tokens before it, which
may be of the split alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from palm_pytorch.data.batch import Dataset
from palm_pytorch.data.tokenizer import ByteTokenizer, IntegerTokenizer
from palm_pytorch.training.checkpoint import check_same_data, read_about
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.machine import keep_freed_memory, select_device, select_precision
from palm_pytorch.training.options import POSITIVE, check_options, option
from palm_pytorch.training.run import describe, read_data
from palm_pytorch.training.scoring import SlidingWindows, score
from palm_pytorch.training.trained import Trained, load_any

RESULTS_FILE = "evaluations.jsonl"
SEQ_LEN = 1024  # of a model that does not say what it was trained on


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of `palm evaluate`.

    Raises:
        TypeError, ValueError: an option has the wrong type or breaks its rule.
    """

    split: Literal["valid", "test"] = option("text", "of the data, which to score", default="test")
    data: str | None = option(
        "text", "as for training (default: the run's; a saved model needs it)", default=None
    )
    data_dir: str | None = option(
        "text", "where data are looked for and downloads are kept (default: the run's, or data)", default=None
    )
    seq_len: int | None = option(
        "context",
        f"tokens of a window (default: the run's, or a Perceiver AR's longest; else {SEQ_LEN:,})",
        POSITIVE,
        default=None,
    )
    stride: int | None = option(
        "context",
        "tokens that it moves on by; a smaller one costs more, and scores better (default: half of those "
        "that it predicts)",
        POSITIVE,
        default=None,
    )
    batch_size: int = option("machine", "windows at a time; does not change the score", POSITIVE, default=16)
    device: str = option(
        "machine", "'auto' (a GPU if there is one), or PyTorch's name for it", default="auto"
    )
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "machine", "of matrix products; 'auto' is bfloat16 where the processor is fast at it", default="auto"
    )

    def __post_init__(self) -> None:
        check_options(type(self), {spec.name: getattr(self, spec.name) for spec in fields(self)})


def evaluate_model(source: str, options: EvaluateOptions) -> dict[str, Any]:
    """Score the model of `source` (see `load_any`), print the result and return it, and add it to
    `evaluations.jsonl` in the folder of its run, or its own.

    Raises:
        FileNotFoundError, ValueError, OSError: there is no such model or text, they do not go together, or
            the result could not be written. Nothing is scored then.
        KeyboardInterrupt: as it came, after a line that says how much was done. Nothing is written.
    """
    device = select_device(options.device)
    precision = select_precision(options.precision, device)
    trained = load_any(source)
    folder = trained.run or (Path(source) if Path(source).is_dir() else None)
    if folder is not None and not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder / RESULTS_FILE}: the result could not be written there")
    data = open_text(trained, options)
    held_out = data.held_out(options.split)
    model = trained.model.float().to(device)
    prefix_len = getattr(model, "prefix_len", 0)
    seq_len = options.seq_len or trained.seq_len or SEQ_LEN
    if prefix_len and seq_len > model.config["max_seq_len"]:
        raise ValueError(f"seq_len is {seq_len}; expected at most the model's {model.config['max_seq_len']}")
    stride = options.stride or max(1, (seq_len - prefix_len) // 2)
    windows = SlidingWindows(len(held_out.tokens) - 1, seq_len, stride, prefix_len)
    if device.type == "cpu":
        keep_freed_memory()

    parameters = sum(parameter.numel() for parameter in model.parameters())
    at = f" at step {trained.step:,}" if trained.step is not None else ""
    name = trained.run if source == "auto" else source
    print(f"model   {name}{at}: a {type(model).__name__} of {parameters:,} parameters")
    print(f"data    {data}")
    print(
        f"windows {len(windows):,} of {windows.length:,} tokens, {stride:,} apart: {windows.cost:.1f} "
        "tokens go through the model for each that is scored"
    )
    started = time.perf_counter()
    try:
        found = score(
            model,
            held_out,
            seq_len=seq_len,
            stride=stride,
            batch_size=options.batch_size,
            precision=precision,
        )
    except KeyboardInterrupt as interrupt:
        print(interrupt, file=sys.stderr)
        raise
    seconds = time.perf_counter() - started
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checkpoint": str(trained.checkpoint or source),
        "step": trained.step,
        "data": data.name,
        "split": options.split,
        "seq_len": seq_len,
        "stride": stride,
        "precision": str(precision).removeprefix("torch."),
        "tokens": found.num_labels,
        "bytes": found.num_bytes,
        "loss": found.nats / found.num_labels,
        "bits_per_byte": found.bits_per_byte,
        "perplexity": found.perplexity,
        "seconds": round(seconds, 1),
    }
    told = (
        f"{options.split:7} {found.bits_per_byte:.4f} bits per {data.tokenizer.unit} of {found.num_bytes:,}"
    )
    if not isinstance(data.tokenizer, ByteTokenizer):
        told += f", perplexity {found.perplexity:.2f} per token of {found.num_labels:,}"
    print(f"{told}, in {seconds:,.0f} s")
    if folder is not None:
        with open(folder / RESULTS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    return result


def open_text(trained: Trained, options: EvaluateOptions) -> Dataset:
    """What the options name, in the model's tokens; or else the data of its run.

    Raises:
        ValueError: the data are not those of the run any more, or have other tokens than the model.
        And as `open_dataset`.
    """
    given = {name: value for name in ("data", "data_dir") if (value := getattr(options, name)) is not None}
    if trained.options is None and options.data is None:
        raise ValueError("data is not given, and the model is of no run; expected what to score it on")
    config = TrainConfig.for_machine(**{**(trained.options or {"seq_len": 1}), **given})
    own = None if isinstance(trained.tokenizer, IntegerTokenizer) else trained.tokenizer
    data = read_data(config, tokenizer=own)
    if data.tokenizer.fingerprint != trained.tokenizer.fingerprint:
        raise ValueError(
            f"data is {data.name}, with the tokenizer {data.tokenizer}; expected the model's, "
            f"{trained.tokenizer}"
        )
    if trained.checkpoint is not None and options.data is None:
        check_same_data(read_about(trained.checkpoint)["data"], describe(data))
    return data
