"""The gradients of keys and values."""

from __future__ import annotations

import triton
import triton.language as tl

from palm_pytorch.ops.attention.triton_kernels.scores import (
    LOG2_E,
    add_bias,
    documents_of,
    kept_by_dropout,
    lift_of,
    pipeline_stages,
    step_of,
)
from palm_pytorch.ops.attention.triton_kernels.tiles import (
    apart,
    dot,
    load_keys,
    load_rows,
    row_data,
    rows_of,
    store_rows,
    width,
)


@triton.constexpr_function
def _parts(learned, edge, rows):
    """In how many steps a loop takes a block of rows."""
    return rows // step_of(learned, edge, rows)


@triton.jit
def _add_rows(
    dk, dv, keys, values, key_start, document, q, lse, grad, delta, tile, group, call, G: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    EDGE: tl.constexpr, FOR_KEYS: tl.constexpr, FOR_VALUES: tl.constexpr,
):  # fmt: skip
    """dk, not yet scaled, and dv of a block of keys, with what a block of rows adds to those that are asked
    for."""
    i_len = call.i_len
    b, kv_head = group // G, group % G
    query, head = rows_of(tile, kv_head, R, ROWS)
    place = tl.arange(0, KEYS)[:, None]
    rows = load_rows(q, b, kv_head, tile, i_len, D, R, ROWS)
    d_rows = load_rows(grad, b, kv_head, tile, i_len, D, R, ROWS)
    row_lse = tl.load(row_data(lse, group, tile, i_len, R, ROWS), mask=query < i_len, other=float("inf"))
    slope = tl.zeros([ROWS], tl.float32)
    if call.bias.slopes is not None:
        slope = tl.load(call.bias.slopes + head)
    c = call.scale * LOG2_E
    z = dot(keys, tl.trans(rows))
    z = add_bias(
        z, query[None, :], head[None, :], place, key_start, slope[None, :], call, G * R, CAUSAL, EDGE, False
    )
    if call.mask.ids is not None:
        z = tl.where(document[:, None] == documents_of(query, b, call)[None, :], z, float("-inf"))
    p = tl.exp2(z * c - (row_lse - lift_of(query, slope, key_start, call, CAUSAL) * c)[None, :])
    if call.seed is not None:
        keep = kept_by_dropout(query[None, :], head[None, :], key_start + place, b, call, G * R)
    if FOR_VALUES:
        dropped = p
        if call.seed is not None:
            dropped = tl.where(keep, p * (1 / (1 - call.dropout_p)), 0.0)
        dv = dot(dropped.to(d_rows.dtype), d_rows, dv)
    if FOR_KEYS:
        row_delta = tl.load(row_data(delta, group, tile, i_len, R, ROWS), mask=query < i_len, other=0.0)
        dp = dot(values, tl.trans(d_rows))
        if call.seed is not None:
            dp = tl.where(keep, dp * (1 / (1 - call.dropout_p)), 0.0)
        dk = dot((p * (dp - row_delta[None, :])).to(rows.dtype), rows, dk)
    return dk, dv


@triton.jit(do_not_specialize=["slices"])  # known to be 1, it would have ptxas lose track, see `apart`
def backward_keys(
    q, k, v, lse, grad, delta, dk, dv, call, slices, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, or one of them where the other is None. With several slices each meets
    its share of the rows, and dk and dv have `slices * b` batch rows to be added up."""
    bias, mask, i_len, j_len, groups = call.bias, call.mask, call.i_len, call.j_len, call.groups
    LEARNED: tl.constexpr = bias.offsets is not None
    program = tl.program_id(0)
    group, part = program % groups, program // groups % slices
    key_start = program // (groups * slices) * KEYS
    b, kv_head = group // G, group % G
    key = key_start + tl.arange(0, KEYS)
    shift = j_len - i_len

    # Blocks of rows [start, stop), those before edge in edge blocks.
    start, stop = 0, i_len
    if CAUSAL:
        start = tl.maximum(key_start - shift, 0)
    document = key
    if mask.ids is not None:
        at_key = tl.cast(b, tl.int64) * j_len + tl.minimum(key, j_len - 1)
        document = tl.load(mask.ids + at_key)
        start = tl.maximum(start, tl.min(tl.load(mask.first + at_key)) - shift)
        stop = tl.maximum(tl.max(tl.load(mask.last + at_key)) + 1 - shift, 0)
    if CAUSAL or bias.offsets is not None:
        edge = tl.minimum(tl.maximum(key_start + KEYS - 1 + bias.reach - shift, 0), stop)
    else:
        edge = start  # keys past the end go astray by themselves, and are not stored
    start, stop = start * R // ROWS, tl.cdiv(stop * R, ROWS)
    share = tl.cdiv(tl.maximum(stop - start, 0), slices)
    start = start + part * share
    stop = tl.minimum(stop, start + share)
    edge = tl.maximum(tl.minimum(tl.cdiv(edge * R, ROWS), stop), start)

    keys, values = load_keys(k, b, kv_head, key_start, j_len, D, KEYS, True), 0.0
    FOR_KEYS: tl.constexpr = dk is not None
    FOR_VALUES: tl.constexpr = dv is not None
    dk_acc, dv_acc = 0.0, 0.0
    if FOR_KEYS:
        values = load_keys(v, b, kv_head, key_start, j_len, D, KEYS, True)
        dk_acc = tl.zeros([KEYS, width(D)], tl.float32)
    if FOR_VALUES:
        dv_acc = tl.zeros([KEYS, width(D)], tl.float32)
    for PLAIN in tl.static_range(2):
        dk_acc, dv_acc = apart(dk_acc, i_len), apart(dv_acc, i_len)
        low, high = (edge, stop) if PLAIN else (start, edge)
        parts = _parts(LEARNED, not PLAIN, ROWS)
        for step in tl.range(0, (high - low) * parts, num_stages=pipeline_stages(LEARNED, not PLAIN, STAGES)):
            dk_acc, dv_acc = _add_rows(
                dk_acc, dv_acc, keys, values, key_start, document, q, lse, grad, delta, low * parts + step,
                group, call, G, R, D, CAUSAL, step_of(LEARNED, not PLAIN, ROWS), KEYS, not PLAIN,
                FOR_KEYS, FOR_VALUES,
            )  # fmt: skip
    b_out, block = part * (groups // G) + b, key_start // KEYS
    seen = key < j_len
    if mask.keys is not None:  # what met the rows nonetheless is of no account
        seen = tl.load(mask.keys + tl.cast(b, tl.int64) * j_len + key, mask=seen, other=0) != 0
    if FOR_KEYS:
        dk_acc = tl.where(seen[:, None], dk_acc * call.scale, 0.0)
        store_rows(dk_acc, dk, b_out, kv_head, block, j_len, D, 1, KEYS)
    if FOR_VALUES:
        dv_acc = tl.where(seen[:, None], dv_acc, 0.0)
        store_rows(dv_acc, dv, b_out, kv_head, block, j_len, D, 1, KEYS)
