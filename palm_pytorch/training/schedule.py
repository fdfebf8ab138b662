"""What changes from step to step by plan: the learning rate, and how many sequences a step reads."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # which checks its batch ramp by what is here
    from palm_pytorch.training.config import TrainConfig

RAMP_PART = re.compile(r"(?P<start>\d+)(?P<percent>%?):(?P<times>\d+)")


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of optimizer step `step`, counted from 0.

    It rises linearly to `config.lr`, which is that of step `warmup_steps`. Then it

    - cosine: follows half a cosine down to `min_lr`, reached at `schedule_steps` and kept;
    - palm: is min(lr, 1 / sqrt(k)) in step number k, from 1 (arXiv 2204.02311, section 5);
    - constant: stays.
    """
    warmth = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.lr_schedule == "palm":
        return min(config.lr * warmth, (step + 1) ** -0.5)
    if config.lr_schedule == "constant" or warmth < 1:
        return config.lr * warmth
    length = config.schedule_steps - config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, length))
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


class RampPart(NamedTuple):
    """From step `start` on, or that percentage of the schedule, batches are so many times as large."""

    start: int
    percent: bool
    times: int

    def first_step(self, schedule_steps: int) -> int:
        return -(-self.start * schedule_steps // 100) if self.percent else self.start


def parse_batch_ramp(text: str) -> list[RampPart]:
    """The parts of a ramp like "2000:2,5000:4" or "20%:2,45%:4".

    Raises:
        ValueError: it is written otherwise, a percentage is above 100, or a batch is no times as large.
    """
    wanted = "expected STEP:TIMES,..., as '2000:2,5000:4', or shares of --schedule-steps, as '20%:2,45%:4'"
    parts = []
    for part in text.split(","):
        match = RAMP_PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"batch_ramp is {text!r}; {wanted}")
        parts.append(RampPart(int(match["start"]), bool(match["percent"]), int(match["times"])))
        if parts[-1].times < 1 or (parts[-1].percent and parts[-1].start > 100):
            raise ValueError(f"batch_ramp is {text!r}, with {part.strip()!r}; {wanted}")
    return parts


def check_batch_ramp(text: str, schedule_steps: int) -> None:
    """Raise a ValueError unless `text` is a ramp whose parts come one after the other; of so few steps that
    several shares begin at the same one, the last of them counts."""
    parts = parse_batch_ramp(text)
    starts = [part.first_step(schedule_steps) for part in parts]
    if sorted(starts) != starts or len({part[:2] for part in parts}) < len(parts):
        raise ValueError(
            f"batch_ramp is {text!r}; expected each part to begin after the one before, but they begin at "
            f"steps {', '.join(map(str, starts))} of {schedule_steps}"
        )


def batches_at(step: int, config: TrainConfig) -> int:
    """How many batches, of `grad_accum` slices each, optimizer step `step`, counted from 0, adds up."""
    times = 1
    for part in parse_batch_ramp(config.batch_ramp) if config.batch_ramp else ():
        if step >= part.first_step(config.schedule_steps):
            times = part.times
    return times


def batch_size_at(step: int, config: TrainConfig) -> int:
    """How many sequences optimizer step `step` reads, over all slices and processes."""
    return batches_at(step, config) * config.grad_accum * config.batch_size
