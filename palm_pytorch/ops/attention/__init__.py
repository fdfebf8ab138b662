"""`attention()`: one definition, several backends that agree with it.

Shapes: b batch; h query heads; g key/value heads; i, j query and key length; d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from palm_pytorch.ops.arguments import expect_floating, expect_mask, expect_number, expect_tensor
from palm_pytorch.ops.attention.bias import AlibiBias, Bias, RelativeBias
from palm_pytorch.ops.attention.blockwise import blockwise
from palm_pytorch.ops.attention.reference import reference
from palm_pytorch.ops.attention.torch_backends import flex, sdpa
from palm_pytorch.ops.autocast import product_dtype
from palm_pytorch.ops.derivatives import transformed

__all__ = ["BACKENDS", "AlibiBias", "RelativeBias", "attention"]

TRITON_INSTALLED = find_spec("triton") is not None


def triton(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The kernels of `triton_kernels`, imported when they are first called for."""
    try:
        from palm_pytorch.ops.attention.triton_op import triton_attention
    except ImportError as error:
        raise ValueError(
            f"backend 'triton': triton cannot be used here ({error}); backend 'sdpa' can"
        ) from error
    return triton_attention(q, k, v, **options)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference,
    "sdpa": sdpa,
    "blockwise": blockwise,
    "flex": flex,
    "triton": triton,
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    bias: Bias | None = None,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scaled dot-product attention, `softmax(scale * q k^T + bias) v`, with grouped or a single key/value
    head.

    q: (b, h, i, d).  k, v: (b, g, j, d), g dividing h; query head number x uses key/value head
    `x // (h / g)`.
    causal: aligned to the end: query i sees keys `<= i + j_len - i_len`.
    bias: `AlibiBias` or `RelativeBias`, of the distance between query and key under that alignment.
    key_mask: (b, j) bool, True where a key may be attended to.
    document_ids: (b, j) integers; attention stays inside a document. The queries, no more than there are
    keys, are the last i of these positions, with causal or without.
    dropout_p: share of the attention weights dropped, in [0, 1); the caller passes 0 outside training.
    scale: factor on the scores, above 0; `d ** -0.5` if None.
    backend: "auto", or one of `BACKENDS`. "auto" is "blockwise" on a CPU, "triton" on a CUDA device where it
    can serve the call, and else "sdpa"; inside the transforms of `torch.func` it is "reference", whose memory
    is quadratic.

    Returns (b, h, i, d) in the dtype of q. A query that may see no key gives zeros. Softmax is in float32
    or better.
    Under autocast q, k and v are cast as for a matrix product.

    Raises ValueError or TypeError naming the argument that does not fit.
    """
    _check(q, k, v, bias, key_mask, document_ids, dropout_p, scale)
    check_backend(backend)
    q, k, v = (t.to(product_dtype(t)) for t in (q, k, v))
    if backend == "auto":
        backend = "reference" if transformed() else _fastest(q)
        if bias is not None and bias.at is not None and (torch.is_grad_enabled() or dropout_p > 0):
            backend = "sdpa"
    elif backend in ("blockwise", "triton") and transformed():
        raise ValueError(
            f"backend {backend!r}: its derivatives are hand-written, and no transform of torch.func was "
            "expected; 'reference' can"
        )
    return BACKENDS[backend](
        q,
        k,
        v,
        causal=causal,
        bias=bias,
        key_mask=key_mask,
        document_ids=document_ids,
        dropout_p=dropout_p,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )


def _fastest(q: Tensor) -> str:
    if q.device.type == "cpu":
        return "blockwise"
    if q.device.type == "cuda" and TRITON_INSTALLED:
        try:
            from palm_pytorch.ops.attention.triton_op import refusal
        except ImportError:  # an unsupported release
            return "sdpa"
        if refusal(q) is None:
            return "triton"
    return "sdpa"


def check_backend(backend: str, name: str = "backend") -> None:
    """Raises ValueError, naming the argument, unless `attention` knows the backend."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"{name}: expected 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Bias | None,
    key_mask: Tensor | None,
    document_ids: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        expect_floating(name, tensor)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"q, k: expected (batch, heads, length, dim_head), got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    (b, h, i_len, d), (g, j_len) = q.shape, k.shape[1:3]
    if k.shape != v.shape:
        raise ValueError(f"v: expected the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[0] != b or k.shape[3] != d:
        raise ValueError(
            f"k: expected batch {b} and dim_head {d} as in q {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q, k: expected no empty dimension, got {tuple(q.shape)} and {tuple(k.shape)}")
    if h % g:
        raise ValueError(f"k: expected a number of heads that divides the {h} of q, got {g}")
    for name, tensor in (("k", k), ("v", v)):
        if product_dtype(tensor) != product_dtype(q):
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {tensor.dtype}")
    named = {"k": k, "v": v, "key_mask": key_mask, "document_ids": document_ids}
    if bias is not None:
        if not isinstance(bias, (AlibiBias, RelativeBias)):  # a tuple as in `expect_number`
            raise TypeError(f"bias: expected AlibiBias or RelativeBias, got {type(bias).__name__}")
        if bias.per_head.shape[0] != h:
            raise ValueError(f"bias: expected one for each of {h} heads, got {bias.per_head.shape[0]}")
        if bias.at is not None and (i_len > 1 or document_ids is not None):
            given = f"{i_len} of them" if i_len > 1 else "document_ids"
            raise ValueError(f"bias: `at` is for a single query without document_ids, got {given}")
        named["bias"] = bias.per_head
    if key_mask is not None:
        expect_mask("key_mask", key_mask, (b, j_len))
    if document_ids is not None:
        expect_tensor("document_ids", document_ids)
        if document_ids.is_floating_point() or document_ids.dtype == torch.bool:
            raise TypeError(f"document_ids: expected integers, got {document_ids.dtype}")
        if i_len > j_len or document_ids.shape != (b, j_len):
            raise ValueError(
                f"document_ids: expected shape {(b, j_len)} and no more queries than keys, "
                f"got {tuple(document_ids.shape)} for {i_len} queries and {j_len} keys"
            )
    for name, argument in named.items():
        if argument is not None and argument.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {argument.device}")
    expect_number("dropout_p", dropout_p, least=0, below=1)
    if scale is not None:
        expect_number("scale", scale, above=0)
