"""From a run's options to its model, and from a model to the options that build one like it."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.ops import attention
from palm_pytorch.training.config import TrainConfig

MODELS: dict[str, type[LanguageModel]] = {
    "palm": PaLM,
    "palm-lite": PaLMLite,
    "lamda": LaMDA,
    "perceiver-ar": PerceiverAR,
}
BYTES = 256
# Of the way that a model is trained or computed, not of what it is.
NOT_OF_THE_MODEL = ("attention_backend", "embedding_std")


def build_model(config: TrainConfig, num_tokens: int = BYTES) -> LanguageModel:
    """The model of `config` with newly drawn weights.

    Raises:
        ValueError, TypeError: `architecture` has something that this model does not take.
    """
    kind = MODELS[config.model]
    arguments = {"num_tokens": num_tokens, **plain_arguments(config)}
    more = read_architecture(config.architecture)
    known = inspect.signature(kind).parameters
    for name in more:
        if name not in known or (name in arguments and name not in ("num_tokens", "logit_scale")):
            expected = ", ".join(each for each in known if each not in arguments)
            raise ValueError(
                f"architecture has {name}, which is no further option of {kind.__name__}: {expected}"
            )
    if isinstance(named := more.get("num_tokens"), int) and named < num_tokens:
        raise ValueError(f"architecture has num_tokens={named}; expected at least the data's {num_tokens}")
    return kind(**{**arguments, **more})


def check_attention(model: LanguageModel, dropout: float, device: torch.device) -> None:
    """Raise a ValueError unless the model's attention can be trained on the device."""
    backend, shape = model.config["attention_backend"], (1, 1, 1, model.config["dim_head"])
    if backend == "auto":
        return
    try:
        attention(
            *(torch.zeros(shape, device=device, requires_grad=True) for _ in "qkv"),
            dropout_p=dropout,
            backend=backend,
        )
    except ValueError as error:
        raise ValueError(f"architecture has attention_backend={backend}: {error}") from error


def plain_arguments(config: TrainConfig) -> dict[str, Any]:
    """What `config` says of the constructor's arguments, but for `architecture`."""
    names = ["dim", "depth", "heads", "dim_head", "ff_mult"]
    perceiver = config.model == "perceiver-ar"
    names += ["cross_attn_seq_len", "perceive_depth", "cross_attn_dropout"] if perceiver else []
    arguments = {name: getattr(config, name) for name in names}
    if perceiver:
        arguments["max_seq_len"] = config.seq_len
    dropouts = ("attn_dropout", "ff_dropout") if config.model in ("palm", "palm-lite") else ("dropout",)
    arguments |= dict.fromkeys(dropouts, config.dropout)
    if config.init_style == "palm":
        arguments |= {"embedding_std": 1.0, "logit_scale": config.dim**-0.5}
    return arguments


def read_architecture(text: str | None) -> dict[str, Any]:
    """`"norm=layernorm,qk_norm=true"` as `{"norm": "layernorm", "qk_norm": True}`.

    Raises:
        ValueError: it is not of this form.
    """
    found: dict[str, Any] = {}
    for part in text.split(",") if text else ():
        name, equals, value = (each.strip() for each in part.partition("="))
        if not (name and equals and value) or name in found:
            raise ValueError(f"architecture is {text!r}; expected NAME=VALUE,NAME=VALUE,..., each name once")
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            found[name] = value
    return found


def write_architecture(options: Mapping[str, Any]) -> str | None:
    """What `read_architecture` reads, in the order of the names; None for nothing."""
    parts = (
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in sorted(options.items())
    )
    return ",".join(parts) or None


def options_of(model: LanguageModel) -> dict[str, Any]:
    """The options of the group "model" that build a model like this one, for a run."""
    name, config = next(name for name, kind in MODELS.items() if isinstance(model, kind)), model.config
    found = {
        "model": name,
        **{each: config[each] for each in ("dim", "depth", "heads", "dim_head", "ff_mult")},
    }
    if name == "perceiver-ar":
        found["seq_len"] = config["max_seq_len"]
        found |= {each: config[each] for each in ("cross_attn_seq_len", "perceive_depth")}
    scaled = math.isclose(config["logit_scale"], config["dim"] ** -0.5)
    found["init_style"] = "palm" if scaled else "gpt2"
    with torch.device("meta"):
        plain = build_model(TrainConfig.for_machine(**found)).config
    further = {
        each: value
        for each, value in config.items()
        if value != plain[each] and "dropout" not in each and each not in NOT_OF_THE_MODEL
    }
    if scaled:
        further.pop("logit_scale", None)  # the last digit of it
    return {**found, "architecture": write_architecture(further)}
