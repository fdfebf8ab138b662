"""Backends checked and timed, one case after the other, for as long as there is time."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import torch
from attention_bench.backends import Backend, Refused, backends
from attention_bench.cases import BOTH, FORWARD, Case, Inputs, Sizes
from attention_bench.timing import Clock, ceilings
from attention_bench.truth import Truth, Wrong, outcome
from tqdm import tqdm

# What is checked: everything at this length, and at the length that is timed what its last queries decide.
CHECK_LENGTH, CHECK_BATCH, CHECK_ROWS = 512, 2, 64
NOT_REACHED = "not reached"
SLOWEST = 2.0  # seconds of a forward and backward pass: a backend that takes more is left out
# Of the time; after it, what compiles for long waits for the rest.
LATE_SHARE = 0.6

Results = dict[Case, dict[str, dict[str, Any]]]


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


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


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
            took = seconds(lambda: truth.expect(outcome(work, x)))
            if took > SLOWEST:  # unless it was for compiling
                took = seconds(lambda: truth.expect(outcome(work, x)))
            if took > SLOWEST:
                raise Refused(f"too slow to be measured: {took:.0f} s")
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
