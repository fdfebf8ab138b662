"""Tensors by name from whatever older weights come in. Nothing that a file says is run.

A file is read by its suffix: `.safetensors`, `.npz`, `.msgpack` (flax), and any other as PyTorch's.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What wrappers put before every name, and under which name training scripts keep a model's state.
PREFIXES = ("module.", "_orig_mod.", "net.", "params/")
STATES = ("state_dict", "model_state_dict", "model")


def read_tensors(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file or of a mapping, on the device where they are, under names without prefixes.

    source: a path; or names to tensors or arrays, nested or not (levels are joined by "/").

    Raises:
        TypeError: it is neither, or something in it is no tensor.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds more than tensors.
        ModuleNotFoundError: the package that reads such files is not installed.
    """
    if isinstance(source, Mapping):
        content: Any = source
    elif isinstance(source, str | Path):
        content = read_file(Path(source))
    else:
        raise TypeError(
            f"path_or_state_dict: expected a path or names and tensors, got {type(source).__name__}"
        )
    for name in STATES:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise ValueError(f"path_or_state_dict: expected names and tensors, got a {type(content).__name__}")
    return without_prefixes(flatten(content))


def flatten(tree: Mapping[str, Any], above: str = "") -> dict[str, Tensor]:
    """The leaves of nested mappings as tensors, by the names on the way to them."""
    leaves: dict[str, Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{above}{name}/")
        else:
            leaves[f"{above}{name}"] = as_tensor(f"{above}{name}", value)
    return leaves


def as_tensor(name: str, value: Any) -> Tensor:
    """A tensor of PyTorch, or any array that NumPy understands (bfloat16 has no dtype of NumPy's own)."""
    if isinstance(value, Tensor):
        return value.detach()
    if not hasattr(value, "__array__"):
        raise TypeError(
            f"path_or_state_dict: expected tensors only, got a {type(value).__name__} for {name!r}"
        )
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    if array.dtype.kind not in "fiu":
        raise ValueError(f"path_or_state_dict: expected numbers for {name!r}, got dtype {array.dtype}")
    return torch.from_numpy(np.array(array))  # a copy: the array may be read-only


def without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names less what `PREFIXES` stands before all of them, and less `torch.compile`'s wherever it stands."""
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return without_prefixes({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


# -------------------------------------------------------------------------------------------------- files


def read_file(path: Path) -> Any:
    """What a file of weights holds, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"path_or_state_dict: expected a file, and {str(path)!r} is none")
    read = READERS.get(path.suffix, read_torch)
    try:
        return read(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: is damaged, or holds more than tensors and plain values; nothing of it was run"
        ) from error
    except (RuntimeError, ValueError, OSError, EOFError, LookupError, TypeError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: is damaged or no file of weights ({reason})") from error


def read_torch(path: Path) -> Any:
    # Files of before 2020 are no zip archives, and cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def read_npz(path: Path) -> Any:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def read_msgpack(path: Path) -> Any:
    """Parameters as flax's `serialization.to_bytes` writes them."""
    try:
        import msgpack
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path.name} needs msgpack: pip install msgpack", name=error.name
        ) from error
    try:
        # strict_map_key: chunks are numbered.  No limits: whoever has the file has it whole already.
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=flax_array, raw=False, strict_map_key=False)
    except (msgpack.UnpackException, msgpack.ExtraData) as error:
        raise ValueError(f"{error!r}") from error
    return joined_chunks(tree)


def flax_array(code: int, content: bytes) -> Any:
    """flax's extension types: 1 is an array and 3 a scalar, each (shape, name of its dtype, its bytes)."""
    import msgpack

    if code not in (1, 3):
        raise ValueError(f"expected arrays, got msgpack's extension type {code}")
    shape, name, data = msgpack.unpackb(content, raw=False)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected a dtype that PyTorch has, got {name!r}")
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def joined_chunks(tree: Any) -> Any:
    """flax writes an array of a gigabyte or more as a flat one in numbered pieces."""
    if not isinstance(tree, dict):
        return tree
    if "__msgpack_chunked_array__" not in tree:
        return {name: joined_chunks(value) for name, value in tree.items()}
    shape, chunks = ([part[str(n)] for n in range(len(part))] for part in (tree["shape"], tree["chunks"]))
    return torch.cat(chunks).reshape([int(size) for size in shape])


READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": read_safetensors,
    ".npz": read_npz,
    ".msgpack": read_msgpack,
}
