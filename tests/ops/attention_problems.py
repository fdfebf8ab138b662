"""Attention problems: shapes, options and tensors to try a backend on, and how far it is from the definition.

Shapes: b batch; h query heads; g key/value heads; i, j query and key length; d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from definitions import alibi_bias, plain_attention, t5_bias
from torch import Tensor

from palm_pytorch.ops import AlibiBias, RelativeBias, attention


def _on_a_cpu() -> bool:
    """Whether the kernels run here: a release of Triton that they work with, and its interpreter."""
    try:
        from palm_pytorch.ops.attention.triton_op import INTERPRETED
    except ImportError:
        return False
    return bool(INTERPRETED)


needs_interpreter = pytest.mark.skipif(
    not _on_a_cpu(), reason="needs triton 3.6 or newer, and TRITON_INTERPRET=1 to run its kernels on a CPU"
)


def leeway(backend: str, dtype: torch.dtype) -> int:
    """How many times the reference's error a backend may make in a half precision. Triton's interpreter
    rounds to bfloat16 towards zero, which errs twice as much as to the nearest.
    """
    return 4 if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available() else 2


#        b, h, g, i, j, d
SIZES = [
    (1, 3, 3, 1, 1, 16),
    (2, 3, 1, 17, 17, 80),
    (1, 6, 2, 127, 127, 16),
    (2, 3, 1, 129, 129, 72),
    (1, 4, 2, 300, 300, 80),
    (2, 3, 1, 1, 129, 80),
    (1, 3, 3, 5, 300, 16),
    (2, 3, 1, 129, 17, 16),
    (1, 4, 2, 300, 1, 72),
]
# T5's buckets, max distance, scale; tables are normal with std 1, as some trained models' are.
T5 = {"t5": (32, 128, 1.0), "t5-scaled": (32, 128, 8.0), "t5-other": (10, 50, -0.7), "t5-two": (2, 3, 1.5)}
BIASES = [None, "alibi", *T5]
MASKS = [None, "keys", "keys-far", "documents", "unsorted-documents", "keys+documents"]


@dataclass(frozen=True)
class Case:
    size: tuple[int, int, int, int, int, int]
    causal: bool = True
    bias: str | None = None
    mask: str | None = None
    scale: float | None = None

    def __str__(self) -> str:
        shape = "b{}h{}g{}i{}j{}d{}".format(*self.size)
        parts = (shape, "causal" if self.causal else "full", self.bias, self.mask, self.scale)
        return "-".join(str(part) for part in parts if part is not None)


def cases(sizes: list[Any], biases: list[Any], masks: list[Any]) -> list[Case]:
    every = [Case(s, c, b, m) for s in sizes for c in (True, False) for b in biases for m in masks]
    return [case for case in every if case.size[3] <= case.size[4] or "documents" not in str(case.mask)]


def projected(batch: int, length: int, heads: list[int], d: int) -> list[Tensor]:
    """(batch, heads, length, d) each, float64: slices of one projection, as in a model."""
    fused = torch.randn(batch, length, sum(heads) * d, dtype=torch.float64)
    return [t.unflatten(-1, (-1, d)).transpose(1, 2) for t in fused.split([n * d for n in heads], dim=-1)]


@dataclass
class Problem:
    """The tensors of a case, in the dtype given, on the device given."""

    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor | None
    table: Tensor | None
    grad: Tensor
    options: dict[str, Any]

    @staticmethod
    def of(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Problem:
        torch.manual_seed(1)
        b, h, g, i, j, d = case.size
        (q, grad), (k, v) = projected(b, i, [h, h], d), projected(b, j, [g, g], d)
        exponents = torch.arange(1, 2 * h, 2, dtype=torch.promote_types(dtype, torch.float32))
        slopes = 1.3**-exponents if case.bias == "alibi" else None
        buckets = T5.get(case.bias or "", (32, 0, 0))[0]
        table = torch.randn(buckets, h, dtype=torch.float64)
        options: dict[str, Any] = {"causal": case.causal, "scale": case.scale}
        if "keys" in str(case.mask):
            key_mask = torch.rand(b, j) > 0.3
            key_mask[-1] = False  # the whole of the last row
            options["key_mask"] = key_mask
        if case.mask == "keys-far":  # no key close to the last queries, where biases are small
            options["key_mask"] = torch.arange(j).expand(b, j) < max(1, j - 60)
        if "documents" in str(case.mask):
            ids = torch.randint(-1, 4, (b, j))
            options["document_ids"] = ids if case.mask == "unsorted-documents" else ids.sort(dim=-1).values
        on_device = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in options.items()}
        q, k, v, grad, table = (t.to(device, dtype) for t in (q, k, v, grad, table))
        for leaf in (q, k, v, table):
            leaf.requires_grad_()
        return Problem(q, k, v, slopes, table if case.bias in T5 else None, grad, on_device)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.q, self.k, self.v, self.table) if t is not None]

    def bias(self, case: Case) -> AlibiBias | RelativeBias | None:
        if self.slopes is not None:
            return AlibiBias(self.slopes.to(self.q.device))
        return None if self.table is None else RelativeBias(self.table, *T5[str(case.bias)][1:])

    def solve(self, case: Case, backend: str, **more: Any) -> dict[str, Tensor]:
        out = attention(self.q, self.k, self.v, bias=self.bias(case), backend=backend, **self.options, **more)
        return self.named(out)

    def named(self, out: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(out, self.leaves, self.grad)
        return {"out": out.detach(), **dict(zip(("dq", "dk", "dv", "dtable"), grads, strict=False))}


@dataclass(frozen=True)
class Exact:
    """The definition in float64, on inputs as they are after rounding to a dtype.

    size: of each result, what its error is a share of; where a gradient cancels to nearly nothing, that is a
    share of what cancels.
    """

    results: dict[str, Tensor]
    size: dict[str, float]

    def errors(self, found: dict[str, Tensor]) -> dict[str, float]:
        return {
            name: rms(value.cpu().double() - self.results[name]) / self.size[name]
            for name, value in found.items()
        }


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@cache
def exact(case: Case, dtype: torch.dtype) -> Exact:
    problem = Problem.of(case, dtype)
    q, k, v, grad = (
        t.detach().double().requires_grad_() for t in (problem.q, problem.k, problem.v, problem.grad)
    )
    leaves, bias, (i, j) = [q, k, v], None, case.size[3:5]
    if problem.slopes is not None:
        bias = alibi_bias(problem.slopes.double(), i, j)
    if problem.table is not None:
        table = problem.table.detach().double().requires_grad_()
        bias = t5_bias(table, *T5[str(case.bias)][1:], i, j)
        leaves += [table, bias]
    out = plain_attention(q, k, v, bias=bias, **problem.options)
    grads = torch.autograd.grad(out, leaves, grad)
    results = {"out": out.detach(), **dict(zip(("dq", "dk", "dv", "dtable"), grads, strict=False))}
    size = {name: max(rms(result), 1e-3) for name, result in results.items()}
    for name in {"dq", "dk", "dtable"} & set(size):
        size[name] = max(size[name], 0.03 * size["dv"])
    if bias is not None and problem.table is not None:
        (summed,) = torch.autograd.grad(t5_bias(table, *T5[str(case.bias)][1:], i, j), table, grads[-1].abs())
        # A table's gradient is so many times that of the scores, and so is what cancels in it.
        amplified = 0.03 * size["dv"] * abs(T5[str(case.bias)][2])
        size["dtable"] = max(size["dtable"], 0.1 * rms(summed), amplified)
    return Exact(results, size)


@cache
def errors(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> dict[str, float]:
    found = Problem.of(case, dtype, device).solve(case, backend)
    for name, value in found.items():
        assert value.dtype == dtype, name
        assert value.isfinite().all(), name
    return exact(case, dtype).errors(found)
