"""Attention through the kernels of `triton_kernels`, as custom ops that autograd, `torch.compile` and
activation checkpointing know by name. Autocast is settled before, in `attention`.

Shapes: q (b, h, i, d); k, v (b, g, j, d) with g dividing h; out (b, h, i, d);
lse (b * g, i * r), a number a row, the r = h / g query heads of a key/value head side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from einops import rearrange, reduce
from torch import Tensor

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
    raise ImportError(f"expected triton 3.6 or newer, got {triton.__version__}")

from palm_pytorch.ops.attention import triton_kernels as kernels
from palm_pytorch.ops.attention.bias import AlibiBias, Bias, RelativeBias

# Shares of the rows that gradients of keys and values are summed in, at most, and half as many as there are
# heads to a key/value head: each takes memory as these gradients do in float32.
MAX_SLICES = 4
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_DIM_HEAD = 256


def refusal(q: Tensor) -> str | None:
    """Why the kernels cannot serve these queries, or None."""
    if q.device.type != "cuda" and not (kernels.INTERPRETED and q.device.type == "cpu"):
        return f"q: expected a CUDA tensor (or TRITON_INTERPRET=1 and a CPU tensor), got one on {q.device}"
    if q.device.type == "cuda" and (
        torch.version.hip or torch.cuda.get_device_properties(q.device).major < 8
    ):
        return "q: expected an NVIDIA GPU of compute capability 8.0 or newer"
    if q.dtype not in DTYPES:
        return f"q: expected float16, bfloat16 or float32, got {q.dtype}"
    if q.shape[-1] > MAX_DIM_HEAD:
        return f"q: expected a dim_head of at most {MAX_DIM_HEAD}, got {q.shape[-1]}"
    return None


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    bias: Bias | None,
    key_mask: Tensor | None,
    document_ids: Tensor | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """Every argument of the contract in memory linear in the sequence, and the same bits each time."""
    reason = refusal(q)
    if reason is not None:
        raise ValueError(f"backend 'triton': {reason}; backend 'sdpa' can")
    slopes = bias.slopes.float() if isinstance(bias, AlibiBias) else None
    offsets = bias.offsets(k.shape[2]).float() if isinstance(bias, RelativeBias) else None
    # Drawn on the device, where the kernels read it: no wait, and checkpointing draws the same again.
    seed = torch.randint(1 << 62, (1,), device=q.device) if dropout_p > 0 else None
    out, _ = _attention(
        q, k, v, slopes, offsets, key_mask, document_ids, seed, causal, float(scale), float(dropout_p)
    )
    return out


class _Problem(NamedTuple):
    """What every kernel is told, how it is launched, and how many rows and groups there are."""

    call: kernels.Call
    blocks: kernels.Blocks
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
        document_ids: Tensor | None,
        seed: Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
    ) -> _Problem:
        (b, h, i_len, d), (g, j_len) = q.shape, k.shape[1:3]
        slopes = None if slopes is None else slopes / scale
        reach = 0 if offsets is None else offsets.shape[1]
        offsets = None if offsets is None else F.pad(offsets / scale, (0, 1)).contiguous()
        mask_keys = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        documents = (None, None, None) if document_ids is None else _document_spans(document_ids)
        bias = kernels.Bias(slopes, offsets, reach)
        mask = kernels.Mask(mask_keys, *documents)
        call = kernels.Call(bias, mask, seed, dropout_p, scale, i_len, j_len, b * g)
        constants = {"G": g, "R": h // g, "D": d, "CAUSAL": causal}
        blocks = kernels.blocks(
            d, q.element_size(), _capability(q.device), bias.slopes is not None or reach > 0
        )
        return _Problem(call, blocks, constants, groups=b * g, rows=i_len * (h // g))


def _document_spans(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ids, and the first and the last position that has the same id as each, (b, n), int32: where documents
    lie one after the other, just the keys that a query may see."""
    ordered, position = ids.sort(dim=-1, stable=True)
    place = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    changes = ordered[:, 1:] != ordered[:, :-1]
    begins, ends = (F.pad(changes, side, value=True) for side in ((1, 0), (0, 1)))
    first = torch.where(begins, place, 0).cummax(dim=-1).values
    last = torch.where(ends, place, ids.shape[-1]).flip(-1).cummin(dim=-1).values.flip(-1)
    # Each document goes by the place where it begins in that order, since ids may not fit into 32 bits.
    numbers, firsts, lasts = (
        torch.empty_like(position).scatter_(1, position, t).int()
        for t in (first, position.gather(1, first), position.gather(1, last))
    )
    return numbers, firsts, lasts


def _view(x: Tensor) -> kernels.View:
    return kernels.View(x, x.stride(0), x.stride(1), x.stride(2))


def _packed(x: Tensor) -> Tensor:
    """x with its last dimension packed; a slice of a projection is, and is taken as it lies. Within a block
    32 bits must do, so what lies further apart than that is not."""
    near = x.shape[1] * x.stride(1) < 1 << 30 and x.stride(2) < 1 << 22
    return x if x.stride(-1) == 1 and near else _empty(x).copy_(x)


