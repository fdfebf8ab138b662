"""A model in a folder: `config.json` and safetensors files.

    config.json                    class, its arguments, the version that saved it, a SHA-256 per weight file
    tokenizer.model, ...           the tokenizer, if there is one; `config.json` has its SHA-256 too
    model.safetensors              the weights, or
    model-00001-of-00003.safetensors, ..., model.safetensors.index.json

Weights are written first and `config.json` last, each under its name only when it is whole, so that a folder
with a `config.json` holds a model, and one whose files do not belong together is refused.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palm_pytorch.data.durable import file_digest
from palm_pytorch.data.tokenizer import ByteTokenizer, Tokenizer, expect_tokenizer, stored_tokenizer
from palm_pytorch.models import LaMDA, PaLM, PaLMLite, PerceiverAR
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.ops.arguments import expect_integer
from palm_pytorch.version import __version__

MODELS: dict[str, type[LanguageModel]] = {
    kind.__name__: kind for kind in (PaLM, PaLMLite, LaMDA, PerceiverAR)
}
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
PARTIAL = ".partial"
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


# ------------------------------------------------------------------------------------------------- saving


def save_pretrained(
    model: LanguageModel,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write the model into `folder`, which is made if need be; a model that it holds is replaced.

    tokenizer: of the model's tokens, to go along; without one, that in the folder stays.
    max_shard_size: bytes of weights per file at most, unless one tensor is larger.

    Raises:
        ValueError: the model has other tensors than its `config` says, so that it could not be loaded.
        OSError: it could not be written. What the folder held stays as it was, either way.
    """
    from safetensors.torch import save_file

    expect_integer("max_shard_size", max_shard_size)
    expect_as_configured(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        tensors, tied = untied(model)
        shards = list(split(tensors, max_shard_size))
        sums: dict[str, str] = {}
        places: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            last = len(shards)
            file = "model.safetensors" if last == 1 else f"model-{number:05d}-of-{last:05d}.safetensors"
            shard = {name: tensors[name].contiguous() for name in names}
            save_file(shard, partial / file, metadata={"format": "pt", "palm_pytorch": __version__})
            sums[file] = file_digest(partial / file).hexdigest()
            places |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            write_json(partial / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})
        name = next(name for name, kind in MODELS.items() if isinstance(model, kind))
        config = {"model": name, "palm_pytorch": __version__, "config": model.config}
        if tokenizer is not None:
            config["tokenizer"] = tokenizer.fingerprint
        write_json(partial / CONFIG_FILE, config | ({"tied": tied} if tied else {}) | {"sha256": sums})
        if tokenizer is not None:
            tokenizer.save(folder)
        install(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def expect_as_configured(model: LanguageModel) -> None:
    """Raise a ValueError unless a model of this library has the tensors of a new one of its config."""
    if type(model) not in MODELS.values():  # the user's own, who loads it
        return
    state, defined = model.state_dict(), build_on_meta(type(model), model.config).state_dict()
    refuse_names("model", "has tensors that its config has no place for", [*(state.keys() - defined.keys())])
    refuse_names("model", "lacks tensors of its config", [*(defined.keys() - state.keys())])
    for name, tensor in state.items():
        if tensor.shape != defined[name].shape:
            shapes = f"{tuple(defined[name].shape)} by its config, got {tuple(tensor.shape)}"
            raise ValueError(f"model: {name}: expected shape {shapes}")


def untied(model: LanguageModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of `model` with each tensor once, and under which name to find what has a second one."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) == name:
            tensors[name] = tensor.detach()
        else:
            tied[name] = first[id(tensor)]
    return tensors, tied


def split(tensors: Mapping[str, Tensor], max_shard_size: int) -> Iterator[list[str]]:
    """Names in order, in groups whose tensors hold at most `max_shard_size` bytes, or one tensor."""
    names: list[str] = []
    room = max_shard_size
    for name, tensor in tensors.items():
        if names and tensor.nbytes > room:
            yield names
            names, room = [], max_shard_size
        names.append(name)
        room -= tensor.nbytes
    yield names


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def install(partial: Path, folder: Path) -> None:
    """Move what `partial` holds into `folder`, `config.json` last; remove weight files of an earlier save."""
    files = sorted(partial.iterdir(), key=lambda file: file.name == CONFIG_FILE)
    mode = files[-1].stat().st_mode  # what this user's files have; safetensors keeps its own to the owner
    for file in files:
        file.chmod(mode)
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
    for file in files:
        file.replace(folder / file.name)
    kept = {file.name for file in files}
    for old in list(folder.iterdir()):
        if old.name not in kept and (WEIGHT_FILE.fullmatch(old.name) or old.name == INDEX_FILE):
            old.unlink()


# ------------------------------------------------------------------------------------------------ loading


def load_folder(
    folder: str | Path,
    *,
    kind: type[LanguageModel] = LanguageModel,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> LanguageModel:
    """The model in `folder`, in eval mode, on `device` and in `dtype`, or as it was saved.

    kind: the class expected, or a base of it.  config: arguments to take instead of those saved.

    Raises:
        FileNotFoundError: there is no model, or part of it is missing.
        ValueError: a file is damaged, or its tensors are not those of the config.
    """
    folder = Path(folder)
    saved = read_config(folder)
    for file, expected in saved["sha256"].items():
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder / file}: expected the weights that {CONFIG_FILE} lists, got none"
            )
        if file_digest(folder / file).hexdigest() != expected:
            raise ValueError(f"{folder / file}: is damaged: its SHA-256 is not the one in {CONFIG_FILE}")
    chosen = MODELS[saved["model"]]
    if issubclass(kind, chosen):  # the user's own
        chosen = kind
    if not issubclass(chosen, kind):
        raise ValueError(f"{folder}: expected a {kind.__name__}, got a {chosen.__name__}")
    model = build_on_meta(chosen, {**saved["config"], **config})
    tied: dict[str, str] = saved.get("tied", {})
    fill(model, stored_tensors(folder, saved["sha256"]), str(folder), tied=tied, device=device, dtype=dtype)
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` says, as `save_pretrained` wrote it."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected a saved model with a {CONFIG_FILE}, got none")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        files = saved["sha256"]
        objects = (saved["config"], files, saved.get("tied", {}))
        whole = saved["model"] in MODELS and len(files) > 0 and all(isinstance(o, dict) for o in objects)
        if not whole or any(Path(file).name != file for file in files):  # nothing outside of the folder
            raise ValueError("it names no model of this library with its files")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected what `save_pretrained` writes: {error!r}") from error
    return saved


def find_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of the model in a folder; None where it was saved without, as models of bytes may be.

    Raises:
        ValueError: the file there is not the one that the model was saved with, or is missing.
        And as `load_tokenizer`.
    """
    found, expected = stored_tokenizer(folder), read_config(Path(folder)).get("tokenizer")
    if expected is None:
        return found
    return expect_tokenizer(found or ByteTokenizer(), expected, f"the model in {folder}")


def stored_tensors(folder: Path, files: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files by name, mapped from the disk."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  # no mapping
                    with torch.device("cpu"):  # a default device that is another confuses the library
                        tensor = stored.get_tensor(name)
                    yield name, tensor
        except SafetensorError as error:
            raise ValueError(f"{folder / file}: expected safetensors, and cannot be read: {error}") from error


def build_on_meta(kind: type[LanguageModel], config: Mapping[str, Any]) -> LanguageModel:
    """A model without memory for its weights, which `fill` gives it."""
    known = inspect.signature(kind).parameters
    unknown = [name for name in config if name not in known]
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    if unknown and not passes_on:
        raise ValueError(
            f"config: {kind.__name__} takes no {', '.join(unknown)}; it takes {', '.join(known)}"
        )
    with torch.device("meta"):
        return kind(**config)


def fill(
    model: LanguageModel,
    tensors: Iterable[tuple[str, Tensor]],
    source: str,
    *,
    tied: Mapping[str, str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Give a model on the meta device the `tensors`, copied one by one: exactly those that it is made of.

    source: whose they are, for errors.  tied: names that mean the same tensor as another.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or no floating-point one.
        TypeError: `dtype` is no floating-point dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    state = model.state_dict()
    for name, first in (tied := tied or {}).items():
        if first in tied or not {name, first} <= {*state} or state[name].shape != state[first].shape:
            raise ValueError(f"{source}: {name} cannot be tied to {first} in such a model")
    device = torch.empty(0).device if device is None else device
    wanted = {name: tensor for name, tensor in state.items() if name not in tied}
    filled: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors:
        if name not in wanted:
            unknown.append(name)
        elif tensor.shape != wanted[name].shape:
            shapes = f"{tuple(wanted[name].shape)} by its config, {tuple(tensor.shape)} in {source}"
            raise ValueError(f"{name}: the shapes differ: {shapes}")
        elif not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype, got {tensor.dtype} in {source}")
        else:
            empty = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)
            filled[name] = empty.copy_(tensor)  # no second copy: a tensor of a file is mapped, not read
    refuse_names(source, "holds tensors that its config has no place for", unknown)
    refuse_names(source, "lacks tensors of its config", [name for name in wanted if name not in filled])
    model.load_state_dict(filled, strict=False, assign=True)
    for name, first in tied.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, model.get_parameter(first))


def refuse_names(source: str, what: str, names: list[str]) -> None:
    """Raise a ValueError that lists `names`, the first of them if there are many."""
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise ValueError(f"{source} {what}: {', '.join(names[:8])}{more}")
