"""The fused attention kernels, and the blocks they are launched with.

Shapes: b batch; h query heads; g key/value heads; r = h / g; i, j query and key length; d head dim.
A *group* is a key/value head of a batch row, b * g of them. Its r query heads stand side by side: row
`query * r + head` of i * r rows, so that each block of keys is loaded once for all of them.

Per block of ROWS rows and KEYS keys, with c = scale * log2(e):

    z  = q k^T + bias / scale       -inf where the key is not visible
    p  = exp2(c z - lse)            lse = log2(sum(exp2(c z))), one a row
    o  = p v
    dp = do v^T
    dz = p (dp - delta)             delta = sum(o do), one a row; dz is the gradient of `scale q k^T + bias`
    dq = scale dz k                 `backward_queries`: a block of rows meets the keys it sees
    dk = scale dz^T q;  dv = p^T do `backward_keys`: a block of keys meets the rows that see it

Two passes cost seven products where one that adds dq with atomics costs five; in return each sum has one
order, and the same call gives the same bits.

Blocks wholly visible and behind the reach of a learned bias take the plain path; the others are *edge*
blocks. Dropout draws from Philox at (key, query, head): the same in every pass, whatever the blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Under Triton's interpreter (TRITON_INTERPRET=1 when triton is first imported) the kernels run on the CPU.
INTERPRETED = tl.constexpr(not isinstance(tl.cdiv, triton.JITFunction))


LOG2_E = tl.constexpr(1.4426950408889634)


class View(NamedTuple):
    """A tensor (b, heads, positions, d) and its strides; d is packed."""

    data: Any
    b: int
    h: int
    n: int


class Bias(NamedTuple):
    """What is added to z. Either or both may be None.

    slopes: (h,), ALiBi's, over scale.
    offsets: (h, reach + 1), over scale, of the keys at distance 0, 1 .. reach; keys further behind get the
    last, which is 0, and keys ahead the first.
    """

    slopes: Any
    offsets: Any
    reach: int


class Mask(NamedTuple):
    """keys: (b, j), nonzero where visible.  ids: (b, n) documents, with the first and the last position,
    (b, n), that has the same id. Each may be None.
    """

    keys: Any
    ids: Any
    first: Any
    last: Any


class Call(NamedTuple):
    """What is the same in every block. seed: one int64, or None for no dropout."""

    bias: Bias
    mask: Mask
    seed: Any
    dropout_p: float
    scale: float
    i_len: int
    j_len: int
    groups: int


class Launch(NamedTuple):
    """Rows and keys of a block, warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _dot(a, b, acc=None):
    if INTERPRETED:  # it would multiply bfloat16's bits as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    # For float32: three tf32 products, nearly float32's precision at a third of tf32's rate.
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.constexpr_function
def _width(d):
    """Blocks are a power of two wide, and no product is narrower than 16."""
    return max(16, triton.next_power_of_2(d))


@triton.constexpr_function
def _stages(learned, edge, stages):
    """Pipeline stages of a loop. To look up a learned bias takes registers, for a few blocks a row: these are
    not pipelined, and go in smaller steps."""
    return 1 if edge and learned else stages


