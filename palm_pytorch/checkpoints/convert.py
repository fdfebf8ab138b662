"""Any weights as a folder of the native format, with a tokenizer beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from palm_pytorch.checkpoints.hub import fetch_tokenizer, model_tokenizer
from palm_pytorch.checkpoints.native import find_tokenizer, save_pretrained
from palm_pytorch.checkpoints.reference import load_reference
from palm_pytorch.checkpoints.reference.source import READERS
from palm_pytorch.data.tokenizer import Tokenizer, load_tokenizer
from palm_pytorch.models.language_model import LanguageModel

FILES = {*READERS, ".pt", ".pth", ".bin", ".ckpt"}


def read_model(source: str, **options: Any) -> tuple[LanguageModel, Tokenizer | None]:
    """A model, and its tokenizer if one goes with it.

    source: an older project's file, a folder that `save_pretrained` wrote, or an id on the hub.
    options: device, dtype and config, as for `load_reference` and `from_pretrained`.

    Raises as these two and `load_tokenizer`.
    """
    path = Path(source)
    if path.is_file() or path.suffix in FILES:
        return load_reference(source, **options), None
    model = LanguageModel.from_pretrained(source, **options)
    return model, find_tokenizer(path) if path.is_dir() else model_tokenizer(source)


def convert(
    source: str,
    folder: str | Path,
    *,
    tokenizer: str | None = None,
    read: Callable[..., tuple[LanguageModel, Tokenizer | None]] = read_model,
    **options: Any,
) -> LanguageModel:
    """Write the model of `source` into a new folder; gives it.

    tokenizer: a file, or the id of a repository on the hub that has one; by default that of the source.
    read: what makes a model and its tokenizer of the source and `options`: `read_model`, or more.

    Raises:
        FileExistsError: the folder is there, and not empty.
        And as `read_model`; nothing is written then.
    """
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise FileExistsError(f"folder: expected a new or empty one, and {str(folder)!r} is not")
    model, found = read(source, **options)
    if tokenizer is not None:
        found = load_tokenizer(tokenizer) if Path(tokenizer).is_file() else fetch_tokenizer(tokenizer)
    if found is not None and found.num_tokens > model.config["num_tokens"]:
        raise ValueError(
            f"tokenizer: expected one of at most the model's {model.config['num_tokens']} tokens, "
            f"got {found.num_tokens}"
        )
    save_pretrained(model, folder, tokenizer=found)
    return model
