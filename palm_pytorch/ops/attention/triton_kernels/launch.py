"""The kernels called on tensors: what each is told, how many programs it takes, and where its results go.

Shapes: q (b, h, i, d); k, v (b, g, j, d) with g dividing h; out (b, h, i, d);
lse (b * g, i * r), a number a row, the r = h / g query heads of a key/value head side by side.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from einops import reduce
from torch import Tensor

from palm_pytorch.ops.attention.triton_kernels.block_sizes import Blocks, Launch, blocks_for
from palm_pytorch.ops.attention.triton_kernels.call import Bias, Call, Mask, View
from palm_pytorch.ops.attention.triton_kernels.forward_pass import combine, forward
from palm_pytorch.ops.attention.triton_kernels.key_gradients import backward_keys
from palm_pytorch.ops.attention.triton_kernels.query_gradients import backward_queries

# Shares of the rows that gradients of keys and values are summed in, at most, and half as many as there are
# heads to a key/value head: each takes memory as these gradients do in float32.
MAX_SLICES = 4
# Shares of the keys that a few queries meet, at most: two to a processor of the largest GPUs.
MAX_SPLITS = 512
# Of so few shares, those of many rows, a row is put together by 64 threads instead of 256.
FEW_SPLITS = 8


class _Problem(NamedTuple):
    """What every kernel is told, how it is launched, and how many rows and groups there are."""

    call: Call
    blocks: Blocks
    constants: dict[str, Any]
    groups: int
    rows: int

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        slopes: Tensor | None,
        offsets: Tensor | None,
        key_mask: Tensor | None,
        documents: Tensor | None,
        seed: Tensor | None,
        at: Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
    ) -> _Problem:
        (b, h, i_len, d), (g, j_len) = q.shape, k.shape[1:3]
        slopes = None if slopes is None else slopes / scale
        reach = 0 if offsets is None else offsets.shape[1]
        offsets = None if offsets is None else F.pad(offsets / scale, (0, 1)).T.contiguous()
        mask_keys = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        mask = Mask(mask_keys, *((None, None, None) if documents is None else documents))
        bias = Bias(slopes, offsets, reach)
        call = Call(bias, mask, seed, at, dropout_p, scale, i_len, j_len, b * g)
        constants = {"G": g, "R": h // g, "D": d, "CAUSAL": causal}
        blocks = blocks_for(
            *(d, q.element_size(), capability_of(q.device)),
            alibi=slopes is not None,
            keys=key_mask is not None,
            documents=documents is not None,
            dropout=seed is not None,
        )
        return _Problem(call, blocks, constants, groups=b * g, rows=i_len * (h // g))


def document_spans(ids: Tensor) -> Tensor:
    """ids (b, j), and the first and the last position that has the same id as each, (3, b, j) int32: where
    documents lie one after the other, just the keys that a query may see."""
    ordered, position = ids.sort(dim=-1, stable=True)
    place = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    changes = ordered[:, 1:] != ordered[:, :-1]
    begins, ends = (F.pad(changes, side, value=True) for side in ((1, 0), (0, 1)))
    first = torch.where(begins, place, 0).cummax(dim=-1).values
    last = torch.where(ends, place, ids.shape[-1]).flip(-1).cummin(dim=-1).values.flip(-1)
    # Each document goes by the place where it begins in that order, since ids may not fit into 32 bits.
    spans = (first, position.gather(1, first), position.gather(1, last))
    return torch.stack([torch.empty_like(t).scatter_(1, position, t) for t in spans]).int()


def view_of(x: Tensor) -> View:
    return View(x, x.stride(0), x.stride(1), x.stride(2))


def packed(x: Tensor, heads: int = 1) -> Tensor:
    """x with its last dimension packed; a slice of a projection is, and is taken as it lies. Within a block,
    which has so many heads, 32 bits must do, so what lies further apart than that is not."""
    near = heads * x.stride(1) < 1 << 30 and x.stride(2) < 1 << 22
    return x if x.stride(-1) == 1 and near else empty_like(x).copy_(x)


def empty_like(x: Tensor, batch: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """As x (b, heads, n, d), in memory (b, n, heads, d): what merges heads for free."""
    b, heads, n, d = x.shape
    return x.new_empty(batch or b, n, heads, d, dtype=dtype).transpose(1, 2)


def capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def processors_of(device: torch.device) -> int:
    """How many blocks the device works on side by side."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _run(kernel: Any, programs: int, *arguments: Any, launch: Launch, **constants: Any) -> None:
    kernel[(programs,)](
        *arguments,
        **constants,
        ROWS=launch.rows,
        KEYS=launch.keys,
        STAGES=launch.stages,
        num_warps=launch.warps,
        num_stages=launch.stages,
        maxnreg=launch.registers,
        enable_fp_fusion=True,
    )


