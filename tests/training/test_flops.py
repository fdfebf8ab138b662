"""The work of training is that of the PaLM paper's formula, and of the products that PyTorch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR, preset
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.training import machine
from palm_pytorch.training.flops import peak_flops, training_flops
from palm_pytorch.training.machine import measured_flops
from palm_pytorch.training.meter import Meter, peak_memory

SHAPE: dict[str, Any] = {"num_tokens": 40, "dim": 24, "depth": 3, "heads": 3, "dim_head": 8}
CUDA = torch.device("cuda")


def test_the_formula_of_the_paper() -> None:
    """6 N + 12 L H Q T for a token, with the paper's own 540B: L = 118, H = 48, Q = 256, T = 2048."""
    with torch.device("meta"):
        palm = PaLM(**preset("palm-540b"))
    weights = sum(p.numel() for p in palm.parameters() if p.dim() > 1)
    per_token = training_flops(palm, 2048) / 2048
    assert per_token == 6 * weights + 12 * 118 * 48 * 256 * 2048
    # 238.3 thousand tokens per second on 6,144 chips of 275 TFLOP/s are 46.2% (section 4.1, appendix B).
    assert 238_300 * per_token / (6144 * 275e12) == pytest.approx(0.462, abs=0.0005)


@pytest.mark.parametrize("name", ["palm", "palm-lite", "lamda", "perceiver-ar", "untied"])
def test_it_is_what_the_products_take(name: str) -> None:
    """Every product of a forward pass, as PyTorch counts them, three times: once forward, twice backward."""
    kinds: dict[str, tuple[type[LanguageModel], dict[str, Any]]] = {
        "palm": (PaLM, {}),
        "palm-lite": (PaLMLite, {}),
        "lamda": (LaMDA, {}),
        "untied": (PaLM, {"tie_embeddings": False}),
        "perceiver-ar": (
            PerceiverAR,
            {"max_seq_len": 20, "cross_attn_seq_len": 12, "perceive_depth": 2},
        ),
    }
    kind, more = kinds[name]
    model = kind(**SHAPE, **more, attention_backend="reference").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 20, dtype=torch.long))
    assert training_flops(model, 20) == pytest.approx(3 * counter.get_total_flops(), rel=1e-9)
    assert 0.5 < training_flops(model, 20, causal=True) / training_flops(model, 20) < 1


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.5e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756.5e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA A100-SXM4-80GB", torch.float16, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
    ],
)
def test_rates_of_gpus(
    name: str, precision: torch.dtype, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA, precision) == expected


def test_tf32_has_another_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(CUDA, torch.float32) is None
    assert peak_flops(torch.device("meta"), torch.bfloat16) is None


def test_the_rate_of_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([5.0, 2.0, 4.0, 3.0])
    monkeypatch.setattr(machine, "timed_product", lambda a, b: next(times))
    assert measured_flops(torch.float32, size=10, seconds=0) == 2 * 10**3 / 2.0
    monkeypatch.undo()
    assert 1e6 < measured_flops(torch.bfloat16, size=32, seconds=0) < 1e15


def test_a_meter_reads_utilisation_and_memory() -> None:
    cpu = torch.device("cpu")
    read = Meter(cpu, flops_per_token=3e6, peak_flops=1e9).read(tokens_per_second=100.0)
    assert read["mfu"] == 0.3
    assert 10**7 < read["memory_bytes"] <= peak_memory(cpu) < 10**12
    assert set(Meter(cpu, 3e6, None).read(100.0)) == {"memory_bytes"}
