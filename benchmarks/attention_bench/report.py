"""What was found, as rows, as a table and beside its targets."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from attention_bench.bench import NOT_REACHED, Results
from attention_bench.cases import BOTH, FORWARD, KINDS, Sizes
from machine import describe_machine


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
    """What our kernels are to reach, as far as it was measured. Rates are for an H100 or H200, ratios for any
    GPU."""
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
        if any(name in report["device"] for name in ("H100", "H200")) and "seconds" in row:
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
