"""Which options reach the fewest bits per byte in a given time on this kind of machine: a search.

    python benchmarks/recipes.py --data enwik8-head4M.gz                  # what is not in the results yet
    python benchmarks/recipes.py --data enwik8-head4M.gz --minutes 10 --trials 0 5
    python benchmarks/recipes.py --quick                                  # seconds: whether it runs

Every trial costs the same by the clock of a quiet machine: the time of a step is the shortest of several, on
one thread, and a trial takes as many steps as fit. So other work on the machine changes how long the search
takes, not what it finds. How it is scored: README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, describe_machine
from torch import nn
from tqdm import tqdm

from palm_pytorch.data.opening import open_dataset
from palm_pytorch.training.architecture import build_model
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.evaluate import batch_loss, bits_per_byte, evaluate
from palm_pytorch.training.machine import keep_freed_memory, select_precision
from palm_pytorch.training.optim import build_optimizer, set_learning_rate
from palm_pytorch.training.schedule import batches_at, learning_rate

# What differs from the first, which is what the default was before the search.
BEFORE = {"dim": 256, "depth": 4, "heads": 4, "ff_mult": 4, "seq_len": 256, "batch_size": 4, "lr": 1e-3}
TRIALS: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 2e-3},
    {"lr": 4e-3},
    {"batch_size": 2},
    {"batch_size": 2, "lr": 5e-4},
    {"batch_size": 2, "lr": 2e-3},
    {"depth": 2},
    {"depth": 2, "lr": 2e-3},
    {"ff_mult": 2},
    {"ff_mult": 2, "lr": 1.5e-3},
    {"ff_mult": 2, "depth": 3},
    {"ff_mult": 2, "depth": 3, "lr": 1.5e-3},
    {"ff_mult": 2, "depth": 3, "batch_size": 2, "seq_len": 512},
    {"ff_mult": 2, "depth": 3, "batch_size": 8},
    {"ff_mult": 2, "depth": 3, "weight_decay": 0.0},
    {"ff_mult": 2, "depth": 3, "z_loss": 1e-4},
    {"ff_mult": 2, "depth": 3, "warmup_steps": 300},
    {"ff_mult": 1},
    {"ff_mult": 2, "dim": 192, "heads": 3},
    {"ff_mult": 2, "optimizer": "adafactor", "lr": 1e-2, "init_style": "palm", "warmup_steps": 0},
    {"ff_mult": 2, "recipe": "palm", "batch_ramp": None, "lr": 1e-2},
)
STEPS_TO_TIME = 16
# Of the validation text, evenly spread, cut into windows of any `seq_len` that divides the length.
STRETCHES, STRETCH = 64, 1_024


class Trial:
    """A model in training with the options `changes`, which differ from `BEFORE`, on one thread."""

    def __init__(self, changes: dict[str, Any], data: str | None, data_dir: str) -> None:
        self.options = {**BEFORE, **changes, "device": "cpu"}
        self.config = TrainConfig.for_machine(**self.options)
        self.data = open_dataset(data, data_dir=data_dir, seq_len=self.config.seq_len)
        self.precision = select_precision("auto", torch.device("cpu"))

    def start(self, steps: int) -> None:
        """From new weights, with a schedule of so many steps."""
        warmup = min(self.options.get("warmup_steps", 100), steps // 20)
        self.config = TrainConfig.for_machine(**{**self.options, "steps": steps, "warmup_steps": warmup})
        torch.manual_seed(self.config.seed)
        self.model = build_model(self.config, self.data.num_tokens)
        self.optimizer = build_optimizer(self.model, self.config)

    def step(self, number: int) -> None:
        config = self.config
        set_learning_rate(self.optimizer, learning_rate(number, config))
        slices = batches_at(number, config) * config.grad_accum
        for part in range(slices):
            rows = range(part * config.batch_size, (part + 1) * config.batch_size)
            batch = self.data.batch(seed=config.seed, index=number, rows=rows)
            (batch_loss(self.model, batch, self.precision, z_loss=config.z_loss) / slices).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds_per_step(self) -> float:
        """The shortest of several, of processor time."""
        self.start(1_000)
        times = []
        for number in range(STEPS_TO_TIME):
            before = time.process_time()
            self.step(number)
            times.append(time.process_time() - before)
        return min(times[2:])

    def run(self, steps: int) -> float:
        """Bits per byte of validation text after so many steps."""
        self.start(steps)
        for number in tqdm(range(steps), leave=False):
            self.step(number)
        held_out, length = self.data.held_out("valid"), self.config.seq_len
        starts = held_out.positions(STRETCH, STRETCHES)
        scored = (held_out.batch(range(start, start + STRETCH, length), length) for start in starts)
        return bits_per_byte(evaluate(self.model, scored, self.precision))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Search for options at a fixed cost.")
    parser.add_argument("--data", help="as of train.py")
    parser.add_argument("--data-dir", default="data", help="as of train.py")
    parser.add_argument(
        "--minutes", type=float, default=0.93, help="cost of a trial, one thread (%(default)s)"
    )
    parser.add_argument("--trials", type=int, nargs="+", help="their numbers, from 0 (all)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "recipe-search-cpu.json", help="results, added to"
    )
    parser.add_argument("--quick", action="store_true", help="two small trials: whether it runs, no result")
    arguments = parser.parse_args()
    if not all(0 <= number < len(TRIALS) for number in arguments.trials or ()):
        parser.error(f"--trials is {arguments.trials}; expected numbers from 0 to {len(TRIALS) - 1}")
    if not 0 < arguments.minutes < math.inf:
        parser.error(f"--minutes is {arguments.minutes}; expected a number above 0")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    keep_freed_memory()
    wanted = [TRIALS[number] for number in arguments.trials or range(len(TRIALS))]
    if arguments.quick:
        wanted, arguments.minutes = [{"dim": 32, "depth": 1}, {"optimizer": "adafactor", "dim": 32}], 0.01
    machine = describe_machine(torch.device("cpu"))
    report: dict[str, Any] = {"machine": machine, "before": BEFORE, "trials": []}
    if arguments.out.exists() and not arguments.quick:
        report = json.loads(arguments.out.read_text(encoding="utf-8"))
    done = [(row["changes"], row["minutes"]) for row in report["trials"]]
    for changes in wanted:
        if (changes, arguments.minutes) in done:
            continue
        trial = Trial(changes, arguments.data, arguments.data_dir)
        seconds = trial.seconds_per_step()
        steps = max(20, int(60 * arguments.minutes / seconds))
        bits = trial.run(steps)
        row = {"changes": changes, "minutes": arguments.minutes, "steps": steps, "seconds_per_step": seconds}
        report["trials"].append({**row, "valid_bits_per_byte": bits})
        print(f"{bits:.4f} bits per byte, {steps:,} steps of {seconds:.3f} s: {changes}", flush=True)
        if not arguments.quick:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
