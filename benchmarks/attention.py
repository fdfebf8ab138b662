"""Attention alone: our kernels beside torch's and flash-attn's, as shares of what the device can do.

    python benchmarks/attention.py                       # the GPU if there is one, else the CPU
    python benchmarks/attention.py --kinds t5 --dims 64 --lengths 8192 --out /tmp
    python benchmarks/attention.py --quick               # small shapes: whether it runs, no result

What is measured, and how it is counted: README.md beside this file. The parts are in `attention_bench`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from attention_bench.bench import DeviceLost, Results, run
from attention_bench.cases import CPU, GPU, KINDS, Sizes
from attention_bench.plot import draw
from attention_bench.report import describe, print_report, rows_of, targets
from machine import RESULTS, warn_if_busy

from palm_pytorch.training.machine import keep_freed_memory, select_device, select_precision


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
