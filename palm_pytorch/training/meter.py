"""What training takes of the machine: its share of the arithmetic that could be done, and memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Meter:
    """Reads off a step's speed what share of the machine it used.

    flops_per_token: of training, see `training_flops`.
    peak_flops: FLOP/s of all devices together; None where it is not known, and no share is told.
    """

    device: torch.device
    flops_per_token: float
    peak_flops: float | None

    def read(self, tokens_per_second: float) -> dict[str, float]:
        """`mfu`, the model FLOPs utilisation of the PaLM paper (appendix B), and `memory_bytes`."""
        row: dict[str, float] = {"memory_bytes": peak_memory(self.device)}
        if self.peak_flops is not None:
            row["mfu"] = float(f"{tokens_per_second * self.flops_per_token / self.peak_flops:.4g}")
        return row


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: of tensors on a GPU, or else of all (0: unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes, but for macOS
