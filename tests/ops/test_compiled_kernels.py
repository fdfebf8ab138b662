"""The kernels as a GPU would run them, compiled ahead of time: Triton's interpreter takes code that its
compiler refuses, and knows nothing of registers and shared memory.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
try:
    VERSION = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
except importlib.metadata.PackageNotFoundError:
    VERSION = (0, 0)


def compiled(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """What the report says of the kernels, compiled by a Python of its own, without the interpreter."""
    out = folder / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, ROOT / "benchmarks/kernels.py", *arguments, "--out", out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["kernels"]


@pytest.mark.skipif(VERSION < (3, 6), reason="needs triton 3.6 or newer")
@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_next_to_nothing_spills_and_all_fits_into_shared_memory(target: str, tmp_path: Path) -> None:
    """The head dims of the presets, 64 and 128, with the bias that takes most; the report covers all. And
    training on packed documents, which takes registers of its own."""
    case = ["--targets", target, "--biases", "t5", "--dtypes", "bfloat16"]
    rows = compiled(tmp_path, *case, "--dims", "64", "128")
    assert {row["kernel"] for row in rows} == {"forward", "combine", "backward_queries", "backward_keys"}
    packed = compiled(tmp_path, *case, "--dims", "128", "--also", "documents")
    rows += [row for row in packed if row["queries"] == "all"]
    for row in rows:
        assert row["fits"] and 0 < row["registers"] <= 255 and row["shared"] > 0, row
        assert not row["serialized"], row
    if target == "90":
        assert side_by_side(rows, "forward", "t5") == 4 and side_by_side(rows, "backward_queries", "t5") == 3


def side_by_side(rows: list[dict[str, Any]], kernel: str, bias: str) -> int:
    """Blocks of a kernel that a Hopper GPU's processor has room for, in training with heads of 64 dims."""
    case = {"target": "sm_90", "dim_head": 64, "queries": "all", "dtype": "bfloat16"}
    case |= {"kernel": kernel, "bias": bias}
    (found,) = (row["resident"] for row in rows if case.items() <= row.items())
    return found


@pytest.mark.skipif(VERSION < (3, 6), reason="needs triton 3.6 or newer")
def test_every_option_compiles(tmp_path: Path) -> None:
    case = ["--targets", "90", "--dims", "16", "--biases", "t5", "--dtypes", "bfloat16"]
    rows = compiled(tmp_path, *case, "--also", "keys", "documents", "dropout")
    assert {row["kernel"] for row in rows} == {"forward", "combine", "backward_queries", "backward_keys"}
    assert all(0 < row["shared"] <= row["shared_limit"] for row in rows)


@pytest.mark.skipif(VERSION < (3, 6), reason="needs triton 3.6 or newer")
def test_the_report_in_the_repository_is_of_the_launch_tables() -> None:
    """Of which the tests above compile a few."""
    from palm_pytorch.ops.attention.triton_kernels.block_sizes import blocks_for

    names = {"forward": ["forward"], "backward_queries": ["queries"], "backward_keys": ["keys", "values"]}
    report = json.loads((ROOT / "benchmarks/results/kernels-triton-3.9.0.json").read_text())["kernels"]
    compared = 0
    for row in report:
        if row["queries"] != "all" or row["kernel"] not in names:
            continue
        plain = dict.fromkeys(("keys", "documents", "dropout"), False)
        size, capability = {"bfloat16": 2, "float32": 4}[row["dtype"]], (int(row["target"][3:-1]), 0)
        blocks = blocks_for(row["dim_head"], size, capability, alibi=row["bias"] == "alibi", **plain)
        launches = (getattr(blocks, name) for name in names[row["kernel"]])
        told = [" x ".join(map(str, launch[:4])) for launch in launches if launch is not None]
        assert row["blocks"] in told, (row, told)
        compared += 1
    assert compared >= 3 * 4 * 2 * 3 * 3


def test_the_report_in_the_repository_covers_every_case() -> None:
    report = json.loads((ROOT / "benchmarks/results/kernels-triton-3.9.0.json").read_text())["kernels"]
    cases = {(r["target"], r["dim_head"], r["dtype"], r["bias"], r["queries"]) for r in report}
    assert len(cases) == 3 * 4 * 2 * 3 * 2
    # What is the fastest on an H200 nonetheless.
    serialized = {(r["dim_head"], r["bias"], r["kernel"]) for r in report if r["serialized"]}
    assert serialized <= {(64, "plain", "backward_keys")}
    # float32 is served, not tuned: the launch tables say what spills.
    assert all(row["fits"] for row in report if row["dtype"] == "bfloat16")
    assert all(row["shared"] <= row["shared_limit"] for row in report)
    for bias, blocks in (("plain", 4), ("alibi", 3), ("t5", 4)):
        assert side_by_side(report, "forward", bias) == blocks
        assert side_by_side(report, "backward_queries", bias) == 3
