"""Checkpoints of a run: the folders `RUN/checkpoints/step-00001000`, what is in them, and which one is meant.

A folder has the tensors as `torch.distributed.checkpoint` writes them, each rank its own part, so that any
other number of ranks can read them; `state.json` with the numbers, the options and what the data were; and
`manifest.json`, which is written last. It gets its name when all of that is on the disk, and is never written
to again: a folder with this name is complete, unless the disk has damaged it, which the manifest tells.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from palm_pytorch.training import manifest
from palm_pytorch.training.config import model_options
from palm_pytorch.training.manifest import DamagedError, check_manifest
from palm_pytorch.training.resharding import blank, fill
from palm_pytorch.training.state import TrainState
from palm_pytorch.training.tensor_layout import layout_of

STATE_FILE = "state.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")


# ------------------------------------------------------------------------------------------ which is meant


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """The folders of `run`'s checkpoints, oldest first. Partly written ones do not count."""
    steps = sorted((number, path) for path in run.glob("checkpoints/*") if (number := step_of(path)) >= 0)
    return [path for _, path in steps]


def step_of(folder: Path) -> int:
    """The step of a complete checkpoint, -1 of any other folder."""
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match and (folder / manifest.FILE).is_file() else -1


@dataclass(frozen=True)
class Source:
    """What is resumed: the checkpoints that come into question, the one to be tried first last.

    Raises:
        FileNotFoundError, when it is looked for: there is none.
    """

    run: Path
    candidates: list[Path]

    @classmethod
    def find(cls, resume: str, out: str | None, runs: Path = Path("runs")) -> Source | None:
        """What `--resume` and `--out` mean; None for "auto" when the run `out` has no checkpoint yet."""
        if resume != "auto":
            path = Path(resume)
            if step_of(path) >= 0:
                return cls(path.resolve().parent.parent, [path])
            searched = [path]
        else:
            searched = [Path(out)] if out else sorted(runs.glob("*"))
        found = [cls(run, folders) for run in searched if (folders := complete_checkpoints(run))]
        if found:
            return max(found, key=lambda each: (each.candidates[-1] / manifest.FILE).stat().st_mtime)
        if resume == "auto" and out:
            return None
        where = f"under {runs}/" if resume == "auto" else f"in {resume}"
        raise FileNotFoundError(f"resume is {resume!r}, but there is no complete checkpoint {where}")

    def choose(self) -> tuple[Path, list[DamagedError]]:
        """The newest checkpoint that is as it was written, and what is wrong with newer ones.

        Raises:
            DamagedError: there is none.
        """
        damaged: list[DamagedError] = []
        for folder in reversed(self.candidates):
            try:
                check_manifest(folder)
                return folder, damaged
            except DamagedError as error:
                damaged.append(error)
        raise DamagedError("; ".join(map(str, damaged)))

    def undamaged(self) -> Path:
        """As `choose`, with a warning of each that is passed over."""
        folder, damaged = self.choose()
        for error in damaged:
            warnings.warn(f"{error}; using {folder} instead", stacklevel=2)
        return folder


