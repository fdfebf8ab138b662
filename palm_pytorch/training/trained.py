"""A trained model and its tokenizer, from a run or wherever else weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from palm_pytorch.checkpoints.convert import read_model
from palm_pytorch.data.tokenizer import ByteTokenizer, Tokenizer, expect_tokenizer, stored_tokenizer
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.training.architecture import build_model
from palm_pytorch.training.checkpoint import (
    Source,
    load_weights,
    read_about,
    step_folder,
    step_of,
)
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.logging import read_metrics
from palm_pytorch.training.machine import select_device, select_precision
from palm_pytorch.training.options import POSITIVE, SEED, Options, option


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which model, and where."""

    checkpoint: str = option(
        "model",
        "a run's folder, one of its checkpoints, a folder of `save_pretrained`, a model on the hub, or an "
        "older project's file; 'auto' is the newest run under runs/",
        default="auto",
    )
    device: str = option("model", "'auto' (a GPU if there is one), or PyTorch's name for it", default="auto")
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "model", "of weights; 'auto' is bfloat16 where the processor is fast at it", default="auto"
    )

    max_new_tokens: int = option("text", "tokens to write, at most", POSITIVE, default=256)
    temperature: float = option("text", "divides the logits; 0 takes the likeliest token", default=1.0)
    top_k: int | None = option("text", "draw from the likeliest so many", default=None)
    seed: int | None = option("text", "of the draws (default: another one each time)", SEED, default=None)

    def sampling(self, device: torch.device) -> dict[str, Any]:
        """Those of the options that `generate` takes by the same name, and a generator."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        texts = [spec.name for spec in fields(self) if spec.metadata["group"] == "text"]
        given = {name: getattr(self, name) for name in texts if name != "seed"}
        return given | {"generator": generator}


@dataclass(frozen=True)
class Trained:
    """A model and its tokenizer, in eval mode.

    Attributes:
        seq_len: of the sequences that it was trained on; None if that is not known, as of a saved model.
        dialog: whether these were conversations; None likewise.
        checkpoint: of the run that it is of, in full; None of a saved model.
        options: of that run.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    seq_len: int | None = None
    dialog: bool | None = None
    checkpoint: Path | None = None
    options: Mapping[str, Any] | None = None

    @property
    def run(self) -> Path | None:
        """The folder of the run that it is of, if it is of one."""
        return None if self.checkpoint is None else self.checkpoint.parent.parent

    @property
    def step(self) -> int | None:
        """How many steps the run had done."""
        return None if self.checkpoint is None else step_of(self.checkpoint)

    @property
    def device(self) -> torch.device:
        return self.model.token_emb.weight.device


def load_trained(options: ModelOptions) -> Trained:
    """The model that the options name, on their device; raises as `load_any`."""
    device = select_device(options.device)
    dtype = select_precision(options.precision, device, reading=True)
    return load_any(options.checkpoint, device=device, dtype=dtype)


def load_run(checkpoint: str) -> Trained:
    """The model of a run's newest checkpoint or, as `RUN/best`, the best by validation; of the one named; or
    of the newest run ("auto"). On the CPU.
    """
    folder = run_checkpoint(checkpoint).resolve()
    run, about = folder.parent.parent, read_about(folder)
    # On the device that it was trained on, which need not be here, nothing depends.
    config = TrainConfig.for_machine(**{**about["config"], "device": "cpu"})
    tokenizer = stored_tokenizer(run) or ByteTokenizer()
    expect_tokenizer(tokenizer, about["data"]["tokenizer"], f"the run in {run}")
    model = load_model(folder, config, tokenizer.num_tokens)
    return Trained(model.eval(), tokenizer, config.seq_len, about["data"]["dialog"], folder, asdict(config))


def load_model(folder: Path, config: TrainConfig, num_tokens: int) -> LanguageModel:
    """The model of a checkpoint of the run of `config`, on the CPU; no weights are drawn for it."""
    with torch.device("meta"):
        model = build_model(config, num_tokens)
    model.to_empty(device="cpu")
    load_weights(folder, model)
    return model


def run_checkpoint(name: str) -> Path:
    """The checkpoint of a run that `name` means, as for `load_run`. The best is the newest, with a warning,
    where the one that was is damaged or could not be written.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(name)
    best = path.name == "best" and not path.exists()
    source = None
    with suppress(FileNotFoundError):
        source = Source.find(str(path.parent) if best else name, None)
    if source is None:
        where = "under runs/" if name == "auto" else "there"
        raise FileNotFoundError(
            f"checkpoint is {name!r}, but there is neither a complete checkpoint of a run nor a saved model "
            f"{where}"
        )
    newest = source.undamaged()
    state = read_about(newest)["state"]
    if not best or state["best_step"] is None or scored_best_since(path.parent, state):
        return newest
    return Source(path.parent, [newest, step_folder(path.parent, state["best_step"])]).undamaged()


def scored_best_since(run: Path, state: Mapping[str, Any]) -> bool:
    """Whether a run's newest checkpoint, of this state, had the best score, but only after it was written: a
    stop had cut the score short, and it was made up for when the run went on."""
    if "valid" not in state["due"]:
        return False
    rows = read_metrics(run / "metrics.jsonl")
    late = [row["loss"] for row in rows if (row["step"], row.get("split")) == (state["step"], "valid")]
    return any(loss is not None and loss < state["best_loss"] for loss in late)


def is_run(source: str) -> bool:
    """Whether `source` is a run's folder, its best, or one of its checkpoints, if it has any yet."""
    path = Path(source)
    folders = (path, path.parent if path.name == "best" else path)
    begun = any((folder / name).exists() for folder in folders for name in ("checkpoints", "metrics.jsonl"))
    return begun or step_of(path) >= 0


def load_any(
    source: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> Trained:
    """The model of anything that has weights: what `load_run` or `read_model` takes.

    device, dtype, config: as for `read_model`; a run tells its config.

    Raises:
        FileNotFoundError, ValueError: as those two; or the model has a tokenizer that did not come with it.
    """
    if source == "auto" or is_run(source):
        if config:
            raise ValueError(f"{', '.join(config)} cannot be given for {source}, a run, which tells them")
        trained = load_run(source)
        trained.model.to(device, dtype or torch.float32)
        return trained
    model, tokenizer = read_model(source, device=device, dtype=dtype, **config)
    return Trained(model, known_tokenizer(model, tokenizer, source), model.config.get("max_seq_len"))


def read_any(source: str, **options: Any) -> tuple[LanguageModel, Tokenizer | None]:
    """As `read_model`, and of runs too."""
    if not is_run(source):
        return read_model(source, **options)
    trained = load_any(source, **options)
    return trained.model, trained.tokenizer


def known_tokenizer(model: LanguageModel, tokenizer: Tokenizer | None, source: str) -> Tokenizer:
    """The tokenizer, if there is one, or else bytes for a model that has as many tokens.

    Raises:
        ValueError: it has not.
    """
    num_tokens = model.config["num_tokens"]
    if tokenizer is None and num_tokens != ByteTokenizer.num_tokens:
        raise ValueError(
            f"{source} is a model of {num_tokens:,} tokens with no tokenizer; expected one in its folder, or "
            f"a model of {ByteTokenizer.num_tokens} bytes"
        )
    return tokenizer or ByteTokenizer()
