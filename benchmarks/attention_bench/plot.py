"""Rates over length, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attention_bench.report import unit_of

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