@triton.constexpr_function
def _step(learned, edge, size):
    """How much of a block a loop takes at a time."""
    return max(16, size // 2) if edge and learned else size


@triton.jit
def _load_keys(view, b, h, start, j_len, D: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr):
    """Positions start .. start + KEYS of a head, (KEYS, D to a power of two), zeros past either end."""
    WIDTH: tl.constexpr = _width(D)
    key = tl.arange(0, KEYS)[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    # One 64-bit sum a block; within it 32 bits are enough.
    at = tl.cast(b, tl.int64) * view.b + tl.cast(h, tl.int64) * view.h + tl.cast(start, tl.int64) * view.n
    data = view.data + at
    if EDGE:
        return tl.load(data + key * view.n + d, mask=(start + key < j_len) & (d < D), other=0.0)
    if D != WIDTH:
        return tl.load(data + key * view.n + d, mask=d < D, other=0.0)
    return tl.load(data + key * view.n + d)


@triton.jit
def _rows_of(tile, kv_head, R: tl.constexpr, ROWS: tl.constexpr):
    """Query and head of each row of a block."""
    row = tile * ROWS + tl.arange(0, ROWS)
    return row // R, kv_head * R + row % R


@triton.jit
def _row_pointers(view, b, kv_head, tile, i_len, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr):
    """Where a view has a block of rows, (ROWS, width), and which of that is there."""
    query, head = _rows_of(tile, 0, R, ROWS)
    d = tl.arange(0, _width(D))
    first = tile * ROWS // R
    at = (
        tl.cast(b, tl.int64) * view.b
        + tl.cast(kv_head, tl.int64) * R * view.h
        + tl.cast(first, tl.int64) * view.n
    )
    pointers = view.data + at + ((query - first) * view.n + head * view.h)[:, None] + d[None, :]
    return pointers, (query < i_len)[:, None] & (d < D)[None, :]


@triton.jit
def _load_rows(view, b, kv_head, tile, i_len, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr):
    """A block of rows, zeros past either end."""
    pointers, inside = _row_pointers(view, b, kv_head, tile, i_len, D, R, ROWS)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _store_rows(rows, view, b, kv_head, tile, i_len, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr):
    pointers, inside = _row_pointers(view, b, kv_head, tile, i_len, D, R, ROWS)
    tl.store(pointers, rows.to(view.data.dtype.element_ty), mask=inside)


@triton.jit
def _row_data(data, group, tile, i_len, R: tl.constexpr, ROWS: tl.constexpr, WIDTH=1):
    """Where a tensor (b * g, i * r, WIDTH) has the first number of each row of a block."""
    first = (tl.cast(group, tl.int64) * (i_len * R) + tile * ROWS) * WIDTH
    return data + first + tl.arange(0, ROWS) * WIDTH


@triton.jit
def _keys_seen(
    tile, b, call, R: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """start <= edge <= stop: the keys that a block of rows may see, those before edge in plain blocks."""
    bias, mask, i_len, j_len = call.bias, call.mask, call.i_len, call.j_len
    query = tl.minimum((tile * ROWS + tl.arange(0, ROWS)) // R, i_len - 1)
    shift = j_len - i_len
    start, stop = 0, j_len
    if CAUSAL:
        stop = tl.maximum(tl.max(query) + shift + 1, 0)
    if mask.ids is not None:
        at = tl.cast(b, tl.int64) * j_len + query
        start = tl.min(tl.load(mask.first + at)) // KEYS * KEYS
        stop = tl.minimum(stop, tl.max(tl.load(mask.last + at)) + 1)
    if mask.keys is not None or mask.ids is not None:
        edge = start
    elif CAUSAL or bias.offsets is not None:
        edge = tl.maximum(tl.min(query) + shift + 1 - bias.reach, 0) // KEYS * KEYS
    else:
        edge = j_len // KEYS * KEYS
    return start, edge, stop


@triton.jit
def _scores(z, query, head, key, slope, b, call, CAUSAL: tl.constexpr, EDGE: tl.constexpr):
    """Adds bias and mask to products. query, head, slope and key are shaped to broadcast against z."""
    bias, mask, i_len, j_len = call.bias, call.mask, call.i_len, call.j_len
    position = query + (j_len - i_len)
    if bias.slopes is not None:
        ahead = key.to(tl.float32) - position.to(tl.float32)  # exact, up to 2^24
        z += slope * (ahead if CAUSAL else -tl.abs(ahead))
    if EDGE:
        distance = position - key
        if bias.offsets is not None:
            at = head * (bias.reach + 1) + tl.minimum(tl.maximum(distance, 0), bias.reach)
            z += tl.load(bias.offsets + at)
        inside = key < j_len
        visible = inside
        if CAUSAL:
            visible = visible & (distance >= 0)
        if mask.keys is not None:
            visible = visible & (
                tl.load(mask.keys + tl.cast(b, tl.int64) * j_len + key, mask=inside, other=0) != 0
            )
        if mask.ids is not None:
            ids = mask.ids + tl.cast(b, tl.int64) * j_len
            query_id = tl.load(ids + query, mask=query < i_len, other=0)
            visible = visible & (query_id == tl.load(ids + key, mask=inside, other=0))
        z = tl.where(visible, z, float("-inf"))
    return z


@triton.jit
def _keep(query, head, key, b, call, H: tl.constexpr):
    """Which weights dropout leaves."""
    zero = query * 0 + key * 0
    bits, _, _, _ = tl.philox(tl.load(call.seed), key + zero, query + zero, b * H + head + zero, zero)
    return tl.uint_to_uniform_float(bits) >= call.dropout_p


@triton.jit
def forward(
    q, k, v, out, lse, call, splits, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out and lse (b * g, i * r) of a block of rows. With several splits each sees its share of the keys, and
    out and lse have `splits` times the groups, for `combine` to add up."""
    bias, i_len, j_len, groups = call.bias, call.i_len, call.j_len, call.groups
    LEARNED: tl.constexpr = bias.offsets is not None
    program = tl.program_id(0)
    group, split = program % groups, program // groups % splits
    # The blocks with most to see first, so that none of them is left to the end.
    tile = (tl.num_programs(0) - 1 - program) // (groups * splits)
    b, kv_head = group // G, group % G
    query, head = _rows_of(tile, kv_head, R, ROWS)
    start, edge, stop = _keys_seen(tile, b, call, R, CAUSAL, ROWS, KEYS)
    share = tl.cdiv(tl.cdiv(j_len, splits), KEYS) * KEYS
    start = tl.maximum(start, split * share)
    stop = tl.minimum(stop, split * share + share)
    edge = tl.maximum(tl.minimum(edge, stop // KEYS * KEYS), start)

    rows = _load_rows(q, b, kv_head, tile, i_len, D, R, ROWS)
    slope = tl.zeros([ROWS], tl.float32)
    if bias.slopes is not None:
        slope = tl.load(bias.slopes + head)
    c = call.scale * LOG2_E
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, _width(D)], tl.float32)
    for EDGE in tl.static_range(2):
        low, high = (edge, stop) if EDGE else (start, edge)
        for key_start in tl.range(
            low, high, _step(LEARNED, EDGE, KEYS), num_stages=_stages(LEARNED, EDGE, STAGES)
        ):
            key = (key_start + tl.arange(0, _step(LEARNED, EDGE, KEYS)))[None, :]
            keys = _load_keys(k, b, kv_head, key_start, j_len, D, _step(LEARNED, EDGE, KEYS), EDGE)
            z = _scores(
                _dot(rows, tl.trans(keys)), query[:, None], head[:, None], key, slope[:, None], b, call,
                CAUSAL, EDGE,
            )  # fmt: skip
            higher = tl.maximum(highest, tl.max(z, 1))
            # A row that has seen nothing yet has no finite maximum.
            level = tl.where(higher == float("-inf"), 0.0, higher) * c if EDGE else higher * c
            p = tl.exp2(z * c - level[:, None])
            shrink = tl.exp2(highest * c - level)
            total = total * shrink + tl.sum(p, 1)
            if call.seed is not None:
                p = tl.where(_keep(query[:, None], head[:, None], key, b, call, G * R), p, 0.0)
            values = _load_keys(v, b, kv_head, key_start, j_len, D, _step(LEARNED, EDGE, KEYS), EDGE)
            acc = _dot(p.to(values.dtype), values, acc * shrink[:, None])
            highest = higher
    acc = acc / tl.where(total > 0, total * (1 - call.dropout_p), 1.0)[:, None]
    _store_rows(acc, out, split * (groups // G) + b, kv_head, tile, i_len, D, R, ROWS)
    lse = _row_data(lse, split * groups + group, tile, i_len, R, ROWS)
    tl.store(lse, highest * c + tl.log2(total), mask=query < i_len)


@triton.jit
def combine(
    parts, lse, out, whole_lse, i_len, splits, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One row of out and its lse from `splits` parts (splits * b * g, i * r, d)."""
    rows = tl.num_programs(0).to(tl.int64)
    program = tl.program_id(0).to(tl.int64)
    group, row = program // (i_len * R), program % (i_len * R)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, _width(D))
    at = split * rows + program
    part_lse = tl.load(lse + at, mask=split < splits, other=float("-inf"))
    highest = tl.max(part_lse)
    share = tl.exp2(part_lse - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(share)
    inside = (split < splits)[:, None] & (d < D)[None, :]
    part = tl.load(parts + at[:, None] * D + d[None, :], mask=inside, other=0.0)
    whole = tl.sum(part * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    head = group % G * R + row % R
    at_out = out.data + group // G * out.b + head * out.h + row // R * out.n + d
    tl.store(at_out, whole.to(out.data.dtype.element_ty), mask=d < D)
    tl.store(whole_lse + program, highest + tl.log2(total))


@triton.jit
def _load_lse(lse, inside):
    # Rows that may see nothing, and rows past the end: p = exp2(c z - inf) = 0.
    found = tl.load(lse, mask=inside, other=float("-inf"))
    return tl.where(found == float("-inf"), float("inf"), found)


@triton.jit
def backward_queries(
    q, k, v, out, lse, grad, dq, delta, band, call, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq and delta (b * g, i * r) of a block of rows, and, unless band is None, dz by distance:
    band (b * g, i * r, reach + 1), whose last column is the sum over the keys ahead."""
    bias, i_len, j_len, groups = call.bias, call.i_len, call.j_len, call.groups
    LEARNED: tl.constexpr = bias.offsets is not None
    program = tl.program_id(0)
    group = program % groups
    tile = (tl.num_programs(0) - 1 - program) // groups
    b, kv_head = group // G, group % G
    query, head = _rows_of(tile, kv_head, R, ROWS)
    start, edge, stop = _keys_seen(tile, b, call, R, CAUSAL, ROWS, KEYS)
    edge = tl.maximum(tl.minimum(edge, stop // KEYS * KEYS), start)

    inside = query < i_len
    rows = _load_rows(q, b, kv_head, tile, i_len, D, R, ROWS)
    d_rows = _load_rows(grad, b, kv_head, tile, i_len, D, R, ROWS)
    row_delta = tl.sum(
        _load_rows(out, b, kv_head, tile, i_len, D, R, ROWS).to(tl.float32) * d_rows.to(tl.float32), 1
    )
    tl.store(_row_data(delta, group, tile, i_len, R, ROWS), row_delta, mask=inside)
    row_lse = _load_lse(_row_data(lse, group, tile, i_len, R, ROWS), inside)
    if band is not None:
        band = _row_data(band, group, tile, i_len, R, ROWS, bias.reach + 1)
    slope = tl.zeros([ROWS], tl.float32)
    if bias.slopes is not None:
        slope = tl.load(bias.slopes + head)
    c = call.scale * LOG2_E
    acc = tl.zeros([ROWS, _width(D)], tl.float32)
    ahead = tl.zeros([ROWS], tl.float32)
    for EDGE in tl.static_range(2):
        low, high = (edge, stop) if EDGE else (start, edge)
        for key_start in tl.range(
            low, high, _step(LEARNED, EDGE, KEYS), num_stages=_stages(LEARNED, EDGE, STAGES)
        ):
            key = (key_start + tl.arange(0, _step(LEARNED, EDGE, KEYS)))[None, :]
            keys = _load_keys(k, b, kv_head, key_start, j_len, D, _step(LEARNED, EDGE, KEYS), EDGE)
            values = _load_keys(v, b, kv_head, key_start, j_len, D, _step(LEARNED, EDGE, KEYS), EDGE)
            z = _scores(
                _dot(rows, tl.trans(keys)), query[:, None], head[:, None], key, slope[:, None], b, call,
                CAUSAL, EDGE,
            )  # fmt: skip
            p = tl.exp2(z * c - row_lse[:, None])
            dp = _dot(d_rows, tl.trans(values))
            if call.seed is not None:
                keep = _keep(query[:, None], head[:, None], key, b, call, G * R)
                dp = tl.where(keep, dp / (1 - call.dropout_p), 0.0)
            dz = p * (dp - row_delta[:, None])
            if EDGE and band is not None:
                distance = query[:, None] + (j_len - i_len) - key
                near = inside[:, None] & (distance >= 0) & (distance < bias.reach)
                tl.store(band[:, None] + distance, dz, mask=near)
                if not CAUSAL:
                    ahead += tl.sum(tl.where(distance < 0, dz, 0.0), 1)
            acc = _dot(dz.to(keys.dtype), keys, acc)
    _store_rows(acc * call.scale, dq, b, kv_head, tile, i_len, D, R, ROWS)
    if band is not None and not CAUSAL:
        tl.store(band + bias.reach, ahead, mask=inside)


@triton.jit
def _sub_block(low, step, slices, PARTS: tl.constexpr):
    """The step-th of the blocks low, low + slices .., each in so many parts, in units of these."""
    return (low + step // PARTS * slices) * PARTS + step % PARTS


@triton.jit
def _add_rows(
    dk, dv, keys, values, key, q, lse, grad, delta, tile, group, call, G: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, with what a block of rows adds; dk is not yet scaled."""
    i_len = call.i_len
    b, kv_head = group // G, group % G
    query, head = _rows_of(tile, kv_head, R, ROWS)
    rows = _load_rows(q, b, kv_head, tile, i_len, D, R, ROWS)
    d_rows = _load_rows(grad, b, kv_head, tile, i_len, D, R, ROWS)
    row_lse = _load_lse(_row_data(lse, group, tile, i_len, R, ROWS), query < i_len)
    row_delta = tl.load(_row_data(delta, group, tile, i_len, R, ROWS), mask=query < i_len, other=0.0)
    slope = tl.zeros([ROWS], tl.float32)
    if call.bias.slopes is not None:
        slope = tl.load(call.bias.slopes + head)
    z = _dot(keys, tl.trans(rows))
    z = _scores(z, query[None, :], head[None, :], key[:, None], slope[None, :], b, call, CAUSAL, EDGE)
    p = tl.exp2(z * (call.scale * LOG2_E) - row_lse[None, :])
    dp = _dot(values, tl.trans(d_rows))
    dropped = p
    if call.seed is not None:
        keep = _keep(query[None, :], head[None, :], key[:, None], b, call, G * R)
        dropped = tl.where(keep, p / (1 - call.dropout_p), 0.0)
        dp = tl.where(keep, dp / (1 - call.dropout_p), 0.0)
    dv = _dot(dropped.to(d_rows.dtype), d_rows, dv)
    dz = p * (dp - row_delta[None, :])
    return _dot(dz.to(rows.dtype), rows, dk), dv


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
    inside_key = tl.minimum(key, j_len - 1)
    shift = j_len - i_len

    # Blocks of rows [start, stop), those before edge in edge blocks.
    start, stop = 0, i_len
    if CAUSAL:
        start = tl.maximum(key_start - shift, 0)
    if mask.ids is not None:
        ids_at = tl.cast(b, tl.int64) * j_len + inside_key
        start = tl.maximum(start, tl.min(tl.load(mask.first + ids_at)))
        stop = tl.max(tl.load(mask.last + ids_at)) + 1
    if mask.keys is not None or mask.ids is not None:
        edge = stop
    elif CAUSAL or bias.offsets is not None:
        edge = tl.minimum(tl.maximum(key_start + KEYS - 1 + bias.reach - shift, 0), stop)
    else:
        edge = start  # keys past the end go astray by themselves, and are not stored
    start = start * R // ROWS + part
    stop = tl.cdiv(stop * R, ROWS)
    edge = start + tl.cdiv(tl.maximum(tl.cdiv(edge * R, ROWS) - start, 0), slices) * slices

    keys = _load_keys(k, b, kv_head, key_start, j_len, D, KEYS, True)
    values = _load_keys(v, b, kv_head, key_start, j_len, D, KEYS, True)
    dk_acc = tl.zeros([KEYS, _width(D)], tl.float32)
    dv_acc = tl.zeros([KEYS, _width(D)], tl.float32)
    for PLAIN in tl.static_range(2):
        low, high = (edge, stop) if PLAIN else (start, tl.minimum(edge, stop))
        steps = tl.cdiv(tl.maximum(high - low, 0), slices) * (ROWS // _step(LEARNED, not PLAIN, ROWS))
        for step in tl.range(0, steps, num_stages=_stages(LEARNED, not PLAIN, STAGES)):
            tile = _sub_block(low, step, slices, ROWS // _step(LEARNED, not PLAIN, ROWS))
            dk_acc, dv_acc = _add_rows(
                dk_acc, dv_acc, keys, values, key, q, lse, grad, delta, tile, group, call,
                G, R, D, CAUSAL, _step(LEARNED, not PLAIN, ROWS), not PLAIN,
            )  # fmt: skip
    b_out, block = part * (groups // G) + b, key_start // KEYS
    _store_rows(dk_acc * call.scale, dk, b_out, kv_head, block, j_len, D, 1, KEYS)
    _store_rows(dv_acc, dv, b_out, kv_head, block, j_len, D, 1, KEYS)


class Blocks(NamedTuple):
    """How the kernels are launched; `decode` is `forward` for a few rows."""

    forward: Launch
    decode: Launch
    queries: Launch
    keys: Launch


# For heads of up to so many dims. Chosen among what compiles without a spilled register, as
# benchmarks/kernels.py shows: the largest blocks, then more warps. `AMPERE` also fits the 99 KB of shared
# memory of compute capability 8.6, 8.9 and 12.x.
AMPERE = {
    64: Blocks(Launch(128, 64, 8, 3), Launch(16, 128, 4, 3), Launch(128, 64, 8, 3), Launch(64, 128, 8, 3)),
    128: Blocks(Launch(128, 32, 8, 3), Launch(16, 64, 4, 3), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2)),
    256: Blocks(Launch(64, 32, 8, 2), Launch(16, 64, 4, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 2)),
}
HOPPER = {
    64: Blocks(Launch(128, 64, 8, 3), Launch(16, 128, 4, 3), Launch(128, 64, 8, 3), Launch(64, 128, 8, 3)),
    # Padded, with masks that take registers.
    127: Blocks(Launch(128, 64, 8, 3), Launch(16, 128, 4, 3), Launch(128, 64, 8, 2), Launch(32, 64, 8, 2)),
    128: Blocks(Launch(128, 64, 8, 3), Launch(16, 128, 4, 3), Launch(128, 64, 8, 2), Launch(64, 64, 8, 2)),
    256: Blocks(Launch(128, 32, 8, 2), Launch(16, 64, 4, 2), Launch(64, 32, 8, 2), Launch(64, 32, 8, 1)),
}
BLACKWELL = HOPPER | {
    64: HOPPER[64]._replace(keys=Launch(128, 64, 4, 2)),
    256: HOPPER[256]._replace(keys=Launch(64, 64, 8, 1)),
}
# On any of them, and not tuned: 80 and 256 dims spill some 40 to 500 bytes a thread.
FLOAT32 = {
    64: Blocks(Launch(32, 32, 4, 2), Launch(16, 64, 4, 2), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1)),
    128: Blocks(Launch(32, 32, 8, 1), Launch(16, 32, 4, 2), Launch(16, 32, 4, 1), Launch(16, 16, 4, 1)),
    256: Blocks(Launch(16, 16, 8, 1), Launch(16, 16, 8, 1), Launch(16, 16, 8, 1), Launch(16, 16, 8, 1)),
}


def blocks(dim_head: int, element_size: int, capability: tuple[int, int], biased: bool) -> Blocks:
    """The blocks for a head dim, the bytes of a number, a GPU's compute capability, and a bias or none."""
    if element_size == 4:
        table = FLOAT32
    elif capability[0] in (9, 10):
        table = HOPPER if capability[0] == 9 else BLACKWELL
    else:
        table = AMPERE
    width = next(width for width in table if dim_head <= width)
    if biased and width == 256 and element_size == 2:  # a bias needs the registers
        return table[width]._replace(queries=AMPERE[width].queries)
    return table[width]
