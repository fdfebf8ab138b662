"""How much arithmetic training is, and how much a device could do: what its utilisation is made of."""

from __future__ import annotations

import torch
from torch import nn

from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.training.machine import measured_flops

# FLOP/s of matrix products in bfloat16 (into float32) and in float32 (not TF32), dense: data sheets that give
# the rate with sparsity mean twice that. NVIDIA's data sheets of the products; for the GeForce cards the
# appendices of its white papers on the AD102 and GA102. Names are the driver's, in full: a laptop's card or a
# slice of a GPU (MIG) has another name and another rate.
A100, H100, H200 = (312e12, 19.5e12), (989.5e12, 67e12), (989.5e12, 67e12)
PEAKS: dict[str, tuple[float, float]] = {
    "NVIDIA A10": (125e12, 31.2e12),
    "NVIDIA A30": (165e12, 10.3e12),
    "NVIDIA A40": (149.7e12, 37.4e12),
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100 80GB PCIe": A100,
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H100 NVL": (835.5e12, 60e12),
    "NVIDIA H100 PCIe": (756.5e12, 51e12),
    "NVIDIA H200": H200,
    "NVIDIA H200 NVL": (835.5e12, 60e12),
    "NVIDIA L4": (121e12, 30.3e12),
    "NVIDIA L40": (181.05e12, 90.5e12),
    "NVIDIA L40S": (362.05e12, 91.6e12),
    "NVIDIA GeForce RTX 3090": (71e12, 35.6e12),
    "NVIDIA GeForce RTX 4090": (165.2e12, 82.6e12),
}


def training_flops(model: LanguageModel, seq_len: int, *, causal: bool = False) -> float:
    """Floating-point operations of forward and backward on a sequence of `seq_len` tokens.

    `6 N + 12 L H Q T` for each token (Chowdhery et al. 2022, appendix B; N weights, L layers, H heads of Q
    dims, T tokens): what the model needs, not what is computed again to save memory. N counts the weights
    that multiply: looking up an embedding is no product, tied logits are. The model may be on the
    meta device.

    causal: count only the keys that a query sees, not all, as the paper does.
    """
    config = model.config
    prefix_len = config.get("cross_attn_seq_len", 0)
    latents = seq_len - prefix_len
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    if model.to_logits is None:
        linear += config["num_tokens"] * config["dim"]
    multiplied = latents * linear
    pairs = config["depth"] * latents * latents / (2 if causal else 1)
    layer: nn.Module
    for layer in getattr(model, "perceive_layers", ()):
        # Of all layers, only the keys and values of these see the prefix.
        multiplied += prefix_len * layer.get_submodule("attn.to_kv").get_parameter("weight").numel()
        pairs += latents * (prefix_len + latents / 2 if causal else seq_len)
    return 6.0 * multiplied + 12.0 * config["heads"] * config["dim_head"] * pairs


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """FLOP/s that matrix products reach on `device` at best: by its data sheet, or, of a CPU, as measured.

    None where that is not known: no utilisation is better than a wrong one.
    """
    if device.type == "cpu":
        return measured_flops(precision)
    known = PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is None or precision not in (torch.bfloat16, torch.float32):
        return None
    if precision == torch.bfloat16:
        return known[0]
    return known[1] if torch.get_float32_matmul_precision() == "highest" else None
