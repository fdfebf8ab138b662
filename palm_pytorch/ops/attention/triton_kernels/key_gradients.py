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
    load_lse,
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
    acc, keys, values, key_start, document, q, lse, grad, delta, tile, group, call, G: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """acc, dk of a block of keys, not yet scaled, with what a block of rows adds; dv if values is None."""
    i_len = call.i_len
    b, kv_head = group // G, group % G
    query, head = rows_of(tile, kv_head, R, ROWS)
    place = tl.arange(0, KEYS)[:, None]
    rows = load_rows(q, b, kv_head, tile, i_len, D, R, ROWS)
    d_rows = load_rows(grad, b, kv_head, tile, i_len, D, R, ROWS)
    row_lse = load_lse(row_data(lse, group, tile, i_len, R, ROWS), query < i_len)
    slope = tl.zeros([ROWS], tl.float32)
    if call.bias.slopes is not None:
        slope = tl.load(call.bias.slopes + head)
    c = call.scale * LOG2_E
    z = dot(keys, tl.trans(rows))
    z = add_bias(
        z, query[None, :], head[None, :], place, key_start, slope[None, :], call, G * R, CAUSAL, EDGE
    )
    if call.mask.ids is not None:
        z = tl.where(document[:, None] == documents_of(query, b, call)[None, :], z, float("-inf"))
    p = tl.exp2(z * c - (row_lse - lift_of(query, slope, key_start, call, CAUSAL) * c)[None, :])
    if values is not None:
        row_delta = tl.load(row_data(delta, group, tile, i_len, R, ROWS), mask=query < i_len, other=0.0)
        dp = dot(values, tl.trans(d_rows))
    if call.seed is not None:
        keep = kept_by_dropout(query[None, :], head[None, :], key_start + place, b, call, G * R)
        if values is None:
            p = tl.where(keep, p * (1 / (1 - call.dropout_p)), 0.0)
        else:
            dp = tl.where(keep, dp * (1 / (1 - call.dropout_p)), 0.0)
    if values is None:
        acc = dot(p.to(d_rows.dtype), d_rows, acc)
    else:
        acc = dot((p * (dp - row_delta[None, :])).to(rows.dtype), rows, acc)
    return acc


@triton.jit
def _add_all_rows(
    q, k, v, lse, grad, delta, call, slices, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk, not yet scaled, of this program's block of keys, (KEYS, width), or dv if v is None; and where it
    belongs: batch row, key/value head, block. With several slices each meets its share of the rows."""
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

    keys = load_keys(k, b, kv_head, key_start, j_len, D, KEYS, True)
    values = None
    if v is not None:
        values = load_keys(v, b, kv_head, key_start, j_len, D, KEYS, True)
    acc = tl.zeros([KEYS, width(D)], tl.float32)
    for PLAIN in tl.static_range(2):
        acc = apart(acc, i_len)
        low, high = (edge, stop) if PLAIN else (start, edge)
        parts = _parts(LEARNED, not PLAIN, ROWS)
        for step in tl.range(0, (high - low) * parts, num_stages=pipeline_stages(LEARNED, not PLAIN, STAGES)):
            acc = _add_rows(
                acc, keys, values, key_start, document, q, lse, grad, delta, low * parts + step, group, call,
                G, R, D, CAUSAL, step_of(LEARNED, not PLAIN, ROWS), KEYS, not PLAIN,
            )  # fmt: skip
    if mask.keys is not None:  # what met the rows nonetheless is of no account
        seen = tl.load(mask.keys + tl.cast(b, tl.int64) * j_len + key, mask=key < j_len, other=0)
        acc = tl.where((seen != 0)[:, None], acc, 0.0)
    return acc, part * (groups // G) + b, kv_head, key_start // KEYS


@triton.jit
def backward_keys(
    q, k, v, lse, grad, delta, dk, call, slices, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk of a block of keys; with several slices `slices * b` batch rows of it, to be added up."""
    acc, b, kv_head, block = _add_all_rows(
        q, k, v, lse, grad, delta, call, slices, G, R, D, CAUSAL, ROWS, KEYS, STAGES
    )
    store_rows(acc * call.scale, dk, b, kv_head, block, call.j_len, D, 1, KEYS)


@triton.jit
def backward_values(
    q, k, lse, grad, dv, call, slices, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dv of a block of keys, as `backward_keys` has dk."""
    acc, b, kv_head, block = _add_all_rows(
        q, k, None, lse, grad, None, call, slices, G, R, D, CAUSAL, ROWS, KEYS, STAGES
    )
    store_rows(acc, dv, b, kv_head, block, call.j_len, D, 1, KEYS)
