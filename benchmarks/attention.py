"""Attention alone: our kernels beside torch's and flash-attn's, as shares of what the device can do.

    python benchmarks/attention.py                       # the GPU if there is one, else the CPU
    python benchmarks/attention.py --kinds t5 --dims 64 --lengths 8192 --out /tmp
    python benchmarks/attention.py --quick               # small shapes: whether it runs, no result

What is measured, and how it is counted: README.md beside this file.

Shapes: b batch; h query heads, one key/value head; i, j query and key length; d head dim.
q (b, h, i, d) and k, v (b, 1, j, d) lie in memory as (b, position, head, d), as projections give them.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from machine import RESULTS, describe_machine, warn_if_busy
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm

from palm_pytorch.ops.attention import AlibiBias, RelativeBias, attention
from palm_pytorch.training.machine import keep_freed_memory, select_device, select_precision

KINDS = {
    "plain": "causal",
    "alibi": "causal, ALiBi",
    "t5": "causal, T5 bias and its gradient",
    "prefix": "the last positions see all before them",
    "decode": "one query, a long cache",
}
FORWARD, BOTH = "forward", "forward + backward"
LATENTS = 512  # queries of "prefix", at most
# Against float64, an output or gradient may be this many times as wrong as the plain definition is in the
# same precision, as a whole and in its worst row; and so many roundings of that precision, because a slice is
# small enough for luck: a kernel that is wrong is so by far more.
TIMES, ROUNDINGS = (2, 4), (0.5, 8)
LEAST_ROUNDING = 2e-5  # what float32 is held to
# What is checked: everything at this length, and at the length that is timed what its last queries decide.
CHECK_LENGTH, CHECK_BATCH, CHECK_ROWS = 512, 2, 64
FLUSH_BYTES = 256 << 20  # more than any GPU's cache holds


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


# ----------------------------------------------------------------------------------------------- backends

Work = Callable[[], Tensor]
# What a backend does once, outside of all timing, for given inputs; then it is called again and again.
Backend = Callable[[Inputs], Work]


class Refused(Exception):
    """A backend cannot serve a case, and this is why."""


def ours(name: str) -> Backend:
    """A backend of `palm_pytorch.ops.attention`."""

    def prepare(x: Inputs) -> Work:
        return lambda: attention(x.q, x.k, x.v, bias=x.bias, backend=name)

    return prepare


def torch_fused(kernel: SDPBackend, *, gqa: bool) -> Backend:
    """One of the kernels behind scaled_dot_product_attention and no other. It meets one key/value head by
    `enable_gqa`, or as a view with as many as there are query heads; a bias is a tensor (1, h, i, j)."""

    def prepare(x: Inputs) -> Work:
        (h, i), j = x.q.shape[1:3], x.k.shape[2]
        mask: Any = None
        if x.bias is not None:
            ahead = torch.ones(i, j, dtype=torch.bool, device=x.q.device).triu(x.shift + 1)
        elif 1 < i < j:
            mask = causal_lower_right(i, j)
        if isinstance(x.bias, AlibiBias):  # constant, so it is not in the time; by heads, or it would not fit
            mask = x.q.new_empty(1, h, i, j)
            for head, slope in enumerate(x.bias.slopes.split(1)):
                mask[0, head] = AlibiBias(slope).values(i, j)[0].masked_fill_(ahead, float("-inf"))

        def work() -> Tensor:
            k, v = (x.k, x.v) if gqa else (t.expand(-1, h, -1, -1) for t in (x.k, x.v))
            attn_mask = mask
            if isinstance(x.bias, RelativeBias):
                values = x.bias.values(i, j).to(x.q.dtype)[None]
                attn_mask = values.masked_fill(ahead, float("-inf"))
            with sdpa_kernel(kernel), warnings.catch_warnings(record=True) as reasons:
                warnings.simplefilter("always")
                try:
                    return F.scaled_dot_product_attention(
                        x.q, k, v, attn_mask=attn_mask, is_causal=x.bias is None and i == j, enable_gqa=gqa
                    )
                except RuntimeError as error:
                    if not re.search("No (available kernel|viable backend)", str(error)):
                        raise
                    raise Refused(refusal_of([str(reason.message) for reason in reasons])) from error

        return work

    return prepare


def refusal_of(reasons: list[str]) -> str:
    """Torch warns of everything that keeps each kernel from running, of those that are switched off too."""
    noise = ("kernel not used because", "runtime disabled")
    reasons = [r.partition(" (Triggered internally")[0] for r in reasons if not any(n in r for n in noise)]
    return " ".join(dict.fromkeys(reasons)) or "torch has no such kernel for these inputs"


def flex(x: Inputs) -> Work:
    """Torch's FlexAttention, compiled for just these shapes; the block mask is not in the time."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Torch gives up compiling after some recompilations of the same code, which other shapes would be.
    torch.compiler.reset()
    i_len, j_len, shift = x.q.shape[2], x.k.shape[2], x.shift
    blocks = None
    if i_len > 1:
        blocks = create_block_mask(
            lambda b, h, i, j: i + shift >= j, None, None, i_len, j_len, device=x.q.device
        )
    slopes = x.bias.slopes if isinstance(x.bias, AlibiBias) else None

    def attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None) -> Tensor:
        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if slopes is not None:
                return s - slopes[h] * (i + shift - j)
            if offsets is not None:
                return s + offsets[h, (i + shift - j).clamp(0, offsets.shape[1] - 1)]
            return s

        out: Tensor = flex_attention(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True)
        return out

    compiled = torch.compile(attend, dynamic=False, fullgraph=True)

    def work() -> Tensor:
        offsets = None
        if isinstance(x.bias, RelativeBias):  # one more, for all that is further away
            offsets = F.pad(x.bias.offsets(j_len), (0, 1)).contiguous()
        return compiled(x.q, x.k, x.v, offsets)

    return work


