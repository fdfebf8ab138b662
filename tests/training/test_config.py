"""Every option has a type, a help text and a rule; defaults suit the machine; what is wrong is named."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict, fields
from typing import Any

import pytest
import torch

from palm_pytorch.training import config, machine
from palm_pytorch.training.config import TrainConfig, model_options
from palm_pytorch.training.machine import select_device, select_precision


def test_every_option_says_what_it_is() -> None:
    for spec in fields(TrainConfig):
        assert spec.metadata["help"] and spec.metadata["group"], spec.name


@pytest.mark.parametrize(
    ("device", "shape"), [("cpu", (256, 4, 4, 64, 256)), ("cuda", (512, 12, 8, 64, 1024))]
)
def test_defaults_are_those_of_the_machine(
    device: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "select_device", lambda name: torch.device(device))
    monkeypatch.setattr(config, "select_precision", lambda name, device: torch.bfloat16)
    made = TrainConfig.for_machine()
    assert (made.dim, made.depth, made.heads, made.dim_head, made.seq_len) == shape
    assert (made.model, made.device, made.precision) == ("palm", "auto", "bfloat16")


def test_what_follows_from_other_options() -> None:
    made = TrainConfig.for_machine(steps=500, lr=0.5, model="perceiver-ar", seq_len=30)
    assert (made.schedule_steps, made.warmup_steps, made.min_lr) == (500, 50, 0.05)
    assert (made.cross_attn_seq_len, made.perceive_depth, made.prompt_len) == (15, 1, 23)
    assert made.out.startswith("runs/perceiver-ar-")
    made = TrainConfig.for_machine(steps=500, schedule_steps=20_000, batch_size=3, grad_accum=5, seq_len=7)
    assert (made.schedule_steps, made.warmup_steps, made.tokens_per_step) == (20_000, 100, 105)
    assert (made.cross_attn_seq_len, made.perceive_depth, made.prompt_len) == (None, None, 4)
    assert TrainConfig.for_machine(steps=3).warmup_steps == 0


@pytest.mark.parametrize("model", ["palm", "palm-lite", "lamda", "perceiver-ar"])
def test_a_config_survives_json_and_cannot_be_changed(model: str) -> None:
    made = TrainConfig.for_machine(model=model)
    assert TrainConfig(**json.loads(json.dumps(asdict(made)))) == made
    with pytest.raises(FrozenInstanceError):
        made.dim = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        (
            {"model": "gpt"},
            ValueError,
            "model is 'gpt'; expected one of palm, palm-lite, lamda, perceiver-ar",
        ),
        (
            {"precision": "float8"},
            ValueError,
            "precision is 'float8'; expected one of auto, float32, bfloat16",
        ),
        ({"dim": 0}, ValueError, "dim is 0; expected a finite number above 0"),
        ({"batch_size": -1}, ValueError, "batch_size is -1; expected a finite number above 0"),
        ({"steps": "10"}, TypeError, "steps is '10', of type str; expected int"),
        ({"depth": 2.0}, TypeError, "depth is 2.0, of type float; expected int"),
        ({"grad_accum": True}, TypeError, "grad_accum is True, of type bool; expected int"),
        ({"lr": float("nan")}, ValueError, "lr is nan; expected a finite number above 0"),
        ({"lr": float("inf")}, ValueError, "lr is inf; expected a finite number above 0"),
        ({"grad_clip": -0.1}, ValueError, "grad_clip is -0.1; expected a finite number, 0 or more"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0; expected a number from 0"),
        ({"seed": 2**63}, ValueError, "seed is 9223372036854775808; expected"),
        ({"data": 3}, TypeError, "data is 3, of type int; expected str or None"),
        ({"min_lr": 1.0}, ValueError, "min_lr is 1.0; it must be at most lr"),
        (
            {"spike_rewind": 9, "spike_skip": 9},
            ValueError,
            "spike_skip is 9; it must be above spike_rewind (9)",
        ),
        (
            {"steps": 9, "warmup_steps": 10},
            ValueError,
            "warmup_steps is 10; it must be at most schedule_steps",
        ),
        (
            {"cross_attn_seq_len": 8},
            ValueError,
            "cross_attn_seq_len is 8 and model 'palm'; only perceiver-ar",
        ),
        ({"perceive_depth": 2}, ValueError, "perceive_depth is 2 and model 'palm'; only perceiver-ar"),
        ({"cross_attn_dropout": 0.5}, ValueError, "cross_attn_dropout is 0.5 and model 'palm'; only"),
        (
            {"model": "perceiver-ar", "seq_len": 64, "cross_attn_seq_len": 64},
            ValueError,
            "cross_attn_seq_len is 64; it must be below seq_len (64)",
        ),
        ({"device": "abacus"}, ValueError, "device is 'abacus'; expected one that PyTorch can use here"),
        ({"device": "meta"}, ValueError, "device is 'meta'; expected one that PyTorch can use here"),
        ({"learning_rate": 1.0}, TypeError, "learning_rate is not an option; there are model, dim,"),
    ],
)
def test_bad_options_are_named(given: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind) as error:
        TrainConfig.for_machine(**given)
    assert str(error.value).startswith(says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(ValueError, match="device is 'cuda'"):
        select_device("cuda")
    assert select_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
    ],
)
def test_auto_precision_is_bfloat16_where_the_processor_is_faster_at_it(
    capabilities: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that only have to be read are half as many bytes wherever the instructions are there."""
    cpu, rates = torch.device("cpu"), {torch.float32: 2.0, torch.bfloat16: 3.0}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(machine, "measured_flops", rates.__getitem__)
    assert select_precision("auto", cpu) == select_precision("auto", cpu, reading=True) == expected
    rates[torch.bfloat16] = 1.0
    assert select_precision("auto", cpu) == torch.float32
    assert select_precision("auto", cpu, reading=True) == expected
    assert select_precision("float32", cpu) == torch.float32
    assert select_precision("bfloat16", cpu) == torch.bfloat16


def test_auto_precision_is_decided_with_the_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run has what its config says, whatever is measured then."""
    monkeypatch.setattr(config, "select_precision", lambda name, device: torch.bfloat16)
    assert TrainConfig.for_machine(device="cpu").precision == "bfloat16"
    assert TrainConfig.for_machine(device="cpu", precision="auto").precision == "bfloat16"
    assert TrainConfig.for_machine(device="cpu", precision="float32").precision == "float32"


def test_auto_precision_with_a_pytorch_that_does_not_tell_capabilities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("get_capabilities", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert select_precision("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(machine, "measured_flops", lambda dtype: dtype.itemsize**-1)
    assert select_precision("auto", torch.device("cpu")) == torch.bfloat16


def test_only_learned_positions_tie_a_model_to_its_sequence_length() -> None:
    assert "seq_len" in model_options("perceiver-ar")
    assert "seq_len" not in model_options("palm")
    assert {"model", "dim", "depth", "heads", "dim_head", "ff_mult"} <= set(model_options("palm"))
    assert not {"dropout", "lr", "steps", "data"} & set(model_options("perceiver-ar"))
