"""What is measured: kinds of attention, their sizes and their tensors.

Shapes: b batch; h query heads, one key/value head; i, j query and key length; d head dim.
q (b, h, i, d) and k, v (b, 1, j, d) lie in memory as (b, position, head, d), as projections give them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from palm_pytorch.ops.attention import AlibiBias, RelativeBias

KINDS = {
    "plain": "causal",
    "alibi": "causal, ALiBi",
    "t5": "causal, T5 bias and its gradient",
    "prefix": "the last positions see all before them",
    "decode": "one query, a long cache",
}
FORWARD, BOTH = "forward", "forward + backward"
LATENTS = 512  # queries of "prefix", at most


@dataclass(frozen=True)
class Case:
    """batch: so that there are as many tokens at each length.  heads: so that h * d is the same at each d."""

    kind: str
    dim_head: int
    length: int
    batch: int
    heads: int

    def __str__(self) -> str:
        queries = f"{self.queries} of " if self.kind == "prefix" else ""
        return f"{self.kind} d={self.dim_head} {self.batch} x {queries}{self.length:,}"

    @property
    def queries(self) -> int:
        return {"decode": 1, "prefix": min(LATENTS, self.length // 2)}.get(self.kind, self.length)

    @property
    def passes(self) -> tuple[str, ...]:
        return (FORWARD,) if self.kind == "decode" else (FORWARD, BOTH)

    def flops(self, which: str) -> float:
        """Two products of 2 d operations for each key that a query sees; backward has five and counts as 2.5
        forwards, whatever a backend computes again."""
        i, j = self.queries, self.length
        visible = i * j - i * (i - 1) // 2
        return 4 * self.batch * self.heads * visible * self.dim_head * (3.5 if which == BOTH else 1)

    def bytes(self, itemsize: int) -> int:
        """q, k, v and the output, once each."""
        return 2 * self.batch * self.dim_head * (self.heads * self.queries + self.length) * itemsize


@dataclass(frozen=True)
class Sizes:
    """What is measured. tokens: batch * length; cached: the same when decoding.  width: heads * d.
    seconds: all of it may take.  repeat: seconds that one timing should take.
    matmul, copied: side of the square matrices, and bytes, that the ceilings are measured with.
    """

    lengths: tuple[int, ...]
    decode_lengths: tuple[int, ...]
    dims: tuple[int, ...]
    tokens: int
    cached: int
    width: int
    seconds: float
    repeat: float
    matmul: tuple[int, ...]
    copied: int
    kinds: tuple[str, ...] = tuple(KINDS)

    def cases(self) -> list[Case]:
        return [
            Case(kind, d, n, max(1, tokens // n), max(1, self.width // d))
            for kind in self.kinds
            for lengths, tokens in [
                (self.decode_lengths, self.cached) if kind == "decode" else (self.lengths, self.tokens)
            ]
            for d in self.dims
            for n in lengths
        ]

    def quick(self) -> Sizes:
        small = {
            "lengths": (128, 256),
            "decode_lengths": (1024,),
            "dims": (64,),
            "tokens": 512,
            "cached": 4096,
        }
        return replace(self, **small, width=256, repeat=0.01, matmul=(512,), copied=1 << 24)


GPU = Sizes(
    (1024, 2048, 4096, 8192, 16384), (4096, 8192, 16384, 32768), (64, 128, 256), 1 << 14, 1 << 20, 2048,
    seconds=270, repeat=0.06, matmul=(4096, 8192), copied=1 << 30,
)  # fmt: skip
CPU = Sizes(
    (512, 2048), (4096, 16384), (64, 128), 1 << 11, 1 << 17, 512,
    seconds=55, repeat=0.04, matmul=(1024, 2048), copied=1 << 28,
)  # fmt: skip


class Inputs(NamedTuple):
    """grad: of the output.  bias: AlibiBias, RelativeBias or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    bias: AlibiBias | RelativeBias | None
    learn: bool

    @staticmethod
    def random(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        learn = case.kind != "decode"

        def random(positions: int, heads: int) -> Tensor:
            shape = (case.batch, positions, heads, case.dim_head)
            return torch.randn(shape, device=device, dtype=dtype, generator=generator).transpose(1, 2)

        q, grad = (random(case.queries, case.heads) for _ in range(2))
        k, v = (random(case.length, 1) for _ in range(2))
        bias: AlibiBias | RelativeBias | None = None
        if case.kind == "alibi":
            steps = torch.arange(1, case.heads + 1, device=device)
            bias = AlibiBias(2 ** (-8 / case.heads * steps))
        if case.kind == "t5":
            scale = case.dim_head**0.5
            table = torch.randn(32, case.heads, device=device, generator=generator) / scale
            bias = RelativeBias(table.requires_grad_(), scale=scale)
        return Inputs(*(t.requires_grad_(learn) for t in (q, k, v)), grad, bias, learn)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient."""
        table = {"table": self.bias.table} if isinstance(self.bias, RelativeBias) else {}
        return {"q": self.q, "k": self.k, "v": self.v, **table}

    @property
    def shift(self) -> int:
        """The position of the first query."""
        return self.k.shape[2] - self.q.shape[2]

    def last(self, rows: int) -> Inputs:
        """The last queries of the last batch row, and all their keys."""
        q, grad = (t[-1:, :, -rows:].detach() for t in (self.q, self.grad))
        k, v = (t[-1:].detach() for t in (self.k, self.v))
        return Inputs(*(t.requires_grad_(self.learn) for t in (q, k, v)), grad, self.bias, self.learn)

    def double(self) -> Inputs:
        bias = self.bias
        if isinstance(bias, AlibiBias):
            bias = AlibiBias(bias.slopes.double())
        if isinstance(bias, RelativeBias):
            bias = replace(bias, table=bias.table.detach().double().requires_grad_())
        q, k, v = (t.detach().double().requires_grad_(self.learn) for t in (self.q, self.k, self.v))
        return Inputs(q, k, v, self.grad.double(), bias, self.learn)
