"""What makes scores of products: bias, mask and dropout; and which keys a block of rows meets at all."""

from __future__ import annotations

import triton
import triton.language as tl

from palm_pytorch.ops.attention.triton_kernels.tiles import dot

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def pipeline_stages(learned, edge, stages):
    """Pipeline stages of a loop. To look up a learned bias takes registers, for a few blocks a row: these are
    not pipelined, and go in smaller steps."""
    return 1 if edge and learned else stages


@triton.constexpr_function
def step_of(learned, edge, size):
    """How much of a block a loop takes at a time."""
    return max(16, size // 2) if edge and learned else size


@triton.jit
def shift_of(call):
    """The position of the first query among the keys."""
    shift = call.j_len - call.i_len
    if call.at is not None:
        shift = tl.load(call.at).to(tl.int32) + 1 - call.i_len
    return shift


@triton.jit
def keys_seen(
    tile, b, call, R: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """start <= edge, and stop: a block of rows may see the keys from start to stop, those up to edge in plain
    blocks.
    """
    bias, mask, j_len = call.bias, call.mask, call.j_len
    query = tl.minimum((tile * ROWS + tl.arange(0, ROWS)) // R, call.i_len - 1)
    shift = shift_of(call)
    start, stop = 0, j_len
    if CAUSAL:
        stop = tl.maximum(tl.max(query) + shift + 1, 0)
    if mask.ids is not None:
        at = tl.cast(b, tl.int64) * j_len + query + shift
        start = tl.min(tl.load(mask.first + at)) // KEYS * KEYS
        stop = tl.minimum(stop, tl.max(tl.load(mask.last + at)) + 1)
    if CAUSAL or bias.offsets is not None:
        edge = tl.maximum(tl.min(query) + shift + 1 - bias.reach, 0) // KEYS * KEYS
    else:
        edge = j_len // KEYS * KEYS
    return start, tl.maximum(tl.minimum(edge, stop // KEYS * KEYS), start), stop


@triton.jit
def lift_of(query, slope, first_key, call, CAUSAL: tl.constexpr):
    """What ALiBi adds to a row's z at a block's first key. Being the same along the row, it goes into the
    level that softmax measures from: `add_bias` adds what differs from it."""
    if call.bias.slopes is not None and CAUSAL:
        return slope * (first_key - query - shift_of(call)).to(tl.float32)  # exact, up to 2^24
    return tl.zeros_like(slope)


@triton.jit
def tilt_of(slope, TILTED: tl.constexpr):
    """Features (rows, 16) whose product with places 0 .. 255 is slope * place: three parts of slope that
    bfloat16 holds, and zeros."""
    tilt = slope
    if TILTED:
        high = slope.to(tl.bfloat16).to(tl.float32)
        middle = (slope - high).to(tl.bfloat16).to(tl.float32)
        low = slope - high - middle
        part = tl.arange(0, 16)[None, :]
        some = tl.where(part == 1, middle[:, None], tl.where(part == 2, low[:, None], 0.0))
        tilt = tl.where(part == 0, high[:, None], some).to(tl.bfloat16)
    return tilt


@triton.jit
def products(rows, keys, tilt, place, TILTED: tl.constexpr):
    """q k^T of a block of rows and a block of keys at places (1, keys), with what ALiBi adds if TILTED."""
    if TILTED:
        places = (tl.zeros([16, 1], tl.int32) + place).to(tl.float32).to(tl.bfloat16)
        z = dot(rows, tl.trans(keys), dot(tilt, places))
    else:
        z = dot(rows, tl.trans(keys))
    return z


@triton.jit
def add_bias(
    z, query, head, place, first_key, slope, call, H: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
    TILTED: tl.constexpr,
):  # fmt: skip
    """Adds to products what is not in them of the bias, less `lift_of`, and hides the keys ahead. query,
    head, slope and place, of a key in its block, are shaped to broadcast against z."""
    bias = call.bias
    position = query + (shift_of(call) - first_key)
    if bias.slopes is not None and not TILTED:
        if CAUSAL:
            # As a sum of its own it would become what the product starts from, and take registers.
            z = tl.fma(slope, place.to(tl.float32), z)
        else:
            z -= slope * tl.abs(position - place).to(tl.float32)
    if EDGE:
        distance = position - place
        if bias.offsets is not None:
            at = tl.minimum(tl.maximum(distance, 0), bias.reach) * H + head
            z += tl.load(bias.offsets + at)
        visible = first_key + place < call.j_len
        if CAUSAL:
            visible = visible & (distance >= 0)
        z = tl.where(visible, z, float("-inf"))
    return z


@triton.jit
def documents_of(query, b, call):
    """The documents of queries, or anything where there are none."""
    document = query
    if call.mask.ids is not None:
        position = tl.minimum(query, call.i_len - 1) + shift_of(call)
        document = tl.load(call.mask.ids + tl.cast(b, tl.int64) * call.j_len + position)
    return document


@triton.jit
def hide_masked(z, document, key, b, call):
    """Hides from rows of these documents, (ROWS, 1), what key mask and documents hide of keys (1, KEYS)."""
    mask = call.mask
    at = tl.cast(b, tl.int64) * call.j_len + key
    if mask.keys is not None:
        seen = tl.load(mask.keys + at, mask=key < call.j_len, other=0)
        z = tl.where(seen != 0, z, float("-inf"))
    if mask.ids is not None:
        z = tl.where(document == tl.load(mask.ids + at, mask=key < call.j_len, other=-1), z, float("-inf"))
    return z


@triton.jit
def kept_by_dropout(query, head, key, b, call, H: tl.constexpr):
    """Which weights dropout leaves."""
    zero = query * 0 + key * 0
    bits, _, _, _ = tl.philox(tl.load(call.seed), key + zero, query + zero, b * H + head + zero, zero)
    return tl.uint_to_uniform_float(bits) >= call.dropout_p