def read_about(folder: Path) -> dict[str, Any]:
    """A checkpoint's plain values: `state` (`TrainState.numbers`), `config`, `data`.

    Raises:
        DamagedError: they cannot be read.
    """
    try:
        about = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return {name: about[name] for name in ("state", "config", "data")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DamagedError(f"{folder / STATE_FILE} is missing or damaged ({error})") from error


def check_same_model(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise a ValueError that names every option in which `wanted` asks for another model than `saved`, or
    for another optimizer, to which the state of that one would mean something else.
    """
    differing = [
        f"{name} is {wanted[name]!r}, in the checkpoint {saved[name]!r}"
        for name in (*model_options(saved["model"]), "optimizer", "recipe")
        if name in saved and wanted.get(name, saved[name]) != saved[name]
    ]
    if differing:
        raise ValueError(f"cannot resume with another model or optimizer: {'; '.join(differing)}")


def check_same_data(saved: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Raise a ValueError unless the data are those of the checkpoint, as `describe` gives both."""
    for name, what in (("tokenizer", "tokenizer"), ("fingerprint", "text")):
        if saved[name] != data[name]:
            raise ValueError(
                f"data is {data['name']} ({what} {str(data[name])[:12]}); expected the {what} that the "
                f"checkpoint was trained on, {saved['name']} ({what} {str(saved[name])[:12]})"
            )


# ------------------------------------------------------------------------------------------------- tensors


def copy_to_cpu(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested tensors, to be written while training goes on with the originals."""
    return {
        name: copy_to_cpu(value) if isinstance(value, Mapping) else value.detach().to("cpu", copy=True)
        for name, value in tensors.items()
    }


def write_tensors(tensors: dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write this rank's part of `tensors` durably. All ranks of `group` call this.

    Raises:
        OSError: a rank could not write.
    """
    try:
        writer = FileSystemWriter(folder, overwrite=False)
        state_dict_saver.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as failure:  # which is no Exception
        errors = [error for error, _ in failure.failures.values()]
        raise OSError(f"{folder} could not be written: {errors[0]}") from errors[0]


def load_state(folder: Path, state: TrainState, group: dist.ProcessGroup | None = None) -> None:
    """Put a checkpoint into `state`, whatever number of ranks wrote it. All ranks of `group` call this.

    Raises:
        DamagedError: it does not fit the model, or cannot be read.
    """
    reader = Reader(folder)
    parameters = dict(state.model.named_parameters())
    # What tensor parallelism has cut is read whole first; the rest straight to where it belongs.
    weights = {name: blank(p) if layout_of(p) else p.detach() for name, p in parameters.items()}
    optimizer = blank_optimizer(reader, parameters)
    read_tensors({"model": weights, "optimizer": optimizer}, reader, group)
    for name, parameter in parameters.items():
        if layout_of(parameter):
            fill(parameter, parameter.detach(), weights[name])
            for kind, loaded in optimizer.get(name, {}).items():
                if loaded.shape == weights[name].shape:
                    own = torch.zeros_like(parameter.detach(), dtype=loaded.dtype)
                    optimizer[name][kind] = fill(parameter, own, loaded)
    state.set_optimizer_tensors(optimizer)
    state.set_numbers(read_about(folder)["state"])


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put the weights of a checkpoint into `model`, which is whole and in this process alone."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    read_tensors({"model": weights}, Reader(folder), None)


def read_tensors(target: dict[str, Any], reader: Reader, group: dist.ProcessGroup | None) -> None:
    """Fill the tensors of `target` in place; without a group, by this process alone."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            state_dict_loader.load(target, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as failure:
        errors = [error for error, _ in failure.failures.values()]
        raise DamagedError(f"{reader.path} cannot be read into this model: {errors[0]}") from errors[0]


def blank_optimizer(reader: Reader, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """An optimizer's state as the checkpoint has it, all zero: what has its parameter's shape is spread over
    processes like it, the rest is whole on every one.

    Raises:
        DamagedError: it is the state of other parameters.
    """
    metadata = reader.read_metadata()
    zeros: dict[str, dict[str, Tensor]] = {}
    for key, path in (metadata.planner_data or {}).items():
        if path[0] != "optimizer":
            continue
        _, name, kind = path
        saved = metadata.state_dict_metadata[key]
        if name not in parameters or not isinstance(saved, TensorStorageMetadata):
            raise DamagedError(f"{reader.path} has {'.'.join(path)}, of no parameter of this model")
        dtype = saved.properties.dtype
        alike = blank(parameters[name], dtype)
        alike = alike if alike.shape == saved.size else torch.zeros(saved.size, dtype=dtype)
        zeros.setdefault(name, {})[kind] = alike
    return zeros


class Reader(FileSystemReader):
    """Reads a checkpoint without running code from it: its index is a pickle, its tensors are not."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            with open(Path(self.path) / ".metadata", "rb") as file:
                metadata = IndexUnpickler(file).load()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise DamagedError(f"{self.path} is damaged or no checkpoint of a run ({error})") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class IndexUnpickler(pickle.Unpickler):
    """Knows the classes that describe tensors, and no others."""

    KNOWN: Sequence[tuple[str, str]] = (
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib._local", "PosixPath"),  # Python 3.13
        ("pathlib._local", "WindowsPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    )

    def find_class(self, module: str, name: str) -> Any:
        described = module == "torch.distributed.checkpoint.metadata" and "." not in name
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if described or dtype or (module, name) in self.KNOWN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
