"""Generation from a cache beside a loop that runs the plain twin of `plain.py` anew for every token.

    python benchmarks/generation.py                      # everything, on the CPU
    python benchmarks/generation.py --models palm
    python benchmarks/generation.py --device cuda
    python benchmarks/generation.py --quick              # few tokens: whether it runs, no result

What is measured, and how it is counted: README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import plain
import torch
from machine import RESULTS, Machine, describe_machine, warn_if_busy
from torch import Tensor, nn
from tqdm import tqdm

import palm_pytorch
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.training.machine import select_device, select_precision

# Lengths at which the plain twin is timed, evenly over those that it would be run at.
PLAIN_LENGTHS = 9
# Tokens that both sides must agree on, in float32, before anything is timed.
AGREEING = 16
EDGE = 100


@dataclass(frozen=True)
class Case:
    """A model, a prompt and how many tokens come after it; ratio_target: its speed over the plain loop's."""

    model: str
    prompt: int
    new: int
    ratio_target: float | None = None
    prefix_len: int = 0
    max_seq_len: int = 0
    num_tokens: int = 256
    dim: int = 512
    depth: int = 8
    heads: int = 8
    dim_head: int = 64

    def __str__(self) -> str:
        return f"{self.model} {self.prompt} + {self.new}"

    def build(self, package: Any) -> Any:
        """Its model from `palm_pytorch` or `plain`."""
        return plain.build(package, self, self.max_seq_len)

    def quick(self) -> Case:
        return replace(self, prompt=self.prompt // 8, new=2 * EDGE, prefix_len=self.prefix_len // 8, depth=2)


CASES = (
    Case("palm", 64, 1024, ratio_target=40),
    Case("palm-lite", 64, 1024),
    Case("lamda", 64, 1024),
    Case("perceiver-ar", 3584 + 64, 400, ratio_target=20, prefix_len=3584, max_seq_len=4096),
)
FLAT = Case("palm", 64, 4032)
# The shape of the preset "palm-1b", for GPUs.
LARGE = Case("palm", 64, 4032, num_tokens=50_304, dim=2048, depth=16, dim_head=128)
BATCH = 16
FLAT_TARGET, BATCH_TARGET, FLOOR_TARGET, LARGE_FLOOR_TARGET = 1.3, 6.0, 0.6, 0.65


def build(case: Case, machine: Machine) -> tuple[LanguageModel, nn.Module]:
    """Ours and the plain twin, with the same weights, in float32."""
    torch.manual_seed(0)
    ours, twin = case.build(palm_pytorch), case.build(plain)
    twin.load_state_dict(ours.state_dict())
    return ours.to(machine.device).eval(), twin.to(machine.device).eval()


def prompt_of(case: Case, machine: Machine, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(case.num_tokens, (batch, case.prompt), generator=generator).to(machine.device)


@torch.no_grad()
def plain_step(twin: Any, tokens: Tensor) -> Tensor:
    """The next token, from logits of everything."""
    return (twin.hidden(tokens) @ twin.token_emb.weight.T)[:, -1].argmax(dim=-1)


def check_agreement(case: Case, machine: Machine) -> None:
    """Raises RuntimeError unless both sides write the same in float32."""
    ours, twin = build(case, machine)
    tokens = prompt = prompt_of(case, machine)
    for _ in range(AGREEING):
        tokens = torch.cat([tokens, plain_step(twin, tokens)[:, None]], dim=1)
    found = ours.generate(prompt, AGREEING, temperature=0)
    if not torch.equal(found, tokens[:, case.prompt :]):
        raise RuntimeError(f"{case}: the same weights write {found[0].tolist()}, plainly something else")


def token_seconds(
    ours: LanguageModel, prompt: Tensor, new: int, machine: Machine, **options: Any
) -> list[float]:
    """The time of each new token; the first one's includes reading the prompt."""
    machine.now()
    marks = [mark(machine)]
    for _ in ours.stream(prompt, new, temperature=0, **options):
        marks.append(mark(machine))
    machine.now()
    if machine.device.type != "cuda":
        return [stop - start for start, stop in pairwise(marks)]
    return [start.elapsed_time(stop) / 1000 for start, stop in pairwise(marks)]


def mark(machine: Machine) -> Any:
    """A moment, which a GPU is not waited for at, so that the next token may be on its way."""
    if machine.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def plain_seconds(case: Case, machine: Machine, rounds: int) -> float:
    """What the plain loop takes for all new tokens: its time at a few lengths, the best of `rounds`, summed
    up along the straight lines between them.
    """
    _, twin = build(case, machine)
    longest = case.prompt + case.new - 1
    lengths = torch.linspace(case.prompt, longest, PLAIN_LENGTHS).round().int().tolist()
    seconds = []
    for length in lengths:
        # Perceiver AR's window never holds more than its longest sequence.
        shown = min(length, case.max_seq_len or length)
        tokens = torch.randint(case.num_tokens, (1, shown), device=machine.device)
        seconds.append(min(machine.seconds(lambda t=tokens: plain_step(twin, t)) for _ in range(rounds)))
    pairs = zip(lengths, lengths[1:], seconds, seconds[1:], strict=False)
    # Each token from `start` up to `stop` once, and the last by itself.
    whole = sum((b - a) * (x + y) / 2 + (x - y) / 2 for a, b, x, y in pairs)
    return whole + seconds[-1]


def measure(case: Case, machine: Machine, rounds: int) -> dict[str, Any]:
    """Our time for all new tokens, the prompt included, and that of the plain loop."""
    check_agreement(case, machine)
    ours = build(case, machine)[0].to(machine.precision)
    prompt = prompt_of(case, machine)
    token_seconds(ours, prompt, min(case.new, EDGE), machine)
    totals = [sum(token_seconds(ours, prompt, case.new, machine)) for _ in range(rounds)]
    slow = plain_seconds(case, machine, rounds)
    return {"seconds": totals, "plain_seconds": slow, "ratio": slow / median(totals)}


def measure_flat(case: Case, machine: Machine, rounds: int) -> dict[str, Any]:
    """The median time of a token among the first and among the last of a long text."""
    ours = build(case, machine)[0].to(machine.precision)
    prompt = prompt_of(case, machine)
    token_seconds(ours, prompt, EDGE, machine)
    runs = []
    for _ in range(rounds):
        seconds = token_seconds(ours, prompt, case.new, machine)[1:]
        runs.append((median(seconds[:EDGE]), median(seconds[-EDGE:])))
    first, last = min(runs, key=sum)
    return {"first": first, "last": last, "ratio": last / first, "runs": runs}


def measure_floor(case: Case, machine: Machine, rounds: int, **options: Any) -> dict[str, Any]:
    """The share of a token's time, among the first of a text, that it takes to read the weights once, at the
    rate of a large copy, and at that of a large sum, which only reads.
    """
    ours = build(case, machine)[0].to(machine.precision)
    weights = sum(p.numel() * p.element_size() for p in ours.parameters())
    # On a GPU so large that launching it and waiting for it does not count.
    source = torch.ones(1 << (26 if machine.device.type == "cpu" else 29), device=machine.device)
    target = torch.empty_like(source)
    token, copy, read = [], [], []
    for _ in range(3 * rounds):
        seconds = token_seconds(ours, prompt_of(case, machine), 2 * EDGE, machine, **options)[1:]
        token.append(median(seconds))
        copy.append(2 * source.nbytes / machine.seconds(lambda: target.copy_(source)))
        read.append(source.nbytes / machine.seconds(source.sum))
    shares = {name: weights / max(rate) / min(token) for name, rate in (("copy", copy), ("read", read))}
    return {"weight_bytes": weights, "token": token, "copy_rate": copy, "read_rate": read, "share": shares}


def measure_batch(case: Case, machine: Machine, rounds: int) -> dict[str, Any]:
    """Tokens per second of many rows at once over those of one, in turn."""
    ours = build(case, machine)[0].to(machine.precision)
    rates: dict[int, list[float]] = {1: [], BATCH: []}
    for _ in range(rounds):
        for batch, found in rates.items():
            seconds = token_seconds(ours, prompt_of(case, machine, batch), 2 * EDGE, machine)[1:]
            found.append(batch / median(seconds))
    return {"tokens_per_second": rates, "ratio": max(rates[BATCH]) / max(rates[1])}


def measure_memory(case: Case, machine: Machine) -> dict[str, Any]:
    """The cache's bytes against 2 * depth * b * n * g * d * (bytes of the dtype), and half of that for
    PaLM-lite.
    """
    ours = build(case, machine)[0].to(machine.precision)
    n = 1000
    with torch.inference_mode():
        cache = ours.new_cache(n)
        ours(torch.zeros(2, n, dtype=torch.long, device=machine.device), cache=cache, last_only=True)
    expected = 2 * case.depth * 2 * n * case.dim_head * machine.precision.itemsize
    return {"bytes": cache.nbytes, "expected": expected // (2 if case.model == "palm-lite" else 1)}


def run(cases: list[Case], machine: Machine, rounds: int, *, quick: bool) -> dict[str, Any]:
    precision = str(machine.precision).removeprefix("torch.")
    print(f"our weights in {precision}")
    report: dict[str, Any] = {"precision": precision, "cases": []}
    for case in tqdm(cases, desc="models", leave=False):
        result = {"case": str(case), **asdict(case), **measure(case, machine, rounds)}
        if case.model in ("palm", "palm-lite"):
            result["cache"] = measure_memory(case, machine)
        report["cases"].append(result)
        verdict = "" if case.ratio_target is None else f" (target {case.ratio_target:g})"
        tqdm.write(
            f"{case!s:24} {case.new / median(result['seconds']):7,.0f} tokens/s, plain "
            f"{case.new / result['plain_seconds']:6,.1f}: {result['ratio']:6.1f}x{verdict}"
        )
    if any(case.model == "palm" for case in cases):
        flat = FLAT.quick() if quick else FLAT
        report["flat"] = measure_flat(flat, machine, rounds)
        report["floor"] = measure_floor(flat, machine, rounds)
        report["batch"] = measure_batch(flat, machine, rounds)
        share = report["floor"]["share"]
        print(
            f"a token after {flat.prompt + flat.new} over one after {flat.prompt}: "
            f"{report['flat']['ratio']:.2f} (target {FLAT_TARGET})\n"
            f"share of the time to read the weights: {share['copy']:.0%} at the rate of a copy, "
            f"{share['read']:.0%} at that of a sum (target {FLOOR_TARGET:.0%})\n"
            f"batch {BATCH} over batch 1: {report['batch']['ratio']:.1f}x (target {BATCH_TARGET:g})"
        )
        if machine.device.type == "cuda":
            large = LARGE.quick() if quick else LARGE
            for name, compile in (("large_floor", False), ("large_floor_compiled", True)):
                report[name] = measure_floor(large, machine, rounds, compile=compile)
                share = report[name]["share"]["copy"]
                print(
                    f"the same with a billion weights{', compiled' * compile}: {share:.0%} "
                    f"(target {LARGE_FLOOR_TARGET:.0%})"
                )
    return report


def parse_arguments() -> argparse.Namespace:
    models = tuple(case.model for case in CASES)
    parser = argparse.ArgumentParser(description="Generation beside a loop over the plain twin.")
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="which to measure")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is timed (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the JSON (results/ beside this file)")
    parser.add_argument("--quick", action="store_true", help="few tokens: whether it runs, no result")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = select_device(arguments.device)
    # On a GPU nobody would generate in float32.
    slow = [torch.float32] if device.type == "cpu" else []
    precisions = dict.fromkeys([*slow, select_precision("auto", device, reading=True)])
    report = describe_machine(device)
    warn_if_busy()
    cases = [case for case in CASES if case.model in arguments.models]
    if arguments.quick:
        cases = [case.quick() for case in cases]
    report["runs"] = [
        run(cases, Machine(device, precision), arguments.rounds, quick=arguments.quick)
        for precision in precisions
    ]
    if arguments.quick:
        print("\nThese were few tokens of small models: the numbers mean nothing.")
        return
    folder = arguments.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"generation-{device.type}.json"
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {file}")


if __name__ == "__main__":
    main()
