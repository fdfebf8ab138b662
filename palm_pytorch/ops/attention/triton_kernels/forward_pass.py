"""The output of attention."""

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
def forward(
    q, k, v, out, lse, call, splits, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, TILTED: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """out and lse (b * g, i * r) of a block of rows. With several splits each sees its share of the keys, and
    out and lse have `splits` times the groups, for `combine` to add up. SINGLE: each share is one block,
    which needs no loop of its own for plain blocks."""
    bias, mask, i_len, j_len, groups = call.bias, call.mask, call.i_len, call.j_len, call.groups
    LEARNED: tl.constexpr = bias.offsets is not None
    SLOPED: tl.constexpr = bias.slopes is not None and CAUSAL
    TILT: tl.constexpr = SLOPED and TILTED
    MASKED: tl.constexpr = mask.keys is not None or mask.ids is not None
    program = tl.program_id(0)
    group, split = program % groups, program // groups % splits
    # The blocks with most to see first, so that none of them is left to the end.
    tile = (tl.num_programs(0) - 1 - program) // (groups * splits)
    b, kv_head = group // G, group % G
    query, head = rows_of(tile, kv_head, R, ROWS)
    start, edge, stop = keys_seen(tile, b, call, R, CAUSAL, ROWS, KEYS)
    share = tl.cdiv(tl.cdiv(j_len, splits), KEYS) * KEYS
    start = tl.maximum(start, split * share)
    stop = tl.minimum(stop, split * share + share)
    edge = start if SINGLE else tl.maximum(tl.minimum(edge, stop // KEYS * KEYS), start)
    document = documents_of(query, b, call)

    rows = load_rows(q, b, kv_head, tile, i_len, D, R, ROWS)
    slope = tl.zeros([ROWS], tl.float32)
    if bias.slopes is not None:
        slope = tl.load(bias.slopes + head)
    tilt = tilt_of(slope, TILT)
    c = call.scale * LOG2_E
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, width(D)], tl.float32)
    for EDGE in tl.static_range(1 if SINGLE else 0, 2):
        low, high = (edge, stop) if EDGE else (start, edge)
        for done in tl.range(
            0, high - low, step_of(LEARNED, EDGE, KEYS), num_stages=pipeline_stages(LEARNED, EDGE, STAGES)
        ):
            key_start = low + done
            place = tl.arange(0, step_of(LEARNED, EDGE, KEYS))[None, :]
            key = key_start + place
            keys = load_keys(k, b, kv_head, key_start, j_len, D, step_of(LEARNED, EDGE, KEYS), EDGE)
            if SINGLE:  # no pipeline has them ready, so they are asked for in time
                values = load_keys(v, b, kv_head, key_start, j_len, D, step_of(LEARNED, EDGE, KEYS), EDGE)
            z = products(rows, keys, tilt, place, TILT)
            z = add_bias(
                z, query[:, None], head[:, None], place, key_start, slope[:, None], call, G * R, CAUSAL, EDGE,
                TILT,
            )  # fmt: skip
            z = hide_masked(z, document[:, None], key, b, call)
            peak = tl.max(z, 1)
            lift = lift_of(query, slope, key_start, call, CAUSAL)
            higher = tl.maximum(highest, peak + lift if SLOPED else peak)
            # The same in this block's terms: what is highest has a weight of just 1.
            level = tl.maximum(highest - lift, peak) if SLOPED else higher
            reached = higher
            if EDGE or MASKED:  # a row that has seen nothing yet has no finite maximum
                reached = tl.where(higher == float("-inf"), 0.0, higher)
                level = tl.where(level == float("-inf"), 0.0, level)
            p = tl.exp2(z * c - (level * c)[:, None])
            # Just 1 where nothing is higher: the difference of two products would be a rounding error off,
            # the same in every block of a long row.
            shrink = tl.exp2((highest - reached) * c)
            total = total * shrink + tl.sum(p, 1)
            if call.seed is not None:
                p = tl.where(kept_by_dropout(query[:, None], head[:, None], key, b, call, G * R), p, 0.0)
            if not SINGLE:
                values = load_keys(v, b, kv_head, key_start, j_len, D, step_of(LEARNED, EDGE, KEYS), EDGE)
            acc = dot(p.to(values.dtype), values, acc * shrink[:, None])
            highest = higher
    acc = acc / tl.where(total > 0, total * (1 - call.dropout_p), 1.0)[:, None]
    store_rows(acc, out, split * (groups // G) + b, kv_head, tile, i_len, D, R, ROWS)
    lse = row_data(lse, split * groups + group, tile, i_len, R, ROWS)
    # A row that sees nothing: of no weight in `combine`, and gradients take its weights for exp2(-inf) = 0.
    blind = tl.where(splits > 1, float("-inf"), float("inf"))
    tl.store(lse, tl.where(total > 0, highest * c + tl.log2(total), blind), mask=query < i_len)


@triton.constexpr_function
def _parts_at_once(d, splits):
    """All, or so many that 256 threads hold 32 numbers each."""
    return min(8192 // width(d), splits)


@triton.jit
def combine(
    parts, lse, out, whole_lse, i_len, splits, batch, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One row of out and its lse from `splits` parts (splits * b, h, i, d), no more than SPLITS."""
    rows = tl.num_programs(0)
    program = tl.program_id(0)
    group, row = program // (i_len * R), program % (i_len * R)
    b, head, query = (group // G).to(tl.int64), group % G * R + row % R, row // R
    every = tl.arange(0, SPLITS)
    part_lse = tl.load(lse + (every * rows + program), mask=every < splits, other=float("-inf"))
    highest = tl.max(part_lse)
    level = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(part_lse - level))
    d = tl.arange(0, width(D))
    acc = tl.zeros([width(D)], tl.float32)
    for first in tl.range(0, splits, _parts_at_once(D, SPLITS)):
        split = first + tl.arange(0, _parts_at_once(D, SPLITS))
        split_lse = tl.load(lse + (split * rows + program), mask=split < splits, other=float("-inf"))
        at = (split * batch + b) * parts.b + head * parts.h + query * parts.n
        inside = (split < splits)[:, None] & (d < D)[None, :]
        part = tl.load(parts.data + at[:, None] + d[None, :], mask=inside, other=0.0)
        acc += tl.sum(part * tl.exp2(split_lse - level)[:, None], 0)
    acc = acc / tl.where(total > 0, total, 1.0)
    at_out = out.data + b * out.b + head * out.h + query * out.n + d
    tl.store(at_out, acc.to(out.data.dtype.element_ty), mask=d < D)
    tl.store(whole_lse + program, tl.where(total > 0, highest + tl.log2(total), float("inf")))
