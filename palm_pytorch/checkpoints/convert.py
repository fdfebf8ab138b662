"""Any weights as a folder of the native format, with a tokenizer beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from palm_pytorch.checkpoints.hub import PUBLIC, PUBLIC_TOKENIZER, fetch_tokenizer
from palm_pytorch.checkpoints.native import save_pretrained
from palm_pytorch.checkpoints.reference import load_reference
from palm_pytorch.checkpoints.reference.source import READERS
from palm_pytorch.checkpoints.tokenizer import Tokenizer, find_tokenizer
from palm_pytorch.models.language_model import LanguageModel

FILES = {*READERS, ".pt", ".pth", ".bin", ".ckpt"}


def convert(
    source: str,
    folder: str | Path,
    *,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> LanguageModel:
    """Write the model of `source` into a new folder; gives it.

    source: an older project's file, a folder that `save_pretrained` wrote, or an id on the hub.
    tokenizer: a file, or the id of a repository on the hub that has one; by default that of a public
    checkpoint, or of the folder.
    dtype: of the weights; by default as they are.  config: as for `load_reference`.

    Raises:
        FileExistsError: the folder is there, and not empty.
        And as `load_reference`, `from_pretrained` and `Tokenizer`; nothing is written then.
    """
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise FileExistsError(f"folder: expected a new or empty one, and {str(folder)!r} is not")
    if Path(source).is_file() or Path(source).suffix in FILES:
        model, found = load_reference(source, dtype=dtype, **config), None
    else:
        model = LanguageModel.from_pretrained(source, dtype=dtype, **config)
        found = find_tokenizer(source)
    if tokenizer is not None:
        found = Tokenizer(tokenizer) if Path(tokenizer).is_file() else fetch_tokenizer(tokenizer)
    elif source in PUBLIC and not Path(source).is_dir():
        found = fetch_tokenizer(PUBLIC_TOKENIZER)
    if found is not None and found.num_tokens > model.config["num_tokens"]:
        raise ValueError(
            f"tokenizer: expected one of at most the model's {model.config['num_tokens']} tokens, "
            f"got {found.num_tokens}"
        )
    save_pretrained(model, folder)
    if found is not None:
        found.save(folder)
    return model
