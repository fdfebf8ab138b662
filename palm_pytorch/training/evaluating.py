"""`palm evaluate`: the score of a trained model on a whole split, of a text with sliding context.

All bytes of the split count, its new lines too; on Enwik8 these are its last 5,000,000 for "test". The first
is predicted from the one byte before the split, and each other from up to `seq_len` tokens before it, which
may be of the split alone. Sequences that are read whole, as pictures, are scored as in training.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch

from palm_pytorch.data.arrays import is_array, map_array
from palm_pytorch.data.batch import Dataset
from palm_pytorch.data.dialog_dataset import is_dialog
from palm_pytorch.data.tokenizer import ByteTokenizer, IntegerTokenizer
from palm_pytorch.training.checkpoint import check_same_data, read_about
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.logging import finite
from palm_pytorch.training.machine import keep_freed_memory, select_device, select_precision
from palm_pytorch.training.options import POSITIVE, Options, option
from palm_pytorch.training.run import describe, read_data
from palm_pytorch.training.scoring import read_all, score
from palm_pytorch.training.trained import Trained, load_any

RESULTS_FILE = "evaluations.jsonl"
SEQ_LEN = 1024  # of a model that does not say what it was trained on


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """Options of `palm evaluate`."""

    split: Literal["valid", "test"] = option("text", "of the data, which to score", default="test")
    data: str | None = option(
        "text", "as for training (default: the run's; a saved model needs it)", default=None
    )
    data_dtype: str | None = option("text", "of a .bin file, as 'uint8' or 'uint16'", default=None)
    data_dir: str | None = option(
        "text", "where data are looked for and downloads are kept (default: the run's, or data)", default=None
    )
    seq_len: int | None = option(
        "context",
        "tokens of a window, and of a conversation (default: of sequences that are read whole theirs; else "
        f"the run's, or a Perceiver AR's longest; else {SEQ_LEN:,})",
        POSITIVE,
        default=None,
    )
    stride: int | None = option(
        "context",
        "tokens that it moves on by; a smaller one costs more, and scores better (default: half of those "
        "that it predicts); sequences that are read whole have none",
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
    trained = load_any(source, device=device, dtype=torch.float32)
    model = trained.model
    folder = trained.run or (Path(source) if Path(source).is_dir() else None)
    if folder is not None and not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder / RESULTS_FILE}: the result could not be written there")
    data, seq_len = open_for_scoring(trained, options)
    prefix_len, longest = getattr(model, "prefix_len", 0), model.config.get("max_seq_len", seq_len)
    if not prefix_len < seq_len <= longest:
        raise ValueError(
            f"seq_len is {seq_len}; expected {prefix_len + 1} to {longest}: more than the model's prefix, at "
            "most its max_seq_len"
        )
    reading = read_all(
        data.held_out(options.split),
        seq_len=seq_len,
        stride=options.stride,
        batch_size=options.batch_size,
        prefix_len=prefix_len,
    )
    if device.type == "cpu":
        keep_freed_memory()

    parameters = sum(parameter.numel() for parameter in model.parameters())
    at = f" at step {trained.step:,}" if trained.step is not None else ""
    name = trained.run if source == "auto" else source
    print(f"model   {name}{at}: a {type(model).__name__} of {parameters:,} parameters")
    print(f"data    {data}")
    print(f"windows {reading}")
    started = time.perf_counter()
    try:
        found = score(model, reading, precision)
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
        "stride": reading.stride,
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
            file.write(json.dumps(finite(result)) + "\n")
    return result


def open_for_scoring(trained: Trained, options: EvaluateOptions) -> tuple[Dataset, int]:
    """The data that the options name, or else those of the model's run, in the model's tokens; and how many
    of these a window has.

    Raises:
        ValueError: the data are not those of the run any more, or have other tokens than the model.
        And as `open_dataset`.
    """
    if trained.options is None and options.data is None:
        raise ValueError("data is not given, and the model is of no run; expected what to score it on")
    given = dict(trained.options or {})
    if options.data is not None:
        given["data_dtype"] = None  # the run's is that of its own file
    for name in ("data", "data_dtype", "data_dir"):
        if (value := getattr(options, name)) is not None:
            given[name] = value
    path, tokenizer = Path(given["data"] or "").expanduser(), trained.tokenizer
    num_values = tokenizer.num_values if isinstance(tokenizer, IntegerTokenizer) else None
    if is_array(path) != (num_values is not None):
        wanted = "text" if num_values is None else "integers, in a .npy or .bin file"
        raise ValueError(f"data is {given['data']}; expected {wanted}: the model's tokens are {tokenizer}")
    seq_len = trained.seq_len
    if num_values is not None and (values := map_array(path, given["data_dtype"])).ndim == 2:
        seq_len = values.shape[1]
    seq_len = options.seq_len or seq_len or SEQ_LEN
    # A text may be shorter than a window; what is cut into rows, and a run's data, are as in training.
    rows = num_values is not None or trained.options is not None or is_dialog(path)
    given |= {"num_tokens": num_values, "seq_len": seq_len if rows else 1}
    data = read_data(TrainConfig.for_machine(**given), tokenizer)
    if trained.checkpoint is not None and options.data is None:
        check_same_data(read_about(trained.checkpoint)["data"], describe(data))
    return data, seq_len
