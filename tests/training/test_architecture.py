"""A model is built from options, and the options of a model build it again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.training import machine
from palm_pytorch.training.architecture import (
    build_model,
    check_attention,
    options_of,
    read_architecture,
    write_architecture,
)
from palm_pytorch.training.config import TrainConfig

SHAPE: dict[str, Any] = {"num_tokens": 256, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "ff_mult": 2}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (PaLM(**SHAPE, attn_dropout=0.5), None),
        (PaLM(**SHAPE, norm="layernorm", qk_norm=True, xpos=True), "norm=layernorm,qk_norm=true,xpos=true"),
        (PaLM(**SHAPE, embedding_std=1.0, logit_scale=0.25), None),  # --init-style palm
        (PaLM(**SHAPE, logit_scale=0.5), "logit_scale=0.5"),
        (PaLMLite(**{**SHAPE, "num_tokens": 300}), "num_tokens=300"),
        (LaMDA(**SHAPE, kv_heads=2, num_buckets=16, tie_embeddings=False, bias=True), None),
        (
            PerceiverAR(**SHAPE, max_seq_len=24, cross_attn_seq_len=7, perceive_depth=2, norm="layernorm"),
            None,
        ),
    ],
)
def test_the_options_of_a_model_build_it_again(model: LanguageModel, expected: str | None) -> None:
    options = options_of(model)
    again = build_model(TrainConfig.for_machine(**options))
    assert type(again) is type(model)
    trained = {name for name in model.config if "dropout" in name} | {"embedding_std"}
    for name in {*model.config} - trained:
        assert again.config[name] == model.config[name], name
    again.load_state_dict(model.state_dict())
    tokens = torch.arange(20)[None]
    assert torch.equal(again.eval()(tokens), model.eval()(tokens))
    if expected is not None or type(model) is PaLM:
        assert options["architecture"] == expected


def test_further_options_of_the_constructor() -> None:
    config = TrainConfig.for_machine(model="lamda", dim=16, architecture="kv_heads=4, num_buckets=16")
    found = build_model(config).config
    assert (found["kv_heads"], found["num_buckets"], found["max_distance"]) == (4, 16, 128)


def test_they_survive_being_written() -> None:
    options = {"norm": "layernorm", "qk_norm": True, "kv_heads": 4, "logit_scale": 0.5}
    assert read_architecture(write_architecture(options)) == options
    assert write_architecture({}) is None and read_architecture(None) == {}
    assert read_architecture("qk_norm=False,xpos=True") == {"qk_norm": False, "xpos": True}


def test_speed_is_measured_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are built on the meta device, where a product takes no time: precision was chosen by chance."""
    devices: list[str] = []
    monkeypatch.setattr(machine, "timed_product", lambda a, b: devices.append(a.device.type) or 1.0)
    with torch.device("meta"):
        machine.measured_flops.__wrapped__(torch.float32, size=8, seconds=0)
    assert set(devices) == {"cpu"}


@pytest.mark.parametrize("text", ["norm", "norm=", "=3", "norm=a,norm=b", "norm=layernorm,"])
def test_what_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"architecture is '.*'; expected NAME=VALUE"):
        read_architecture(text)


def test_values_that_the_data_or_the_machine_do_not_serve() -> None:
    def built(architecture: str) -> LanguageModel:
        return build_model(TrainConfig.for_machine(dim=16, architecture=architecture))

    with pytest.raises(ValueError, match="architecture has num_tokens=10; expected at least the data's 256"):
        built("num_tokens=10")
    assert built("num_tokens=300").config["num_tokens"] == 300
    cpu = torch.device("cpu")
    for served in ("auto", "sdpa"):
        check_attention(built(f"attention_backend={served}"), 0.1, cpu)
    with pytest.raises(ValueError, match="architecture has attention_backend=flex: backend 'flex': "):
        check_attention(built("attention_backend=flex"), 0.1, cpu)


@pytest.mark.parametrize("name", ["kv_heads", "dim", "ff_dropout", "self"])
def test_what_the_model_has_not_or_another_option_says(name: str) -> None:
    config = TrainConfig.for_machine(model="palm", architecture=f"{name}=1")
    with pytest.raises(
        ValueError, match=rf"architecture has {name}, which is no further option of PaLM: .*norm"
    ):
        build_model(config)
