"""The gradients of keys and values."""

from __future__ import annotations

import triton
import triton.language as tl

from palm_pytorch.ops.attention.triton_kernels.scores import (
    LOG2_E,
    add_bias,
    documents_of,
    kept_by_dropout,
    pipeline_stages,
    step_of,
)
from palm_pytorch.ops.attention.triton_kernels.tiles import (
    dot,
    load_keys,
    load_lse,
    load_rows,
    row_data,
    rows_of,
    store_rows,
    width,
)


@triton.jit
def _sub_block(low, step, slices, PARTS: tl.constexpr):
    """The step-th of the blocks low, low + slices .., each in so many parts, in units of these."""
    return (low + step // PARTS * slices) * PARTS + step % PARTS


@triton.jit
def _add_rows(
    dk, dv, keys, values, key, document, q, lse, grad, delta, tile, group, call, G: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, with what a block of rows adds; dk is not yet scaled."""
    i_len = call.i_len
    b, kv_head = group // G, group % G
    query, head = rows_of(tile, kv_head, R, ROWS)
    rows = load_rows(q, b, kv_head, tile, i_len, D, R, ROWS)
    d_rows = load_rows(grad, b, kv_head, tile, i_len, D, R, ROWS)
    row_lse = load_lse(row_data(lse, group, tile, i_len, R, ROWS), query < i_len)
    row_delta = tl.load(row_data(delta, group, tile, i_len, R, ROWS), mask=query < i_len, other=0.0)
    slope = tl.zeros([ROWS], tl.float32)
    if call.bias.slopes is not None:
        slope = tl.load(call.bias.slopes + head)
    z = dot(keys, tl.trans(rows))
    z = add_bias(z, query[None, :], head[None, :], key[:, None], slope[None, :], call, CAUSAL, EDGE)
    if call.mask.ids is not None:
        z = tl.where(document[:, None] == documents_of(query, b, call)[None, :], z, float("-inf"))
    p = tl.exp2(z * (call.scale * LOG2_E) - row_lse[None, :])
    dp = dot(values, tl.trans(d_rows))
    dropped = p
    if call.seed is not None:
        keep = kept_by_dropout(query[None, :], head[None, :], key[:, None], b, call, G * R)
        dropped = tl.where(keep, p / (1 - call.dropout_p), 0.0)
        dp = tl.where(keep, dp / (1 - call.dropout_p), 0.0)
    dv = dot(dropped.to(d_rows.dtype), d_rows, dv)
    dz = p * (dp - row_delta[None, :])
    return dot(dz.to(rows.dtype), rows, dk), dv


@triton.jit
def backward_keys(
    q, k, v, lse, grad, delta, dk, dv, call, slices, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys. With several slices each meets its share of the rows, and dk and dv have
    `slices * b` batch rows to be added up."""
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
    start = start * R // ROWS + part
    stop = tl.cdiv(stop * R, ROWS)
    edge = start + tl.cdiv(tl.maximum(tl.cdiv(edge * R, ROWS) - start, 0), slices) * slices

    keys = load_keys(k, b, kv_head, key_start, j_len, D, KEYS, True)
    values = load_keys(v, b, kv_head, key_start, j_len, D, KEYS, True)
    dk_acc = tl.zeros([KEYS, width(D)], tl.float32)
    dv_acc = tl.zeros([KEYS, width(D)], tl.float32)
    for PLAIN in tl.static_range(2):
        low, high = (edge, stop) if PLAIN else (start, tl.minimum(edge, stop))
        steps = tl.cdiv(tl.maximum(high - low, 0), slices) * (ROWS // step_of(LEARNED, not PLAIN, ROWS))
        for step in tl.range(0, steps, num_stages=pipeline_stages(LEARNED, not PLAIN, STAGES)):
            tile = _sub_block(low, step, slices, ROWS // step_of(LEARNED, not PLAIN, ROWS))
            dk_acc, dv_acc = _add_rows(
                dk_acc, dv_acc, keys, values, key, document, q, lse, grad, delta, tile, group, call,
                G, R, D, CAUSAL, step_of(LEARNED, not PLAIN, ROWS), not PLAIN,
            )  # fmt: skip
    if mask.keys is not None:  # what met the rows nonetheless is of no account
        seen = tl.load(mask.keys + tl.cast(b, tl.int64) * j_len + key, mask=key < j_len, other=0)
        dk_acc = tl.where((seen != 0)[:, None], dk_acc, 0.0)
        dv_acc = tl.where((seen != 0)[:, None], dv_acc, 0.0)
    b_out, block = part * (groups // G) + b, key_start // KEYS
    store_rows(dk_acc * call.scale, dk, b_out, kv_head, block, j_len, D, 1, KEYS)
    store_rows(dv_acc, dv, b_out, kv_head, block, j_len, D, 1, KEYS)
