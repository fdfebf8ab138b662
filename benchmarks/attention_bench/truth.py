"""What a backend must have computed before it is timed: the plain definition in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from attention_bench.backends import Work, ours
from attention_bench.cases import Inputs
from torch import Tensor

# Against float64, an output or gradient may be this many times as wrong as the plain definition is in the
# same precision, as a whole and in its worst row; and so many roundings of that precision, because a slice is
# small enough for luck: a kernel that is wrong is so by far more.
TIMES, ROUNDINGS = (2, 4), (0.5, 8)
LEAST_ROUNDING = 2e-5  # what float32 is held to


class Wrong(Exception):
    """What a backend computed is not what the plain definition says."""


def outcome(work: Work, x: Inputs) -> dict[str, Tensor]:
    """The output and, where there is learning, every gradient."""
    out = work()
    if not x.learn:
        return {"out": out}
    grads = torch.autograd.grad(out, list(x.leaves.values()), x.grad)
    return {"out": out.detach(), **{f"d{name}": g for name, g in zip(x.leaves, grads, strict=True)}}


def decided_by_last(results: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """What the last queries of the last batch row decide alone: under causal attention no other query sees
    the last keys. A table's gradient is not among it."""
    return {name: t[-1:, :, -rows:] for name, t in results.items() if name != "dtable"}


class Errors(NamedTuple):
    """How far a tensor (..., d) is from the truth, over the size of the truth: as a whole, and in the worst
    of its rows of d, where a kernel that fails at an edge shows."""

    whole: float
    row: float

    @staticmethod
    def of(found: Tensor, truth: Tensor) -> Errors:
        if found.shape != truth.shape:
            return Errors(math.inf, math.inf)
        difference, size = (t.norm(dim=-1) for t in (found.double() - truth, truth))
        whole = size.square().mean().sqrt()
        # A row of nearly nothing, as the first query has in dq, rounds as the others do.
        rows = difference / (size + whole)
        return Errors((difference.square().mean().sqrt() / whole).item(), rows.max().item())


class Truth:
    """What the plain definition gives in float64, and how wrong it is in the precision that is timed."""

    def __init__(self, x: Inputs, rows: int | None = None) -> None:
        self.rows = rows
        part = x if rows is None else x.last(rows)
        reference = ours("reference")
        exact = part.double()
        self.exact = self._cut(outcome(reference(exact), exact))
        plain = self._cut(outcome(reference(part), part))
        self.allowed = {name: Errors.of(plain[name], self.exact[name]) for name in plain}
        self.rounding = max(torch.finfo(x.q.dtype).eps, LEAST_ROUNDING)

    def _cut(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        return results if self.rows is None else decided_by_last(results, self.rows)

    def expect(self, results: dict[str, Tensor]) -> None:
        """Raises Wrong unless the results of a backend are right."""
        for name, found in self._cut(results).items():
            error, allowed = Errors.of(found, self.exact[name]), self.allowed[name]
            for n, measure in enumerate(error._fields):
                value, limit = error[n], TIMES[n] * allowed[n] + ROUNDINGS[n] * self.rounding
                if not value <= limit:  # NaN is wrong too
                    raise Wrong(f"{name}: error ({measure}) {value:.1e}, at most {limit:.1e} expected")
