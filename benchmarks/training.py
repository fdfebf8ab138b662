"""A training step of each model beside its plain twin in `plain.py`: speed, share of the machine, memory.

    python benchmarks/training.py                                  # everything, on the CPU
    python benchmarks/training.py --models palm lamda --steps 9
    python benchmarks/training.py --device cuda
    python benchmarks/training.py --quick                          # small shapes: whether it runs, no result

What is measured, and how it is counted: README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import plain
import torch
from machine import RESULTS, Machine, describe_machine, warn_if_busy
from torch import Tensor, nn
from tqdm import tqdm

import palm_pytorch
from palm_pytorch.data.batch import Batch
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.training.evaluate import batch_loss
from palm_pytorch.training.flops import training_flops
from palm_pytorch.training.machine import keep_freed_memory, select_device, select_precision
from palm_pytorch.training.meter import peak_memory
from palm_pytorch.training.optim import adamw, set_learning_rate

SIDES = ("plain", "ours")
SPAWN = multiprocessing.get_context("spawn")
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A model at one length, and what it is to reach.

    ratio_target: its speed over the plain twin's.  memory_target: the plain twin's memory over its own.
    share_target: percentage of the machine's rate of matrix products.
    """

    model: str
    batch: int
    seq_len: int
    ratio_target: float
    share_target: float | None = None
    memory_target: float | None = None
    prefix_len: int = 0
    num_tokens: int = 256
    dim: int = 512
    depth: int = 8
    heads: int = 8
    dim_head: int = 64

    def __str__(self) -> str:
        return f"{self.model} {self.batch} x {self.seq_len}"

    def build(self, package: Any) -> nn.Module:
        """Its model from `palm_pytorch` or `plain`."""
        model: nn.Module = plain.build(package, self, self.seq_len)
        return model

    def quick(self) -> Case:
        return replace(self, batch=1, seq_len=self.seq_len // 16, prefix_len=self.prefix_len // 16, depth=2)


CASES = (
    Case("palm", 4, 1024, ratio_target=4.2, share_target=70),
    Case("palm", 1, 4096, ratio_target=8.0, memory_target=5),
    Case("palm-lite", 4, 1024, ratio_target=3.5),
    Case("lamda", 4, 1024, ratio_target=2.0),
    Case("perceiver-ar", 2, 4096, prefix_len=3584, ratio_target=2.5),
)
MODELS = tuple(dict.fromkeys(case.model for case in CASES))


def build(case: Case, side: str) -> nn.Module:
    """The model of that side; both have the same weights."""
    torch.manual_seed(0)
    ours = case.build(palm_pytorch)
    if side == "ours":
        return ours
    twin = case.build(plain)
    twin.load_state_dict(ours.state_dict())
    return twin


def random_windows(case: Case, machine: Machine) -> Tensor:
    """(batch, seq_len + 1), on both sides the same: each token but the first is to be predicted."""
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(case.num_tokens, (case.batch, case.seq_len + 1), generator=generator)
    return windows.to(machine.device)


@torch.no_grad()
def loss_difference(case: Case, machine: Machine) -> float:
    """Between the sides' losses of one window, both in float32."""
    window = Batch.of_windows(random_windows(case, machine)[:1])
    losses = [batch_loss(build(case, side).to(machine.device), window, torch.float32) for side in SIDES]
    return abs(losses[0] - losses[1]).item()


# ----------------------------------------------------------------------------------------- a side at work


def serve(pipe: Connection, case: Case, side: str, machine: Machine) -> None:
    """Trains in this process: answers each message with the seconds of a step that it takes, and None, the
    end, with the bytes that the steps needed, at most, beyond the built model.
    """
    if side == "ours" and machine.device.type == "cpu":
        keep_freed_memory()  # as train.py does
    model = build(case, side).to(machine.device)
    optimizer = adamw(model, weight_decay=0.1)
    set_learning_rate(optimizer, 2e-4)
    precision = machine.precision if side == "ours" else torch.float32
    batch = Batch.of_windows(random_windows(case, machine))

    def step() -> None:
        batch_loss(model, batch, precision).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    built = peak_memory(machine.device)
    while pipe.recv() is not None:
        pipe.send(machine.seconds(step))
    pipe.send(peak_memory(machine.device) - built)


class Side:
    """A process that trains one side, so that neither side meets the memory that the other left behind."""

    def __init__(self, case: Case, side: str, machine: Machine) -> None:
        self.name = f"{case}, {side}"
        self.pipe, theirs = SPAWN.Pipe()
        SPAWN.Process(target=serve, args=(theirs, case, side, machine), daemon=True).start()
        theirs.close()

    def ask(self, message: str | None) -> Any:
        try:
            self.pipe.send(message)
            return self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"{self.name}: its process ended; did it run out of memory?") from error

    def step(self) -> float:
        """Its seconds."""
        return float(self.ask("step"))

    def finish(self) -> int:
        """Ends the process; the bytes that its steps needed."""
        return int(self.ask(None))


