"""The machine that a run is on: its device, the precision it is fast at, its rate, its memory."""

from __future__ import annotations

import ctypes
import os
import time
from functools import cache
from pathlib import Path

import torch

# From malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# Microseconds of processor time that a container gets in so many, or "max".
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def keep_to_quota() -> None:
    """Have torch use no more threads than the container may use cores at a time; it counts those of the
    machine, and threads that are not let run are waited for at every operation. OMP_NUM_THREADS goes before.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    try:
        quota, period = map(int, CPU_QUOTA.read_text(encoding="utf-8").split())
    except (OSError, ValueError):  # there is none
        return
    torch.set_num_threads(max(1, min(torch.get_num_threads(), quota // period)))


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next tensors; returns whether it can (glibc does).

    By default it returns every large tensor to the system at once, which clears its pages for the next one:
    of a training step on a CPU, a tenth of the time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def select_device(name: str) -> torch.device:
    """The device that `name` stands for: "auto" is the GPU if there is one, else the CPU.

    Raises:
        ValueError: PyTorch does not know it, or cannot use it on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device is {name!r}; expected one that PyTorch can use here ({reason})") from error
    return device


def select_precision(name: str, device: torch.device, *, reading: bool = False) -> torch.dtype:
    """The dtype of matrix products on `device`; "auto" is bfloat16 where the processor is faster at it.

    reading: of work that waits for weights to be read rather than for products, as drawing tokens does; there
    bfloat16, half as many bytes, only has to be something that the processor multiplies.
    """
    if name == "auto":
        suits = multiplies_bfloat16(device) and (
            reading or device.type != "cpu" or measured_flops(torch.bfloat16) > measured_flops(torch.float32)
        )
        name = "bfloat16" if suits else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 matrices itself, rather than by way of float32.

    That does not make it faster: a Xeon (Sapphire Rapids) whose AMX is hidden from a virtual machine has
    AVX-512's instructions for it, with which PyTorch 2.13 reaches half of what it does in float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if capabilities := getattr(torch.cpu, "get_capabilities", None):
        return any(capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    # Older than that function: private ones, which may be missing and know no Arm.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in probes)


@cache
def measured_flops(precision: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest product of two square matrices on this CPU, with the threads that PyTorch has.

    At 1024 this is within a few percent of what larger ones reach.
    """
    # Whatever the default device is where this is first asked: on "meta" a product takes no time.
    a, b = (torch.ones(size, size, dtype=precision, device="cpu") for _ in range(2))
    best, until = float("inf"), time.perf_counter() + seconds
    for _ in range(3):
        best = min(best, timed_product(a, b))
    while time.perf_counter() < until:
        best = min(best, timed_product(a, b))
    return 2 * size**3 / best


def timed_product(a: torch.Tensor, b: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - started
