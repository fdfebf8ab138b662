"""What every kernel is told, in tuples that Triton takes as they are."""

from __future__ import annotations

from typing import Any, NamedTuple


class View(NamedTuple):
    """A tensor (b, heads, positions, d) and its strides; d is packed."""

    data: Any
    b: int
    h: int
    n: int


class Bias(NamedTuple):
    """What is added to z. Either or both may be None.

    slopes: (h,), ALiBi's, over scale.
    offsets: (reach + 1, h), over scale, of the keys at distance 0, 1 .. reach; keys further behind get the
    last, which is 0, and keys ahead the first.
    """

    slopes: Any
    offsets: Any
    reach: int


class Mask(NamedTuple):
    """keys: (b, j), nonzero where visible.  ids: (b, j) documents, with the first and the last position,
    (b, j), that has the same id. Each may be None.
    """

    keys: Any
    ids: Any
    first: Any
    last: Any


class Call(NamedTuple):
    """What is the same in every block. seed: one int64, or None for no dropout.  at: (1,), which key the last
    query is at, or None for the last of them.
    """

    bias: Bias
    mask: Mask
    seed: Any
    at: Any
    dropout_p: float
    scale: float
    i_len: int
    j_len: int
    groups: int
