"""`from_pretrained`: whether a folder or the hub is meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from palm_pytorch.checkpoints.hub import load_from_hub
from palm_pytorch.checkpoints.native import load_folder
from palm_pytorch.models.language_model import LanguageModel

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
M = TypeVar("M", bound=LanguageModel)


def from_pretrained(
    cls: type[M],
    folder_or_hub_id: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    **config: Any,
) -> M:
    """The model in a folder that `save_pretrained` wrote, or on the Hugging Face hub, in eval mode.

    A folder that is there comes before a model of the same name on the hub, and what is missing from a folder
    that is there ("runs/one" where there is "runs") is not looked for there. The hub needs huggingface_hub,
    whose settings hold (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and the like). "conceptofmind/palm-150m", "-410m",
    "-1b" and "-2b" on it are files of PaLM-rlhf-pytorch, and are converted.

    device, dtype: of the model, which is loaded straight there; by default the CPU and the dtype saved.
    revision: branch, tag or commit on the hub.
    config: constructor arguments to take instead of those saved, such as `attention_backend`.

    Raises:
        FileNotFoundError: there is no such model, or part of it is missing.
        ConnectionError: the hub could not be reached, and the model is not in its cache.
        ValueError: a file is damaged (each is checked against its SHA-256), its tensors are not those of the
            config, or the model is of another class.
        ModuleNotFoundError: huggingface_hub is not installed, and there is no such folder.
    """
    if not isinstance(folder_or_hub_id, str | Path):
        raise TypeError(f"folder_or_hub_id: expected a path or a string, got {folder_or_hub_id!r}")
    path, name = Path(folder_or_hub_id), str(folder_or_hub_id)
    options: dict[str, Any] = {"kind": cls, "device": device, "dtype": dtype, **config}
    if path.is_dir():
        return cast(M, load_folder(path, **options))
    # Without a network the hub's library tries for half a minute, which a slip of the pen should not take.
    local = path.exists() or (len(path.parts) > 1 and path.parent.is_dir())
    if isinstance(folder_or_hub_id, Path) or local or not HUB_ID.fullmatch(name):
        hint = " (`load_reference` reads files)" if path.is_file() else ""
        expected = f"expected a folder, or the id of a model on the hub{hint}"
        raise FileNotFoundError(f"folder_or_hub_id: {expected}, got {name!r}")
    return cast(M, load_from_hub(name, revision=revision, **options))
