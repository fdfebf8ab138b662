"""What the older projects' public code computed, in float64, with weights unlike those of a fresh model.

A file holds the weights (`state:`), `tokens`, `labels`, `logits` and the gradients of the mean cross-entropy
(`grad:`), by that code's names. The weights are numbers that bfloat16 has, and stored as such.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


@dataclass
class Golden:
    """config: the shape that the older model has, in our words."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    tokens: Tensor
    labels: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]
    inputs: dict[str, Tensor]


def golden(name: str) -> Golden:
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
        config = json.loads(file.metadata()["config"])

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): t.float() for k, t in tensors.items() if k.startswith(prefix)}

    inputs = {"prefix_mask": tensors["prefix_mask"]} if "prefix_mask" in tensors else {}
    tokens, labels = tensors["tokens"].long(), tensors["labels"].long()
    return Golden(config, under("state:"), tokens, labels, tensors["logits"], under("grad:"), inputs)
