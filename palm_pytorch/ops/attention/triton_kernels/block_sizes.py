"""The blocks that the kernels are launched with, by head dim, dtype and GPU."""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    """Rows and keys of a block, warps and pipeline stages.

    registers: of a thread, at most, where more blocks fit onto a processor so.
    tilted: ALiBi comes of a product of its own (see `scores.tilt_of`), which saves registers and instructions
    for 32 bytes of shared memory a key.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    tilted: bool = False


class Blocks(NamedTuple):
    """How the kernels are launched. `decode` is `forward` for a few rows, in blocks of as many; `keys` gives
    the gradients of values too, unless `values` does that by itself.
    """

    forward: Launch
    decode: Launch
    queries: Launch
    keys: Launch
    values: Launch | None = None


# For heads of up to so many dims. `HOPPER` has what was fastest on an H200, where a few spilled registers
# cost less than smaller blocks; the others the largest blocks, then the most warps, that compile without more
# than a few, as benchmarks/kernels.py shows. `AMPERE` also fits the 99 KB of shared memory of compute
# capability 8.6, 8.9 and 12.x.
AMPERE = {
    64: Blocks(Launch(128, 64, 8, 3), Launch(16, 128, 4, 3), Launch(128, 64, 8, 3), Launch(32, 128, 8, 2)),
    128: Blocks(Launch(128, 32, 8, 3), Launch(16, 64, 4, 3), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2)),
    256: Blocks(Launch(64, 32, 8, 2), Launch(16, 64, 4, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 2)),
}
HOPPER = {
    64: Blocks(Launch(64, 64, 4, 3), Launch(16, 128, 4, 3), Launch(64, 64, 4, 3), Launch(64, 128, 8, 3)),
    # Padded, with masks that take registers.
    127: Blocks(Launch(128, 64, 8, 3), Launch(16, 64, 4, 3), Launch(128, 64, 8, 3), Launch(32, 128, 8, 3)),
    128: Blocks(Launch(64, 64, 4, 3), Launch(16, 64, 4, 3), Launch(128, 64, 8, 3), Launch(64, 128, 8, 2)),
    256: Blocks(
        Launch(128, 32, 8, 3),
        Launch(16, 64, 4, 2),
        Launch(128, 32, 8, 3),
        Launch(32, 128, 8, 3),
        Launch(32, 128, 8, 3),
    ),
}
BLACKWELL = {
    64: Blocks(Launch(128, 64, 8, 2), Launch(16, 128, 4, 3), Launch(128, 64, 8, 3), Launch(64, 128, 8, 3)),
    127: Blocks(Launch(128, 64, 8, 3), Launch(16, 128, 4, 3), Launch(128, 64, 8, 2), Launch(32, 64, 8, 2)),
    128: Blocks(Launch(128, 64, 8, 3), Launch(16, 128, 4, 3), Launch(128, 64, 8, 2), Launch(64, 64, 8, 2)),
    256: Blocks(Launch(128, 32, 8, 2), Launch(16, 64, 4, 2), Launch(64, 32, 8, 2), Launch(64, 64, 8, 1)),
}
# On any of them, and not tuned. 256 dims spill 40 to 500 bytes a thread, in larger blocks or with fewer warps
# no less: the high and the low tf32 part of 16 rows are 256 registers of each thread.
FLOAT32 = {
    64: Blocks(Launch(32, 32, 4, 2), Launch(16, 64, 4, 2), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1)),
    127: Blocks(Launch(32, 16, 8, 1), Launch(16, 32, 4, 2), Launch(16, 32, 4, 1), Launch(16, 16, 4, 1)),
    128: Blocks(Launch(32, 32, 8, 1), Launch(16, 32, 4, 2), Launch(16, 32, 4, 1), Launch(16, 16, 4, 1)),
    256: Blocks(Launch(16, 16, 8, 1), Launch(16, 16, 8, 1), Launch(16, 16, 8, 1), Launch(16, 16, 8, 1)),
}


def blocks_for(
    dim_head: int,
    element_size: int,
    capability: tuple[int, int],
    *,
    alibi: bool,
    keys: bool,
    documents: bool,
    dropout: bool,
) -> Blocks:
    """The blocks for a head dim, the bytes of a number, a GPU's compute capability, and what of bias, masks
    (of keys, by documents) and dropout a call has."""
    if element_size == 4:
        table = FLOAT32
    elif capability[0] in (9, 10):
        table = HOPPER if capability[0] == 9 else BLACKWELL
    else:
        table = AMPERE
    width = next(width for width in table if dim_head <= width)
    blocks = table[width]
    if documents and width == 128 and element_size == 2 and table is not HOPPER:  # which take registers
        blocks = blocks._replace(keys=Launch(32, 64, 8, 2))
    if table is HOPPER and width == 64:
        # Room for four blocks on a processor, or three; dropout takes all registers there are. Told from the
        # machine code, as benchmarks/kernels.py shows it.
        limits = (None, None) if dropout else (168 if alibi or keys or documents else 128, 168)
        forward, queries = (
            launch._replace(registers=limit, tilted=alibi)
            for launch, limit in zip((blocks.forward, blocks.queries), limits, strict=True)
        )
        blocks = blocks._replace(forward=forward, queries=queries)
    return blocks