def measure(case: Case, machine: Machine, steps: int, bar: Any) -> dict[str, Any]:
    """Steps of both sides in turn, after one of each that does not count."""
    difference = in_new_process(loss_difference, case, machine)
    if not difference <= LOSS_TOLERANCE:
        raise RuntimeError(
            f"{case}: the losses of the same weights differ by {difference:.1e} in float32; expected at most "
            f"{LOSS_TOLERANCE:.0e}"
        )
    sides = {name: Side(case, name, machine) for name in SIDES}
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for step in range(1 + steps):
        for name, side in sides.items():
            bar.set_description(side.name)
            seconds = side.step()
            bar.update()
            if step:
                times[name].append(seconds)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    by_round = [theirs / ours for theirs, ours in zip(times["plain"], times["ours"], strict=True)]
    work = work_per_step(case)
    return {
        "loss_difference": difference,
        "seconds_per_step": times,
        "tokens_per_second": {name: case.batch * case.seq_len / seconds for name, seconds in median.items()},
        "ratio": median["plain"] / median["ours"],
        "ratio_range": [min(by_round), max(by_round)],
        "flops_per_second": {kind: flops / median["ours"] for kind, flops in work.items()},
        "memory_bytes": {name: side.finish() for name, side in sides.items()},
    }


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Its result. This process itself does no work: a new one takes over the peak of its memory."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as process:
        return process.submit(work, *arguments).result()


# ------------------------------------------------------------------------------------ floating-point work


def work_per_step(case: Case) -> dict[str, float]:
    """Floating-point operations of a step.

    full: attention counted as if every query saw every key, as in appendix B of the PaLM paper.
    causal: only the keys that it sees.
    """
    with torch.device("meta"):
        model = case.build(palm_pytorch)
    assert isinstance(model, LanguageModel)
    return {
        kind: case.batch * training_flops(model, case.seq_len, causal=kind == "causal")
        for kind in ("full", "causal")
    }


