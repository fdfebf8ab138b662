"""Compiles the attention kernels for GPUs that need not be there, and says what the compiled code takes:
registers, spilled bytes and shared memory of each kernel, as launched for a head dim, a dtype and a bias.

    python benchmarks/kernels.py     # every combination, into benchmarks/results/kernels-triton-VERSION.json
    python benchmarks/kernels.py --dims 64 --targets 90 --out /tmp/kernels.json
    python benchmarks/kernels.py --dims 64 --targets 90 --out /tmp/kernels.json --also keys documents dropout
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from palm_pytorch.ops.attention.triton_kernels import launch

KERNELS = ("forward", "combine", "backward_queries", "backward_keys")
# Most shared memory of a block, in bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability".
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# Of a processor, from the same table: shared memory, of which each block takes 1 KB more than it asks for;
# registers, which a warp takes 256 at a time; and warps.
SHARED_BY_ALL = {target: shared + (1 << 10) for target, shared in SHARED.items()}
REGISTERS, WARPS = 1 << 16, 64
# Processors of an A100, an H100 and a B200 (NVIDIA's whitepapers of these), which keys and rows are shared
# out among.
PROCESSORS = {80: 108, 90: 132, 100: 148}
# Spilled bytes of a thread: so few registers cost less than smaller blocks, as an H200 has shown.
FEW = 64
RESULTS = Path(__file__).parent / f"results/kernels-triton-{triton.__version__}.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BIASES = ("plain", "alibi", "t5")
OPTIONS = ("keys", "documents", "dropout")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target. spilled and shared are in bytes, registers a thread.  serialized: ptxas has
    it wait for each product of a Hopper GPU's tensor cores, since it could not follow the sums.
    resident: how many blocks a processor has room for.
    """

    kernel: str
    target: str
    dim_head: int
    dtype: str
    bias: str
    queries: str
    blocks: str
    registers: int
    spilled: int
    serialized: bool
    shared: int
    shared_limit: int
    resident: int

    @property
    def fits(self) -> bool:
        return self.spilled <= FEW and self.shared <= self.shared_limit


class _NoDevice:
    """Stands in for the driver of a GPU of the given compute capability."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[tuple[str, str, Any]]]:
    """Launches inside only compile; gives the list that (kernel, blocks, compiled) are added to."""
    found: list[tuple[str, str, Any]] = []
    before = {name: getattr(launch, name) for name in KERNELS}

    class Launcher:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def compile_only(*arguments: Any, **constants: Any) -> None:
                compiled = before[self.name].warmup(*arguments, grid=grid, **constants)
                words = ("ROWS", "KEYS", "num_warps", "num_stages")
                blocks = " x ".join(str(constants[w]) for w in words if w in constants)
                found.append((self.name, blocks, compiled))

            return compile_only

    driver.set_active(_NoDevice(capability))
    known = launch.capability_of, launch.processors_of
    launch.capability_of = lambda device: divmod(capability, 10)
    launch.processors_of = lambda device: PROCESSORS[capability]
    for name in KERNELS:
        setattr(launch, name, Launcher(name))
    try:
        yield found
    finally:
        for name, kernel in before.items():
            setattr(launch, name, kernel)
        launch.capability_of, launch.processors_of = known


def compiled(
    capability: int, dim_head: int, dtype: str, bias: str, queries: str, also: list[str]
) -> Iterator[Compiled]:
    """The kernels of a training step on 32 x 2048 positions, or of a query against 32768 ("one"), with a key
    mask, documents or dropout if these are among `also`."""
    heads = 2048 // dim_head
    b, n, i_len = (32, 2048, 2048) if queries == "all" else (1, 32768, 1)
    fused = torch.empty(b, n, heads * dim_head + 2 * dim_head, dtype=DTYPES[dtype], device="meta")
    q, k, v = (
        t.unflatten(-1, (-1, dim_head)).transpose(1, 2)
        for t in fused.split([heads * dim_head, dim_head, dim_head], dim=-1)
    )
    q = q[:, :, :i_len]
    slopes = torch.empty(heads, device="meta") if bias == "alibi" else None
    offsets = torch.empty(heads, 113, device="meta") if bias == "t5" else None
    key_mask = torch.empty(b, n, dtype=torch.bool, device="meta") if "keys" in also else None
    documents = torch.empty(3, b, n, dtype=torch.int32, device="meta") if "documents" in also else None
    seed = torch.empty(1, dtype=torch.int64, device="meta") if "dropout" in also else None
    dropout_p = 0.0 if seed is None else 0.1
    options = (slopes, offsets, key_mask, documents, seed, None, True, dim_head**-0.5, dropout_p)
    with compiling(capability) as found:
        results = launch.run_forward(q, k, v, *options)
        if queries == "all":
            launch.run_backward(results[0], q, k, v, *results, bias == "t5", *options)
    for name, blocks, kernel in found:
        registers, spilled = resources(kernel.asm["cubin"])
        shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
        by_registers = REGISTERS // (-(-registers // 8) * 256) // warps
        resident = min(by_registers, WARPS // warps, SHARED_BY_ALL[capability] // (shared + (1 << 10)))
        yield Compiled(
            *(name, f"sm_{capability}", dim_head, dtype, bias, queries, blocks, registers, spilled),
            *(serialized(kernel.asm["cubin"]), shared, SHARED[capability], resident),
        )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes spilled to its stack."""
    said = dumped(cubin, "--dump-resource-usage")
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def serialized(cubin: bytes) -> bool:
    """Whether there is a wait for each of the products that could go on side by side."""
    code = dumped(cubin, "--dump-sass")
    products, waits = (len(re.findall(name, code)) for name in ("HGMMA", r"WARPGROUP\.DEPBAR"))
    return 0 < products <= waits


def dumped(cubin: bytes, what: str) -> str:
    """What CUDA's tool says of machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", type=int, nargs="+", default=list(SHARED), choices=list(SHARED))
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 80, 128, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(DTYPES))
    parser.add_argument("--biases", nargs="+", default=list(BIASES), choices=BIASES)
    parser.add_argument("--also", nargs="+", default=[], choices=OPTIONS, help="all of these in every case")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name}, without --also")
    arguments = parser.parse_args()
    if arguments.out is None:
        if arguments.also:
            parser.error("--also needs --out: the report in the repository is without")
        arguments.out = RESULTS
    rows: list[Compiled] = []
    cases = list(
        product(arguments.dims, arguments.dtypes, arguments.biases, ("all", "one"), arguments.targets)
    )
    for dim_head, dtype, bias, queries, target in tqdm(cases, desc="compile"):
        rows += compiled(target, dim_head, dtype, bias, queries, arguments.also)
    header = "target  d  dtype  bias  queries  kernel  blocks  registers  spilled  shared  resident"
    print(header)
    for row in rows:
        case = f"{row.target:7}{row.dim_head:4} {row.dtype:9}{row.bias:6}{row.queries:4}{row.kernel:17}"
        verdict = ("  serialized" if row.serialized else "") + ("" if row.fits else "  DOES NOT FIT")
        print(f"{case}{row.blocks:20}{row.registers:4}{row.spilled:6}{row.shared:8}{row.resident:4}{verdict}")
    result = {"triton": triton.__version__, "kernels": [asdict(row) | {"fits": row.fits} for row in rows]}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
