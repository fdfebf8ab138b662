"""What ends a run early or sets it back: signals, losses that are no numbers, losses that suddenly rise.

Exit statuses of `palm train`: 0 when it is done, 2 when it refused to start, 3 when training failed, and
128 plus its number after a signal: 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1 (on Linux).
"""

from __future__ import annotations

import os
import signal
import statistics
import threading
from collections.abc import Sequence
from types import FrameType

from palm_pytorch.training.distributed import Parallel

TRAINING_FAILED = 3
MOST_SKIPPED_STEPS = 20  # in a row, after which the model is taken for lost
MOST_ROLLBACKS = 10
SPIKE_WINDOW = 100  # steps that a loss is compared with

# Ctrl-C; what torchrun, Slurm and Kubernetes send before they kill; and what schedulers send ahead of time.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class Stopped(Exception):
    """A signal came while something was done that can be done again later."""


class StopRequest:
    """While entered, a first signal is kept for `agreed` to find, and a second SIGINT stops at once.

    Attributes:
        signal: the first that came to this process.
    """

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel
        self.signal: signal.Signals | None = None

    def __enter__(self) -> StopRequest:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other receive signals
            numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> signal.Signals | None:
        """The signal that has come to any process: all must stop after the same step."""
        number = self.parallel.agree(self.signal or 0)
        return signal.Signals(number) if number else None

    def check(self) -> None:
        """Raise `Stopped` if a signal has come to any process. All of them call this equally often."""
        if self.agreed():
            raise Stopped

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            # Not by print, in the middle of which the signal may have come.
            text = f"\n{self.signal.name}: saving after this step; Ctrl-C stops at once\n"
            os.write(2, text.encode())
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


def is_spike(loss: float, recent: Sequence[float], factor: float) -> bool:
    """Whether a loss is above `factor` times the median of the last `SPIKE_WINDOW`; 0: never.

    A median, because a spike that lasts some steps would drag a mean along with it.
    """
    return factor > 0 and len(recent) >= SPIKE_WINDOW and loss > factor * statistics.median(recent)
