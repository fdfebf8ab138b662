"""Models on the Hugging Face hub, through `huggingface_hub`, which is an extra.

What `push_to_hub` uploads is what `save_pretrained` writes, and is checked like that when it comes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from palm_pytorch.checkpoints.native import CONFIG_FILE, INDEX_FILE, find_tokenizer, load_folder
from palm_pytorch.checkpoints.reference import load_reference
from palm_pytorch.data.durable import file_digest
from palm_pytorch.data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from palm_pytorch.models import preset
from palm_pytorch.models.language_model import LanguageModel

# What a repository's other files are there for, others know.
FILES = [CONFIG_FILE, INDEX_FILE, "*.safetensors", *TOKENIZER_FILES.values()]


class PublicCheckpoint(NamedTuple):
    """A file of PaLM-rlhf-pytorch 0.2, the name of its shape among the presets, its size if that is known."""

    file: str
    preset: str
    size: int | None


# Trained on C4 at 8,192 tokens (github.com/conceptofmind/PaLM), with one tokenizer.
PUBLIC_TOKENIZER = "EleutherAI/gpt-neox-20b"
PUBLIC = {
    "conceptofmind/palm-150m": PublicCheckpoint("palm_150m_8k_v0.pt", "palm-150m", 579_328_004),
    "conceptofmind/palm-410m": PublicCheckpoint("palm_410m_8k_v0.pt", "palm-410m", 1_640_783_199),
    "conceptofmind/palm-1b": PublicCheckpoint("palm_1b_8k_v0.pt", "palm-1b", 3_935_638_575),
    "conceptofmind/palm-2b": PublicCheckpoint("palm_2b_8k_v0.pt", "palm-2b", None),
}


def load_from_hub(
    repo_id: str,
    *,
    kind: type[LanguageModel],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    revision: str | None,
    **config: Any,
) -> LanguageModel:
    """The model of a repository, downloaded unless it is cached, verified, and converted if it is older.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        FileNotFoundError: the hub has no such model, or does not show it to this user.
        ConnectionError: the hub could not be reached, and the model is not in the cache.
        ValueError: what came is damaged or no model of `kind`.
    """
    hub, load = huggingface(repo_id), {"kind": kind, "device": device, "dtype": dtype, **config}
    with plain_errors(repo_id):
        if repo_id in PUBLIC:
            path = Path(hub.hf_hub_download(repo_id, PUBLIC[repo_id].file, revision=revision))
            return load_public(path, PUBLIC[repo_id], **load)
        return load_folder(hub.snapshot_download(repo_id, revision=revision, allow_patterns=FILES), **load)


def model_tokenizer(repo_id: str) -> Tokenizer | None:
    """The tokenizer of a model that `load_from_hub` has loaded, None if it has none; raises as that does."""
    if repo_id in PUBLIC:
        return fetch_tokenizer(PUBLIC_TOKENIZER)
    hub = huggingface(repo_id)
    with plain_errors(repo_id):  # it came with the weights, and the hub is not asked again
        return find_tokenizer(hub.snapshot_download(repo_id, allow_patterns=FILES, local_files_only=True))


def fetch_tokenizer(repo_id: str) -> Tokenizer:
    """The tokenizer of a repository that has one of Hugging Face's; raises as `load_from_hub`."""
    hub = huggingface(repo_id)
    with plain_errors(repo_id):
        return load_tokenizer(hub.hf_hub_download(repo_id, TOKENIZER_FILES[".json"]))


@contextmanager
def plain_errors(repo_id: str) -> Iterator[None]:
    """Raises what huggingface_hub does as one of Python's own errors, and briefly."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{repo_id!r} is no folder here, and the hub has no such model or revision, or none for this user"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"{repo_id!r} is no folder here, and the hub cannot be reached ({first_line(error)})"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{repo_id!r} on the hub lacks a file ({first_line(error)})") from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"the hub did not give {repo_id!r} ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def push_to_hub(
    model: LanguageModel, repo_id: str, *, tokenizer: Tokenizer | None = None, **options: Any
) -> str:
    """Save the model to a repository on the hub, its tokenizer too if given; gives the address of the commit.

    options: those of `huggingface_hub.ModelHubMixin.push_to_hub`, as private, token, branch.
    """
    huggingface()
    from huggingface_hub import ModelHubMixin

    class HubModel(ModelHubMixin, library_name="palm_pytorch", tags=["text-generation"]):
        def _save_pretrained(self, save_directory: Path) -> None:
            model.save_pretrained(save_directory, tokenizer=tokenizer)

    return HubModel().push_to_hub(repo_id, **options)


def huggingface(repo_id: str | None = None) -> Any:
    """The package of that name, or an error that says how to get it; repo_id: what it is to fetch."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        here = "" if repo_id is None else f"{repo_id!r} is no file or folder here, and "
        raise ModuleNotFoundError(
            f"{here}models on the hub need huggingface_hub: pip install huggingface_hub", name=error.name
        ) from error
    return huggingface_hub


def load_public(
    path: Path, public: PublicCheckpoint, *, kind: type[LanguageModel], **load: Any
) -> LanguageModel:
    """The model in the downloaded file of a public checkpoint.

    Raises:
        ValueError: the file is not the published one, or its model is not of `kind`.
    """
    size = path.stat().st_size
    if public.size not in (None, size):
        raise ValueError(f"{path}: expected the {public.size:,} bytes of the public file, got {size:,}")
    # The hub's cache keeps a large file under its SHA-256, and links to it.
    blob = path.resolve().name
    if len(blob) == 64 and file_digest(path).hexdigest() != blob:
        raise ValueError(f"{path}: is damaged: its SHA-256 is not the hub's")
    model = load_reference(path, gain="gamma", **{**preset(public.preset), **load})
    if not isinstance(model, kind):
        raise ValueError(f"{path}: expected a {kind.__name__}, got a {type(model).__name__}")
    return model
