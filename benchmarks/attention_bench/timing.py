"""Seconds of work on a device, and what the device can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from attention_bench.cases import Sizes

FLUSH_BYTES = 256 << 20  # more than any GPU's cache holds


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
            self.cold.sum()  # read, for what is written would be written back during the work
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