def run_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    q, k, v = packed(q, q.shape[1] // k.shape[1]), packed(k), packed(v)
    problem = _Problem.of(q, k, *options)
    launch = problem.blocks.forward
    if problem.rows <= launch.rows // 2:
        launch = problem.blocks.decode._replace(rows=max(16, triton.next_power_of_2(problem.rows)))
    programs = triton.cdiv(problem.rows, launch.rows) * problem.groups
    # A few queries and many keys: the keys are shared out, or most of the device would look on.
    wanted = max(1, 2 * processors_of(q.device) // programs)
    blocks = triton.cdiv(k.shape[2], launch.keys)
    splits = min(wanted, blocks, MAX_SPLITS)
    single = splits == blocks
    if single:  # nothing comes after that could be fetched meanwhile
        launch = launch._replace(stages=1)
    out, lse = empty_like(q), q.new_empty(problem.groups, problem.rows, dtype=torch.float32)
    parts, part_lse = out, lse
    if splits > 1:
        parts = empty_like(q, splits * q.shape[0], torch.float32)
        part_lse = lse.new_empty(splits * problem.groups, problem.rows)
    with torch.cuda.device_of(q):
        _run(
            forward,
            programs * splits,
            *(view_of(q), view_of(k), view_of(v), view_of(parts), part_lse, problem.call, splits),
            launch=launch,
            TILTED=launch.tilted,
            SINGLE=single,
            **problem.constants,
        )
        if splits > 1:
            most, warps = (FEW_SPLITS, 2) if splits <= FEW_SPLITS else (MAX_SPLITS, 8)
            g, r, d = (problem.constants[name] for name in "GRD")
            combine[(lse.numel(),)](
                *(view_of(parts), part_lse, view_of(out), lse, q.shape[2], splits, q.shape[0], g, r, d),
                SPLITS=most,
                num_warps=warps,
                enable_fp_fusion=True,
            )
    return out, lse


def run_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets_grad: bool, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, q, out = (packed(t, q.shape[1] // k.shape[1]) for t in (grad, q, out))
    k, v = packed(k), packed(v)
    problem = _Problem.of(q, k, *options)
    views = (view_of(q), view_of(k), view_of(v))
    dq, delta = empty_like(q), torch.empty_like(lse)
    # Zeros where there is no key at that distance.
    band = lse.new_zeros(problem.groups, problem.call.bias.reach + 1, problem.rows) if offsets_grad else None
    launch = problem.blocks.queries
    with torch.cuda.device_of(q):
        _run(
            backward_queries,
            triton.cdiv(problem.rows, launch.rows) * problem.groups,
            *(*views, view_of(out), lse, view_of(grad), view_of(dq), delta, band, problem.call),
            launch=launch,
            TILTED=launch.tilted,
            **problem.constants,
        )
        by_keys = partial(_by_keys, problem, (*views, lse, view_of(grad), delta))
        if problem.blocks.values is None:
            dk, dv = by_keys(problem.blocks.keys, k, v)
        else:
            dk, dv = by_keys(problem.blocks.keys, k, None)[0], by_keys(problem.blocks.values, None, v)[1]
    assert dk is not None and dv is not None
    return dq, dk, dv, q.new_empty(0) if band is None else _by_distance(band, k.shape[1], q.shape[2])


def _by_keys(
    problem: _Problem, arguments: tuple[Any, ...], launch: Launch, *like: Tensor | None
) -> list[Tensor | None]:
    """The gradients of keys and of values, like them, or None for None."""
    any_of = next(t for t in like if t is not None)
    programs = triton.cdiv(problem.call.j_len, launch.keys) * problem.groups
    # Few keys, or one key/value head and a small batch: the rows are shared out, each share summed apart.
    wanted = max(1, 2 * processors_of(any_of.device) // programs)
    most = min(MAX_SLICES, max(1, problem.constants["R"] // 2))
    slices = min(wanted, triton.cdiv(problem.rows, launch.rows), most)
    dtype = torch.float32 if slices > 1 else None
    found = [None if t is None else empty_like(t, slices * t.shape[0], dtype) for t in like]
    _run(
        backward_keys,
        programs * slices,
        *(*arguments, *(None if t is None else view_of(t) for t in found), problem.call, slices),
        launch=launch,
        **problem.constants,
    )
    if slices > 1:
        found = [None if t is None else _whole(t, slices, any_of.dtype) for t in found]
    return found


def _whole(parts: Tensor, slices: int, dtype: torch.dtype) -> Tensor:
    """What parts (slices * b, g, j, d) add up to, in memory (b, j, g, d) as they are."""
    return parts.transpose(1, 2).unflatten(0, (slices, -1)).sum(0).to(dtype).transpose(1, 2)


def _by_distance(band: Tensor, g: int, i_len: int) -> Tensor:
    """The gradient (h, reach) of the offsets: a key ahead of its query has the bias of distance 0."""
    sums = reduce(band, "(b g) reach (i r) -> (g r) reach", "sum", g=g, i=i_len)
    return torch.cat([sums[:, :1] + sums[:, -1:], sums[:, 1:-1]], dim=1)
