"""Blocks of keys and blocks of rows: where they lie in memory, loaded, stored and multiplied."""

from __future__ import annotations

import triton
import triton.language as tl

# Under Triton's interpreter (TRITON_INTERPRET=1 when triton is first imported) the kernels run on the CPU.
INTERPRETED = tl.constexpr(not isinstance(tl.cdiv, triton.JITFunction))


@triton.jit
def dot(a, b, acc=None):
    if INTERPRETED:  # it would multiply bfloat16's bits as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    # For float32: three tf32 products, nearly float32's precision at a third of tf32's rate.
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def apart(acc, length):
    """The same sums as new numbers, by adding a zero that the compiler cannot know. If one loop goes on with
    another's, ptxas takes the hand-over for a hazard and waits for every single product, which takes a tenth
    to a third longer on an H200. (Its machine code has then as many WARPGROUP.DEPBAR as HGMMA.)"""
    return acc + (length >> 31).to(tl.float32)


@triton.constexpr_function
def width(d):
    """Blocks are a power of two wide, and no product is narrower than 16."""
    return max(16, triton.next_power_of_2(d))


@triton.jit
def load_keys(view, b, h, start, j_len, D: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr):
    """Positions start .. start + KEYS of a head, (KEYS, D to a power of two), zeros past either end."""
    WIDTH: tl.constexpr = width(D)
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
def rows_of(tile, kv_head, R: tl.constexpr, ROWS: tl.constexpr):
    """Query and head of each row of a block."""
    row = tile * ROWS + tl.arange(0, ROWS)
    return row // R, kv_head * R + row % R


@triton.jit
def _row_pointers(view, b, kv_head, tile, i_len, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr):
    """Where a view has a block of rows, (ROWS, width), and which of that is there."""
    query, head = rows_of(tile, 0, R, ROWS)
    d = tl.arange(0, width(D))
    first = tile * ROWS // R
    at = (
        tl.cast(b, tl.int64) * view.b
        + tl.cast(kv_head, tl.int64) * R * view.h
        + tl.cast(first, tl.int64) * view.n
    )
    pointers = view.data + at + ((query - first) * view.n + head * view.h)[:, None] + d[None, :]
    return pointers, (query < i_len)[:, None] & (d < D)[None, :]


@triton.jit
def load_rows(view, b, kv_head, tile, i_len, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr):
    """A block of rows, zeros past either end."""
    pointers, inside = _row_pointers(view, b, kv_head, tile, i_len, D, R, ROWS)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_rows(rows, view, b, kv_head, tile, i_len, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr):
    pointers, inside = _row_pointers(view, b, kv_head, tile, i_len, D, R, ROWS)
    tl.store(pointers, rows.to(view.data.dtype.element_ty), mask=inside)


@triton.jit
def row_data(data, group, tile, i_len, R: tl.constexpr, ROWS: tl.constexpr):
    """Where a tensor (b * g, i * r) has the number of each row of a block."""
    return data + (tl.cast(group, tl.int64) * (i_len * R) + tile * ROWS) + tl.arange(0, ROWS)