def matmul_rates(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """Sustained rates, in FLOP/s, of (m, k) @ (k, n): squares, and the two large products of PaLM's blocks.

    transposed: the second operand lies in memory as (n, k), as the weight of a linear layer does.
    """
    sizes = [(n, n, n) for n in ((256,) if quick else (1024, 2048, 4096))]
    sizes += [] if quick else [(4096, 512, 4736), (4096, 2048, 512)]
    rates = []
    for m, k, n in tqdm(sizes, desc="matrix products", unit="shape", leave=False):
        for transposed in (False, True):
            a = torch.randn(m, k, device=machine.device).to(machine.precision)
            b = torch.randn((n, k) if transposed else (k, n), device=machine.device).to(machine.precision)
            seconds = sustained_seconds(machine, a, b.T if transposed else b, at_least=0.1 if quick else 2.0)
            rates.append({"size": [m, k, n], "transposed": transposed, "rate": 2 * m * k * n / seconds})
    return rates


def sustained_seconds(machine: Machine, a: Tensor, b: Tensor, *, at_least: float) -> float:
    """The median time of `a @ b` over that many seconds, after one that does not count."""
    machine.seconds(lambda: a @ b)
    times: list[float] = []
    while sum(times) < at_least:
        times.append(machine.seconds(lambda: a @ b))
    return statistics.median(times)


# ------------------------------------------------------------------------------------------------- report


def print_report(report: dict[str, Any]) -> None:
    best = f"of {report['matmul_rate'] / 1e9:,.0f} GFLOP/s"
    print(f"{'':18} {'tokens/s':>15}   {'ratio':28} {best:25} memory of a step, MiB")
    print(f"{'case':18} {'ours':>7} {'plain':>7}   {'(range)':28} {'(causal)':25} ours, plain, plain / ours")
    for case in report["cases"]:
        speed, (low, high) = case["tokens_per_second"], case["ratio_range"]
        full, causal = (100 * case["share"][kind] for kind in ("full", "causal"))
        ours, peer = (case["memory_bytes"][side] / 2**20 for side in ("ours", "plain"))
        ratio = (
            f"{case['ratio']:.2f} ({low:.2f} to {high:.2f}) {verdict(case['ratio'], case['ratio_target'])}"
        )
        share = f"{full:.0f}% ({causal:.0f}%) {verdict(full, case['share_target'])}"
        memory = f"{ours:,.0f}, {peer:,.0f}, {peer / ours:.2f} {verdict(peer / ours, case['memory_target'])}"
        print(
            f"{case['case']:18} {speed['ours']:7,.0f} {speed['plain']:7,.0f}   {ratio:28} {share:25} {memory}"
        )


def verdict(value: float, target: float | None) -> str:
    if target is None:
        return ""
    return f">= {target:g}" if value >= target else f"MISSED {target:g}"


# ------------------------------------------------------------------------------------------- command line


def run(cases: list[Case], machine: Machine, steps: int, *, quick: bool) -> dict[str, Any]:
    report = describe_machine(machine.device)
    report["precision"] = {"ours": str(machine.precision), "plain": str(torch.float32)}
    report["matmul_rates"] = in_new_process(matmul_rates, machine, quick)
    squares = [product["rate"] for product in report["matmul_rates"] if len(set(product["size"])) == 1]
    report["matmul_rate"] = max(squares)
    report["cases"] = []
    with tqdm(total=2 * (1 + steps) * len(cases), unit="step", leave=False) as bar:
        for case in cases:
            result = {"case": str(case), **asdict(case), **measure(case, machine, steps, bar)}
            result["share"] = {
                kind: rate / report["matmul_rate"] for kind, rate in result["flops_per_second"].items()
            }
            report["cases"].append(result)
    return report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training steps of each model beside its plain twin.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="which to measure")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side (%(default)s)")
    parser.add_argument(
        "--out", type=Path, help="folder for the JSON (results/ beside this file; none for --quick)"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes: whether it runs, no result")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}; expected at least 1")
    try:
        arguments.device = select_device(arguments.device)
        if arguments.out is None and not arguments.quick:
            arguments.out = RESULTS
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments


def main() -> None:
    arguments = parse_arguments()
    machine = Machine(arguments.device, select_precision("auto", arguments.device))
    warn_if_busy()
    cases = [case for case in CASES if case.model in arguments.models]
    if arguments.quick:
        cases = [case.quick() for case in cases]
    report = run(cases, machine, arguments.steps, quick=arguments.quick)
    print_report(report)
    if arguments.quick:
        print("\nThese were small shapes: the numbers mean nothing, and the targets are not theirs.")
    if arguments.out is not None:
        file = arguments.out / f"training-{arguments.device.type}.json"
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten to {file}")


if __name__ == "__main__":
    main()