def flash_attn(x: Inputs) -> Work:
    """The package of that name, which takes (b, n, h, d)."""
    from flash_attn import flash_attn_func, flash_attn_with_kvcache

    if isinstance(x.bias, RelativeBias):
        raise Refused("it has no learned bias")
    slopes = x.bias.slopes if x.bias is not None else None

    def work() -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
        if x.learn:
            out = flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)
        else:
            out = flash_attn_with_kvcache(q, k, v, causal=True)
        return out.transpose(1, 2)

    return work


def backends(device: torch.device) -> tuple[dict[str, dict[str, Backend]], dict[str, str]]:
    """By name, ours first, in each of the ways to call it, of which the fastest counts; and what is left out,
    and why."""
    if device.type == "cpu":
        left_out = {
            "triton": "needs a GPU",
            "flex": "torch has no gradient for it on a CPU",
            "flash_attn": "needs a GPU",
        }
        return {name: {"": ours(name)} for name in ("blockwise", "sdpa", "reference")}, left_out
    found: dict[str, dict[str, Backend]] = {"triton": {"": ours("triton")}, "sdpa": {"": ours("sdpa")}}
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    for name, kernel in kernels.items():
        found[name] = {
            "enable_gqa": torch_fused(kernel, gqa=True),
            "expanded": torch_fused(kernel, gqa=False),
        }
    found["flex"] = {"": flex}
    if find_spec("flash_attn") is None:
        return found, {"flash_attn": "not installed"}
    return found | {"flash_attn": {"": flash_attn}}, {}


# ------------------------------------------------------------------------------------------------- checks


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
        # A row of nearly nothing, as the first query has in dq, is held to a share of the others.
        rows = difference / (size + 0.1 * whole)
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


# ------------------------------------------------------------------------------------------------- timing


@dataclass
class Clock:
    """Seconds of work on a device. repeat: how many to spend on it."""

    device: torch.device
    repeat: float

    def __post_init__(self) -> None:
        self.cold = None
        if self.device.type == "cuda":
            self.cold = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)

    def times(self, work: Callable[[], object]) -> list[float]:
        work()  # whatever happens only once
        if self.cold is None:
            times: list[float] = []
            while len(times) < 3 or sum(times) < self.repeat:
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
            return times
        [estimate], queueing = self._on_gpu(work, 1, wait=0)
        repeats = int(min(max(self.repeat / max(estimate, 1e-6), 3), 100))
        return self._on_gpu(work, repeats, wait=min(1.5 * queueing * repeats, 0.1))[0]

    def _on_gpu(self, work: Callable[[], object], repeats: int, wait: float) -> tuple[list[float], float]:
        """Seconds of each repeat, from a cold cache, and seconds that it took to queue one. The GPU begins
        after `wait` seconds: when all is queued, so that Python and slow launches are not in the time."""
        assert self.cold is not None
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize()
        torch.cuda._sleep(int(wait * 2e9))  # cycles, of 2 GHz or somewhat less
        queueing = time.perf_counter()
        for start, end in events:
            self.cold.zero_()
            start.record()
            work()
            end.record()
        queueing = time.perf_counter() - queueing
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events], queueing / repeats