def _empty(x: Tensor, batch: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """As x (b, heads, n, d), in memory (b, n, heads, d): what merges heads for free."""
    b, heads, n, d = x.shape
    return x.new_empty(batch or b, n, heads, d, dtype=dtype).transpose(1, 2)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def _processors(device: torch.device) -> int:
    """How many blocks the device works on side by side."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _run(kernel: Any, programs: int, *arguments: Any, launch: kernels.Launch, **constants: Any) -> None:
    kernel[(programs,)](
        *arguments,
        **constants,
        ROWS=launch.rows,
        KEYS=launch.keys,
        STAGES=launch.stages,
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=True,
    )


def _by_row(problem: _Problem, copies: int = 1, *width: int) -> tuple[int, ...]:
    """The shape of a tensor with some numbers for each row of each group."""
    return (copies * problem.groups, problem.rows, *width)


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    q, k, v = _packed(q), _packed(k), _packed(v)
    problem = _Problem.of(q, k, *options)
    launch = problem.blocks.forward
    if problem.rows <= launch.rows // 2:
        launch = problem.blocks.decode
    programs = triton.cdiv(problem.rows, launch.rows) * problem.groups
    # A few queries and many keys: the keys are shared out, or most of the device would look on.
    splits = min(triton.cdiv(2 * _processors(q.device), programs), triton.cdiv(k.shape[2], 4 * launch.keys))
    out, lse = _empty(q), q.new_empty(_by_row(problem), dtype=torch.float32)
    part, part_lse = _view(out), lse
    if splits > 1:
        parts = q.new_empty(_by_row(problem, splits, q.shape[-1]), dtype=torch.float32)
        part_lse = q.new_empty(_by_row(problem, splits), dtype=torch.float32)
        # (splits * b, h, i, d), the heads of a group side by side
        part = _view(rearrange(parts, "(s g) (i r) d -> s (g r) i d", g=k.shape[1], i=q.shape[2]))
    with torch.cuda.device_of(q):
        _run(
            kernels.forward,
            programs * splits,
            *(_view(q), _view(k), _view(v), part, part_lse, problem.call, splits),
            launch=launch,
            **problem.constants,
        )
        if splits > 1:
            kernels.combine[(lse.numel(),)](
                *(parts, part_lse, _view(out), lse, q.shape[2], splits, k.shape[1], q.shape[1] // k.shape[1]),
                D=q.shape[-1],
                SPLITS=triton.next_power_of_2(splits),
                enable_fp_fusion=True,
            )
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets_grad: bool, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, q, k, v = _packed(grad), _packed(q), _packed(k), _packed(v)
    problem = _Problem.of(q, k, *options)
    b, j_len = q.shape[0], k.shape[2]
    views = (_view(q), _view(k), _view(v))
    dq, delta = _empty(q), torch.empty_like(lse)
    # Zeros where there is no key at that distance.
    band = lse.new_zeros(_by_row(problem, 1, problem.call.bias.reach + 1)) if offsets_grad else None
    launch = problem.blocks.queries
    with torch.cuda.device_of(q):
        _run(
            kernels.backward_queries,
            triton.cdiv(problem.rows, launch.rows) * problem.groups,
            *(*views, _view(out), lse, _view(grad), _view(dq), delta, band, problem.call),
            launch=launch,
            **problem.constants,
        )
        launch = problem.blocks.keys
        programs = triton.cdiv(j_len, launch.keys) * problem.groups
        # Few keys, or one key/value head and a small batch: the rows are shared out, each share summed apart.
        wanted = triton.cdiv(2 * _processors(q.device), programs)
        most = min(MAX_SLICES, max(1, q.shape[1] // k.shape[1] // 2))
        slices = min(wanted, triton.cdiv(problem.rows, launch.rows), most)
        parts = [_empty(t, slices * b, torch.float32 if slices > 1 else None) for t in (k, v)]
        _run(
            kernels.backward_keys,
            programs * slices,
            *(*views, lse, _view(grad), delta, *(_view(part) for part in parts), problem.call, slices),
            launch=launch,
            **problem.constants,
        )
    dk, dv = (part.unflatten(0, (slices, b)).sum(0).to(k.dtype) if slices > 1 else part for part in parts)
    return dq, dk, dv, q.new_empty(0) if band is None else _by_distance(band, k.shape[1], q.shape[2])


def _by_distance(band: Tensor, g: int, i_len: int) -> Tensor:
    """The gradient (h, reach) of the offsets: a key ahead of its query has the bias of distance 0."""
    sums = reduce(band, "(b g) (i r) reach -> (g r) reach", "sum", g=g, i=i_len)
    return torch.cat([sums[:, :1] + sums[:, -1:], sums[:, 1:-1]], dim=1)


@torch.library.custom_op("palm_pytorch::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    document_ids: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, slopes, offsets, key_mask, document_ids, seed, causal, scale, dropout_p)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    (b, h, i_len, _), g = q.shape, k.shape[1]
    return _empty(q), q.new_empty(b * g, i_len * (h // g), dtype=torch.float32)


@torch.library.custom_op("palm_pytorch::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets_grad: bool,
    slopes: Tensor | None,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    document_ids: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (slopes, offsets, key_mask, document_ids, seed, causal, scale, dropout_p)
    return _backward(grad, q, k, v, out, lse, offsets_grad, *options)


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, offsets_grad, _, offsets, *_ = others
    return _empty(q), _empty(k), _empty(v), torch.empty_like(offsets) if offsets_grad else q.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *tensors, causal, scale, dropout_p = inputs
    ctx.save_for_backward(q, k, v, *output, *tensors)
    ctx.options = (causal, scale, dropout_p)


def _gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    offsets_grad = ctx.needs_input_grad[4]
    dq, dk, dv, d_offsets = _attention_backward(grad, q, k, v, out, lse, offsets_grad, *tensors, *ctx.options)
    return dq, dk, dv, None, d_offsets if offsets_grad else None, *[None] * 6


_attention.register_autograd(_gradients, setup_context=_save)
