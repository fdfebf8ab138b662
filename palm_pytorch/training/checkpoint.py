"""What a run needs to go on as if it had never stopped, and the folders that hold it.

A checkpoint is `RUN/checkpoints/step-00001000/state.pt`. It is written under another name, flushed to the
disk and then renamed, so that a folder with this name is always complete.
"""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from palm_pytorch.data.corpus import Corpus
from palm_pytorch.training.config import TrainConfig, model_options

STATE_FILE = "state.pt"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
PARTIAL = ".partial-"


@dataclass
class TrainState:
    """Everything that changes during a run, and what must not change when it is resumed.

    `step` counts optimizer steps done, `tokens` the input tokens that they read, `seconds` the time that they
    took.
    """

    model: nn.Module
    optimizer: Optimizer
    config: TrainConfig
    corpus: Corpus
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def advance(self, tokens: int, seconds: float) -> None:
        """Count one more optimizer step."""
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds

    def state_dict(self) -> dict[str, Any]:
        """All of it as tensors and plain values, the random streams included."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "config": asdict(self.config),
            "corpus": self.corpus.fingerprint,
            "corpus_name": self.corpus.name,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "random": random_state(self.device),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from `saved`. The optimizer's hyper-parameters stay those of this run's config.

        Raises:
            ValueError: `saved` is of another model or another corpus.
        """
        check_same_model(saved["config"], asdict(self.config))
        if saved["corpus"] != self.corpus.fingerprint:
            raise ValueError(
                f"data is {self.corpus.name} ({self.corpus.fingerprint[:12]}); expected the text that the "
                f"checkpoint was trained on, {saved['corpus_name']} ({saved['corpus'][:12]})"
            )
        self.step, self.tokens, self.seconds = saved["step"], saved["tokens"], saved["seconds"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": saved["optimizer"]})
        set_random_state(saved["random"], self.device)


def check_same_model(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise a ValueError that names every option in which `wanted` asks for another model than `saved`."""
    differing = [
        f"{name} is {wanted[name]!r}, in the checkpoint {saved[name]!r}"
        for name in model_options(saved["model"])
        if wanted.get(name, saved[name]) != saved[name]
    ]
    if differing:
        raise ValueError(f"cannot resume with another model: {'; '.join(differing)}")


# ----------------------------------------------------------------------------------------- random streams


def seed_everything(seed: int, device: torch.device) -> None:
    """Start every random stream from `seed`, and have `device` compute the same bits each time.

    A CPU does so by itself for a given number of threads; CUDA has to be told. The order of the data depends
    on no stream, only on seed and step.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the random streams of Python, NumPy, PyTorch and `device` are, in plain values and tensors."""
    numpy_state: Any = np.random.get_state(legacy=True)
    name, keys, *rest = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(saved: Mapping[str, Any], device: torch.device) -> None:
    """Put the random streams back to where `random_state` found them."""
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])
    torch.set_rng_state(saved["torch"])
    if device.type == "cuda" and saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"], device)


# ------------------------------------------------------------------------------------------------ folders


def save_checkpoint(state: TrainState, run: Path, *, keep: int) -> Path:
    """Write `state` under `run`, remove all but the `keep` newest checkpoints, and return its folder.

    Raises:
        OSError, RuntimeError: it could not be written; the checkpoints that are there stay as they are.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.step:08d}"
    if (final / STATE_FILE).exists():  # resumed from, with no step since
        return final
    for leftover in folder.glob(f"{PARTIAL}*"):  # of a process that was killed
        shutil.rmtree(leftover)
    partial = folder / f"{PARTIAL}{final.name}"
    partial.mkdir()
    try:
        with open(partial / STATE_FILE, "wb") as file:
            torch.save(state.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(partial)
        partial.rename(final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in complete_checkpoints(run)[:-keep]:
        shutil.rmtree(old.rename(folder / f"{PARTIAL}{old.name}"))  # so that a kill leaves no half of it
    return final


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` as durable as its files."""
    if os.name == "posix":  # elsewhere folders cannot be opened, and need not be
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint's folder, on the CPU. Only tensors and plain values are unpickled.

    Raises:
        ValueError: that file is damaged, or something else.
    """
    try:
        return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{folder} cannot be read; it is damaged or no checkpoint of a run ({error})"
        ) from error


def complete_checkpoints(run: Path) -> list[Path]:
    """The folders of `run`'s checkpoints, oldest first. Partly written ones do not count."""
    named = ((STEP_FOLDER.fullmatch(path.name), path) for path in run.glob("checkpoints/*"))
    steps = sorted((int(match[1]), path) for match, path in named if match and (path / STATE_FILE).is_file())
    return [path for _, path in steps]


def find_checkpoint(resume: str, out: str | None, runs: Path = Path("runs")) -> Path | None:
    """The checkpoint that `--resume` and `--out` mean; None for "auto" when the run `out` has none yet.

    Raises:
        FileNotFoundError: there is none.
    """
    if resume != "auto":
        path = Path(resume)
        if (path / STATE_FILE).is_file():
            return path
        searched = [path]
    else:
        searched = [Path(out)] if out else sorted(runs.glob("*"))
    found = [newest for run in searched for newest in complete_checkpoints(run)[-1:]]
    if found:
        return max(found, key=lambda path: (path / STATE_FILE).stat().st_mtime)
    if resume == "auto" and out:
        return None
    where = f"under {runs}/" if resume == "auto" else f"in {resume}"
    raise FileNotFoundError(f"resume is {resume!r}, but there is no complete checkpoint {where}")
