"""The gradients of queries and of a learned bias."""

from __future__ import annotations

import triton
import triton.language as tl

from palm_pytorch.ops.attention.triton_kernels.scores import (
    LOG2_E,
    add_bias,
    documents_of,
    hide_masked,
    kept_by_dropout,
    keys_seen,
    lift_of,
    pipeline_stages,
    products,
    step_of,
    tilt_of,
)
from palm_pytorch.ops.attention.triton_kernels.tiles import (
    dot,
    load_keys,
    load_rows,
    row_data,
    rows_of,
    store_rows,
    width,
)


@triton.jit
def backward_queries(
    q, k, v, out, lse, grad, dq, delta, band, call, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, TILTED: tl.constexpr,
):  # fmt: skip
    """dq and delta (b * g, i * r) of a block of rows, and, unless band is None, dz by distance:
    band (b * g, reach + 1, i * r), the last of which is the sum over the keys ahead."""
    bias, i_len, j_len, groups = call.bias, call.i_len, call.j_len, call.groups
    LEARNED: tl.constexpr = bias.offsets is not None
    TILT: tl.constexpr = bias.slopes is not None and CAUSAL and TILTED
    program = tl.program_id(0)
    group = program % groups
    tile = (tl.num_programs(0) - 1 - program) // groups
    b, kv_head = group // G, group % G
    query, head = rows_of(tile, kv_head, R, ROWS)
    start, edge, stop = keys_seen(tile, b, call, R, CAUSAL, ROWS, KEYS)
    document = documents_of(query, b, call)

    inside = query < i_len
    rows = load_rows(q, b, kv_head, tile, i_len, D, R, ROWS)
    d_rows = load_rows(grad, b, kv_head, tile, i_len, D, R, ROWS)
    row_delta = tl.sum(
        load_rows(out, b, kv_head, tile, i_len, D, R, ROWS).to(tl.float32) * d_rows.to(tl.float32), 1
    )
    tl.store(row_data(delta, group, tile, i_len, R, ROWS), row_delta, mask=inside)
    row_lse = tl.load(row_data(lse, group, tile, i_len, R, ROWS), mask=inside, other=float("inf"))
    if band is not None:
        band = row_data(band, group * (bias.reach + 1), tile, i_len, R, ROWS)
    slope = tl.zeros([ROWS], tl.float32)
    if bias.slopes is not None:
        slope = tl.load(bias.slopes + head)
    tilt = tilt_of(slope, TILT)
    c = call.scale * LOG2_E
    acc = tl.zeros([ROWS, width(D)], tl.float32)
    ahead = tl.zeros([ROWS], tl.float32)
    for EDGE in tl.static_range(2):
        low, high = (edge, stop) if EDGE else (start, edge)
        for done in tl.range(
            0, high - low, step_of(LEARNED, EDGE, KEYS), num_stages=pipeline_stages(LEARNED, EDGE, STAGES)
        ):
            key_start = low + done
            place = tl.arange(0, step_of(LEARNED, EDGE, KEYS))[None, :]
            key = key_start + place
            keys = load_keys(k, b, kv_head, key_start, j_len, D, step_of(LEARNED, EDGE, KEYS), EDGE)
            values = load_keys(v, b, kv_head, key_start, j_len, D, step_of(LEARNED, EDGE, KEYS), EDGE)
            z = products(rows, keys, tilt, place, TILT)
            z = add_bias(
                z, query[:, None], head[:, None], place, key_start, slope[:, None], call, G * R, CAUSAL, EDGE,
                TILT,
            )  # fmt: skip
            z = hide_masked(z, document[:, None], key, b, call)
            p = tl.exp2(z * c - (row_lse - lift_of(query, slope, key_start, call, CAUSAL) * c)[:, None])
            dp = dot(d_rows, tl.trans(values))
            if call.seed is not None:
                keep = kept_by_dropout(query[:, None], head[:, None], key, b, call, G * R)
                dp = tl.where(keep, dp * (1 / (1 - call.dropout_p)), 0.0)
            dz = p * (dp - row_delta[:, None])
            if EDGE and band is not None:
                distance = query[:, None] + (j_len - i_len) - key
                near = inside[:, None] & (distance >= 0) & (distance < bias.reach)
                tl.store(band[:, None] + tl.cast(distance, tl.int64) * (i_len * R), dz, mask=near)
                if not CAUSAL:
                    ahead += tl.sum(tl.where(distance < 0, dz, 0.0), 1)
            acc = dot(dz.to(keys.dtype), keys, acc)
    store_rows(acc * call.scale, dq, b, kv_head, tile, i_len, D, R, ROWS)
    if band is not None and not CAUSAL:
        tl.store(band + tl.cast(bias.reach, tl.int64) * (i_len * R), ahead, mask=inside)
