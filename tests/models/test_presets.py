"""Presets against the parameter counts that their papers and model cards print."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from palm_pytorch.models import LaMDA, PaLM, PerceiverAR, preset

# Literal, from PaLM's Table 1 (8.63B, 62.50B, 540.35B) and the released files of the C4 checkpoints.
PALM_PARAMETERS = {
    "palm-8b": 8_632_012_800,
    "palm-62b": 62_495_662_080,
    "palm-540b": 540_356_474_880,
    "palm-150m": 144_811_776,
    "palm-410m": 410_149_888,
    "palm-1b": 983_861_248,
    "palm-2b": 2_157_836_800,
}
# Positions and latents as the Perceiver AR paper and code give them.
PERCEIVER_AR_LENGTHS = {
    "perceiver-ar-copy": (131_072, 1024),
    "perceiver-ar-imagenet64": (12_289, 1024),
    "perceiver-ar-pg19": (2048, 1024),
    "perceiver-ar-maestro": (4096, 2048),
}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "parameters"), PALM_PARAMETERS.items())
def test_palm_has_the_published_parameter_count(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = PaLM(**preset(name))
    assert count(model) == parameters
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "billions", "matrices"),
    [
        # depth * (4 * dim * heads * 128 for attention + 3 * dim * 8 * dim for the feed-forward), by hand.
        ("lamda-2b", 2, 2_097_152_000),
        ("lamda-8b", 8, 8_589_934_592),
        ("lamda-137b", 137, 137_438_953_472),
    ],
)
def test_lamda_has_the_published_parameter_count(name: str, billions: int, matrices: int) -> None:
    with torch.device("meta"):
        model = LaMDA(**preset(name))
    # The paper counts parameters other than embeddings, and cuts after the billions.
    count_without_embeddings = sum(p.numel() for p in model.parameters() if p.shape[0] != 32_000)
    assert count_without_embeddings // 10**9 == billions
    # What is left after the matrices: gains of norms and the tables of relative biases.
    assert 0 < count_without_embeddings - matrices < 1e-4 * matrices


@pytest.mark.parametrize(("name", "lengths"), PERCEIVER_AR_LENGTHS.items())
def test_perceiver_ar_has_the_published_positions_and_latents(name: str, lengths: tuple[int, int]) -> None:
    arguments = preset(name)
    assert (arguments["max_seq_len"], arguments["max_seq_len"] - arguments["cross_attn_seq_len"]) == lengths
    assert arguments["heads"] * arguments["dim_head"] == arguments["dim"] == 1024
    with torch.device("meta"):
        PerceiverAR(**arguments)


def test_perceiver_ar_of_imagenet_has_the_published_parameter_count() -> None:
    with torch.device("meta"):
        model = PerceiverAR(**preset("perceiver-ar-imagenet64"))
    # The paper's 770.1M has no gates in its 61 feed-forwards, nor an embedding for each of 12,289 positions,
    # but it has biases and a projection of the queries, less than 0.3% together.
    gates = 61 * 1024 * 4096
    positions = 12_289 * 1024
    assert count(model) - gates - positions == pytest.approx(770.1e6, rel=3e-3)


def test_each_call_returns_a_dict_of_its_own() -> None:
    preset("palm-8b")["dim"] = 1
    assert preset("palm-8b")["dim"] == 4096


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("palm-8B", r"name: .*got 'palm-8B'; did you mean 'palm-8b'\?"),
        ("lamda-137", r"name: .*got 'lamda-137'; did you mean 'lamda-137b'\?"),
        ("gpt", "name: expected one of palm-8b, .*perceiver-ar-maestro, got 'gpt'$"),
        ("", "name: .*got ''$"),
    ],
)
def test_unknown_name_is_refused_with_those_known(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        preset(name)


def test_name_must_be_a_string() -> None:
    with pytest.raises(TypeError, match=r"name: expected a string, got \['palm-8b'\]"):
        preset(["palm-8b"])  # type: ignore[arg-type]