def ceilings(sizes: Sizes, clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """The best rate of a square matrix product, and that of a copy: bytes read and bytes written."""
    flops = 0.0
    clock = replace(clock, repeat=5 * clock.repeat)
    for n in sizes.matmul:
        a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
        for second in (b, b.T):
            flops = max(flops, 2 * n**3 / median(clock.times(lambda a=a, second=second: a @ second)))
    source = torch.ones(sizes.copied, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    rate = 2 * sizes.copied / median(clock.times(lambda: target.copy_(source)))
    return {"flops_per_second": flops, "bytes_per_second": rate}


class DeviceLost(Exception):
    """A kernel broke the device for this process: nothing after it would be worth anything."""


def reason_of(error: Exception) -> str:
    """Why a backend gave no figure."""
    if isinstance(error, Refused):
        return f"refused: {error}"
    if isinstance(error, Wrong):
        return f"wrong: {error}"
    text = str(error).strip()
    cpu_full = isinstance(error, RuntimeError) and "can't allocate memory" in text
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or cpu_full:
        return "out of memory"
    if isinstance(error, ValueError) and text.startswith("backend "):  # our own library's refusal
        return f"refused: {text}"
    return f"failed: {type(error).__name__}: {text.partition(chr(10))[0][:200]}"


class Bench:
    """Checks and times backends; remembers the truth of the small cases."""

    def __init__(self, clock: Clock, dtype: torch.dtype, bounds: dict[str, float]) -> None:
        self.clock, self.dtype, self.bounds = clock, dtype, bounds
        self.small: dict[Case, tuple[Inputs, Truth]] = {}
        self.passed: set[tuple[Case, Backend]] = set()

    def inputs(self, case: Case) -> Inputs:
        return Inputs.random(case, self.clock.device, self.dtype)

    def small_case(self, case: Case) -> Case:
        return replace(case, length=min(case.length, CHECK_LENGTH), batch=min(case.batch, CHECK_BATCH))

    def check_small(self, case: Case, prepare: Backend) -> None:
        """Raises Wrong unless the backend is right, every gradient included, on a small case of that kind."""
        case = self.small_case(case)
        if (case, prepare) in self.passed:
            return
        if case not in self.small:
            x = self.inputs(case)
            self.small[case] = (x, Truth(x))
        x, truth = self.small[case]
        truth.expect(outcome(prepare(x), x))
        self.passed.add((case, prepare))

    def measure(self, case: Case, x: Inputs, truth: Truth, ways: dict[str, Backend]) -> dict[str, Any]:
        """Figures of each pass, in the way that was fastest; or the error."""
        found: dict[str, Any] = {}
        errors: dict[str, str] = {}
        for way, prepare in ways.items():
            try:
                self._measure(case, x, truth, way, prepare, found)
            except Exception as error:
                errors[way] = reason_of(error)
            if way in errors:
                # Outside of `except`, which holds on to the tensors of the frames that failed.
                self.recover(f"{case}, {errors[way]}")
        missing = any(which not in found for which in case.passes)
        if missing or any(error.startswith("wrong") for error in errors.values()):
            several = len(set(errors.values())) > 1
            found["error"] = "; ".join(
                dict.fromkeys(f"{error} ({way})" if several else error for way, error in errors.items())
            )
        return found

    def _measure(
        self, case: Case, x: Inputs, truth: Truth, way: str, prepare: Backend, found: dict[str, Any]
    ) -> None:
        with torch.set_grad_enabled(x.learn):
            self.check_small(case, prepare)
            work = prepare(x)
            truth.expect(outcome(work, x))
            leaves = list(x.leaves.values())
            passes: dict[str, Callable[[], object]] = {
                FORWARD: work,
                BOTH: lambda: torch.autograd.grad(work(), leaves, x.grad),
            }
            for which in case.passes:
                times = self.clock.times(passes[which])
                if which not in found or median(times) < found[which]["seconds"]:
                    found[which] = self._figures(case, which, times) | ({"way": way} if way else {})

    def _figures(self, case: Case, which: str, times: list[float]) -> dict[str, Any]:
        unit = "bytes_per_second" if case.kind == "decode" else "flops_per_second"
        work = case.bytes(self.dtype.itemsize) if case.kind == "decode" else case.flops(which)
        rate = work / median(times)
        return {
            "seconds": median(times),
            "seconds_range": [min(times), max(times)],
            unit: rate,
            "share": rate / self.bounds[unit],
        }

    def recover(self, what: str) -> None:
        gc.collect()
        if self.clock.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise DeviceLost(f"{what}: {str(error).partition(chr(10))[0]}") from error


# -------------------------------------------------------------------------------------------- the whole run

NOT_REACHED = "not reached"
# Of the time; after it, what compiles for long waits for the rest.
LATE_SHARE = 0.6

Results = dict[Case, dict[str, dict[str, Any]]]


class Entry(NamedTuple):
    """Backends to measure on a case. late: they compile for seconds, and wait where time runs short."""

    case: Case
    names: list[str]
    late: bool


def plan(cases: list[Case], names: list[str]) -> deque[Entry]:
    """The lengths that the targets name come first; FlexAttention, compiled case by case, after the rest."""
    slow = [name for name in names if name == "flex"]
    quick = [name for name in names if name not in slow]
    first, rest = [], []
    for case in cases:
        (first if case.length == headline(cases, case) else rest).append(case)
    return deque(
        Entry(case, group, group is slow)
        for part in (first, rest)
        for group in (quick, slow)
        if group
        for case in part
    )


def headline(cases: list[Case], case: Case) -> int:
    """The longest length up to 8,192, or 32,768 when decoding, of the cases of this kind."""
    lengths = [other.length for other in cases if other.kind == case.kind]
    most = 32768 if case.kind == "decode" else 8192
    return max((n for n in lengths if n <= most), default=min(lengths))


def run(
    sizes: Sizes, device: torch.device, report: dict[str, Any], results: Results, dtype: torch.dtype
) -> None:
    """Fills report and results, which are worth keeping at any time."""
    began = time.perf_counter()
    ways, report["left_out"] = backends(device)
    cases, names = sizes.cases(), list(ways)
    report["backends"] = names
    results |= {case: {name: {"error": NOT_REACHED} for name in names} for case in cases}
    clock = Clock(device, sizes.repeat)
    report["ceilings"] = ceilings(sizes, clock, dtype)
    bench = Bench(clock, dtype, report["ceilings"])
    queue = plan(cases, names)
    with tqdm(total=len(cases) * len(names), unit="case") as bar:
        while queue and report["stopped"] is None:
            entry = queue.popleft()
            spent = (time.perf_counter() - began) / sizes.seconds
            if entry.late and spent > LATE_SHARE and not all(other.late for other in queue):
                queue.append(entry)
                continue
            for name, found in measure_entry(entry, bench, ways, bar):
                results[entry.case][name] = found
                # The bar moves on when this is done.
                if time.perf_counter() - began > sizes.seconds and bar.n + 1 < bar.total:
                    report["stopped"] = f"{sizes.seconds:g} seconds were over"
                    break
    report["seconds"] = time.perf_counter() - began


def measure_entry(
    entry: Entry, bench: Bench, ways: dict[str, dict[str, Backend]], bar: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each backend's name and what was found of it."""
    case, error = entry.case, None
    try:
        bar.set_description(f"{case}: inputs")
        x = bench.inputs(case)
        truth = Truth(x, min(CHECK_ROWS, case.queries))
    except (RuntimeError, MemoryError) as failure:
        error = f"no reference: {reason_of(failure)}"
    if error is not None:
        bench.recover(f"{case}, {error}")
    for name in entry.names:
        bar.set_description(f"{case}: {name}")
        yield name, {"error": error} if error else bench.measure(case, x, truth, ways[name])
        bar.update()


# ------------------------------------------------------------------------------------------------- report


def describe(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> dict[str, Any]:
    report = {**describe_machine(device), "precision": str(dtype), "sizes": asdict(sizes), "kinds": KINDS}
    report["stopped"] = None
    report["versions"] = {name: version_of(name) for name in ("triton", "flash_attn") if find_spec(name)}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        report["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        report["gpu"] = {
            "multiprocessors": gpu.multi_processor_count,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "compute_capability": [gpu.major, gpu.minor],
        }
    return report


def version_of(name: str) -> str:
    try:
        return str(import_module(name).__version__)
    except Exception as error:  # installed, and broken in whatever way
        return f"unknown: {type(error).__name__}"


def rows_of(results: Results, itemsize: int) -> list[dict[str, Any]]:
    """One for each case and pass. ratio: our speed over that of the best other backend."""
    rows = []
    for case, by_backend in results.items():
        for which in case.passes:
            figures = {
                name: found.get(which) or {"error": found.get("error", NOT_REACHED)}
                for name, found in by_backend.items()
            }
            rates = [1 / found["seconds"] if "seconds" in found else 0.0 for found in figures.values()]
            rows.append(
                {
                    "case": str(case),
                    **asdict(case),
                    "queries": case.queries,
                    "pass": which,
                    "flops": case.flops(which),
                    "bytes": case.bytes(itemsize),
                    "ratio": rates[0] / max(rates[1:]) if rates[0] and any(rates[1:]) else None,
                    "results": figures,
                    # Some way to call a backend was wrong, though another was not.
                    "remarks": {n: f["error"] for n, f in by_backend.items() if which in f and "error" in f},
                }
            )
    return rows


def unit_of(row: dict[str, Any], ceilings: dict[str, float]) -> tuple[str, str, float]:
    """A row's rate by its key, its unit in words, and how much that is."""
    if row["kind"] == "decode":
        return "bytes_per_second", "GB/s", 1e9
    small = ceilings["flops_per_second"] < 1e13
    return "flops_per_second", "GFLOP/s" if small else "TFLOP/s", 1e9 if small else 1e12


def print_report(report: dict[str, Any]) -> None:
    ceilings, names = report["ceilings"], report["backends"]
    print(f"\n{report['device']}, {report['precision']}, torch {report['torch']}, {report['date']}")
    print(
        f"ceilings, measured: {ceilings['flops_per_second'] / 1e12:,.3g} TFLOP/s multiplying matrices, "
        f"{ceilings['bytes_per_second'] / 1e9:,.4g} GB/s copying"
    )
    for decode in (False, True):
        rows = [row for row in report["cases"] if (row["kind"] == "decode") == decode]
        if not rows:
            continue
        rate, unit, size = unit_of(rows[0], ceilings)
        print(
            f"\n{f'{unit}, share of the ceiling':50}",
            *(f"{name:>12}" for name in names),
            "  ours / best other",
        )
        for row in rows:
            cells = [cell(row["results"][name], rate, size) for name in names]
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            print(f"{row['case']:32}{row['pass']:18}", *(f"{text:>12}" for text in cells), f"{ratio:>8}")
    notes: dict[tuple[str, str], dict[str, None]] = {}
    for row in report["cases"]:
        errors = {name: found["error"] for name, found in row["results"].items() if "error" in found}
        for note in (*errors.items(), *row["remarks"].items()):
            notes.setdefault(note, {})[f"{row['kind']} d={row['dim_head']}"] = None
    print()
    for (name, error), where in notes.items():
        if error != NOT_REACHED:
            print(f"{name}: {error} ({', '.join(where)})")
    for name, reason in report["left_out"].items():
        print(f"{name}: not measured: {reason}")
    if report["stopped"]:
        print(f"stopped early: {report['stopped']}; what it did not come to is 'not reached'")
    for target in report["targets"]:
        print(
            f"{target['what']}: {target['value']:.3g}, target {target['bound']} {target['target']:g}"
            + ("" if target["met"] else "  MISSED")
        )


def cell(found: dict[str, Any], rate: str, size: float) -> str:
    if rate in found:
        value = found[rate] / size
        return f"{value:,.0f} {found['share']:4.0%}" if value >= 100 else f"{value:.3g} {found['share']:4.0%}"
    word = found["error"].partition(":")[0]
    return "memory" if word == "out of memory" else word


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What our kernels are to reach, as far as it was measured. Rates are for an H100, ratios for any GPU."""
    rows = {
        (row["kind"], row["dim_head"], row["length"], row["pass"]): row["results"] for row in report["cases"]
    }
    found: list[dict[str, Any]] = []

    def get(kind: str, d: int, which: str, *names: str, length: int = 8192) -> float | None:
        """Seconds of the fastest of these backends."""
        results = rows.get((kind, d, length, which), {})
        return min((results[n]["seconds"] for n in names if "seconds" in results.get(n, {})), default=None)

    def add(what: str, value: float | None, bound: str, target: float) -> None:
        if value is not None:
            met = value >= target if bound == ">=" else value <= target
            found.append({"what": what, "value": value, "bound": bound, "target": target, "met": met})

    def over(above: float | None, below: float | None) -> float | None:
        return above / below if above and below else None

    if report["backends"][0] != "triton":
        return []
    for d, rate in {64: 360, 128: 375, 256: 300}.items():
        row = rows.get(("plain", d, 8192, FORWARD), {}).get("triton", {})
        if "H100" in report["device"] and "seconds" in row:
            add(f"forward, d={d}, TFLOP/s", row["flops_per_second"] / 1e12, ">=", rate)
        plain, both = (get("plain", d, which, "triton") for which in (FORWARD, BOTH))
        flash = get("plain", d, BOTH, "flash", "flash_attn")
        add(f"forward + backward, d={d}, speed over FlashAttention-2", over(flash, both), ">=", 1)
        for which, base in ((FORWARD, plain), (BOTH, both)):
            add(
                f"ALiBi {which}, d={d}, time over plain",
                over(get("alibi", d, which, "triton"), base),
                "<=",
                1.05,
            )
        t5, t5_both = (get("t5", d, which, "triton") for which in (FORWARD, BOTH))
        add(f"T5 forward, d={d}, time over plain", over(t5, plain), "<=", 1.1)
        if plain and both and t5 and t5_both:
            add(f"T5 backward, d={d}, time over plain", over(t5_both - t5, both - plain), "<=", 1.2)
        add(f"T5 {BOTH}, d={d}, speed over flex", over(get("t5", d, BOTH, "flex"), t5_both), ">=", 1.5)
        cached = rows.get(("decode", d, 32768, FORWARD), {}).get("triton", {})
        add(f"decoding at 32k, d={d}, share of the copy's GB/s", cached.get("share"), ">=", 0.8)
    return found


# Okabe and Ito's colours, which colour-blind readers tell apart; markers for those who print in grey.
STYLES = {
    "triton": ("#D55E00", "o"),
    "blockwise": ("#D55E00", "o"),
    "sdpa": ("#0072B2", "s"),
    "flash": ("#009E73", "^"),
    "efficient": ("#E69F00", "v"),
    "cudnn": ("#CC79A7", "D"),
    "flex": ("#56B4E9", "P"),
    "flash_attn": ("#000000", "X"),
    "reference": ("#999999", "x"),
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Rates over length: a row of panels for each kind and pass, a column for each head dim.

    Raises ModuleNotFoundError if matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys((row["kind"], row["pass"]) for row in report["cases"]))
    dims = list(dict.fromkeys(row["dim_head"] for row in report["cases"]))
    figure, grid = pyplot.subplots(
        len(groups),
        len(dims),
        figsize=(1.5 + 3.6 * len(dims), 1.2 + 2.3 * len(groups)),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    legend: dict[str, Any] = {}
    for (kind, which), panels in zip(groups, grid, strict=True):
        for d, axes in zip(dims, panels, strict=True):
            rows = [r for r in report["cases"] if (r["kind"], r["pass"], r["dim_head"]) == (kind, which, d)]
            rate, unit, size = unit_of(rows[0], report["ceilings"])
            for name in report["backends"]:
                points = [
                    (r["length"], r["results"][name][rate] / size) for r in rows if rate in r["results"][name]
                ]
                if points:
                    color, marker = STYLES[name]
                    width = 2.2 if name == report["backends"][0] else 1.2
                    [legend[name]] = axes.plot(
                        *zip(*sorted(points), strict=True),
                        color=color,
                        marker=marker,
                        linewidth=width,
                        markersize=5,
                    )
            legend["measured ceiling"] = axes.axhline(
                report["ceilings"][rate] / size, color="black", linestyle=":", linewidth=1
            )
            lengths = sorted({r["length"] for r in rows})
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.set_title(f"{kind}, {which}, d={d}", fontsize=9)
        panels[0].set_ylabel(unit)
    for axes in grid[-1]:
        axes.set_xlabel("keys")
    title = (
        f"Attention with one key/value head: {report['device']}, {report['precision'].removeprefix('torch.')}"
    )
    figure.suptitle(f"{title}, {report['date'][:10]}", fontsize=11)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ------------------------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Attention alone: ours beside torch's and flash-attn's kernels."
    )
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto: the GPU if there is one")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="which to measure"
    )
    parser.add_argument(
        "--dims", nargs="+", type=int, metavar="D", help="head dims (64 128 256; on a CPU 64 128)"
    )
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="lengths, of all kinds")
    parser.add_argument("--seconds", type=float, help="stop measuring after so many (270; on a CPU 55)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for JSON and plot (default: results/ beside this file for a whole run, none otherwise)",
    )
    parser.add_argument("--quick", action="store_true", help="small shapes: whether it runs, no result")
    arguments = parser.parse_args()
    if any(d < 8 or d > 256 or d % 8 for d in arguments.dims or ()):
        parser.error(f"--dims is {arguments.dims}; expected multiples of 8 up to 256")
    if any(n < 64 or n > 1 << 20 or n % 16 for n in arguments.lengths or ()):
        parser.error(f"--lengths is {arguments.lengths}; expected multiples of 16 from 64 to {1 << 20}")
    if arguments.seconds is not None and not 0 < arguments.seconds < math.inf:
        parser.error(f"--seconds is {arguments.seconds}; expected a number above 0")
    try:
        arguments.device = select_device(arguments.device)
        if arguments.device.type not in ("cpu", "cuda"):
            parser.error(f"--device is {arguments.device}; expected a CPU or a CUDA device")
        if arguments.device.type == "cuda" and arguments.device.index is None:
            arguments.device = torch.device("cuda", torch.cuda.current_device())
        whole = not (arguments.quick or arguments.dims or arguments.lengths) and len(arguments.kinds) == len(
            KINDS
        )
        if arguments.out is None and whole:
            arguments.out = RESULTS
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    sizes = CPU if arguments.device.type == "cpu" else GPU
    if arguments.quick:
        sizes = sizes.quick()
    lengths = tuple(dict.fromkeys(arguments.lengths or ()))
    return replace(
        sizes,
        kinds=tuple(dict.fromkeys(arguments.kinds)),
        dims=tuple(dict.fromkeys(arguments.dims or sizes.dims)),
        lengths=lengths or sizes.lengths,
        decode_lengths=lengths or sizes.decode_lengths,
        seconds=arguments.seconds or sizes.seconds,
    )


def write(report: dict[str, Any], folder: Path) -> None:
    slug = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    file = folder / f"attention-{slug}.json"
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {file}")
    try:
        draw(report, file.with_suffix(".png"))
        print(f"and drawn to {file.with_suffix('.png')}")
    except ModuleNotFoundError as error:
        print(f"not drawn: {error}")


def main() -> int:
    arguments = parse_arguments()
    device, sizes = arguments.device, sizes_of(arguments)
    dtype = select_precision("auto", device)
    warn_if_busy()
    if device.type == "cpu":
        keep_freed_memory()  # as train.py does
    if device.type == "cuda":
        torch.cuda.set_device(device)
    report, results = describe(device, dtype, sizes), Results()
    try:
        run(sizes, device, report, results, dtype)
    except KeyboardInterrupt:
        report["stopped"] = "interrupted"
    except DeviceLost as error:
        report["stopped"] = f"the device was lost at {error}"
    if "ceilings" not in report:
        print("stopped before anything was measured")
        return 1
    report["cases"] = rows_of(results, dtype.itemsize)
    report["targets"] = targets(report)
    print_report(report)
    if arguments.quick:
        print("\nThese were small shapes: the numbers mean nothing, and the targets are not theirs.")
    if arguments.out is not None:
        write(report, arguments.out)
    return 1 if report["stopped"] and "seconds" not in report else 0


if __name__ == "__main__":
    raise SystemExit(main())
