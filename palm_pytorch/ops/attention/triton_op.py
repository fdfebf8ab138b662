"""Attention through the kernels of `triton_kernels`, as custom ops that autograd, `torch.compile` and
activation checkpointing know by name. Autocast is settled before, in `attention`.

Shapes: q (b, h, i, d); k, v (b, g, j, d) with g dividing h; out (b, h, i, d);
lse (b * g, i * r), a number a row, the r = h / g query heads of a key/value head side by side.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import triton
from torch import Tensor

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
    raise ImportError(f"expected triton 3.6 or newer, got {triton.__version__}")

from palm_pytorch.ops.attention.bias import AlibiBias, Bias, RelativeBias
from palm_pytorch.ops.attention.triton_kernels.launch import (
    document_spans,
    empty_like,
    run_backward,
    run_forward,
)
from palm_pytorch.ops.attention.triton_kernels.tiles import INTERPRETED

# The kernels take any strides, and what they give has its own. By default a compiler would copy the part of a
# cache that they are shown, which looks packed to it once it is written to.
ANY_LAYOUT = (torch.Tag.flexible_layout,)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_DIM_HEAD = 256


def cannot_launch() -> str | None:
    """Why this machine's Triton cannot run anything on its GPU, or None. It builds what launches kernels with
    a C compiler and Python's headers, which a container need not have."""
    if INTERPRETED or not torch.cuda.is_available():
        return None
    try:
        return None if triton.runtime.driver.active else "no driver"
    except Exception as error:  # of any kind, by what is missing
        return str(error).strip().partition("\n")[0] or type(error).__name__


CANNOT_LAUNCH = cannot_launch()
if CANNOT_LAUNCH is not None:
    warnings.warn(f"attention does without its kernels, and is slower: {CANNOT_LAUNCH}", stacklevel=2)


def refusal(q: Tensor) -> str | None:
    """Why the kernels cannot serve these queries, or None."""
    if q.device.type == "cuda":
        if CANNOT_LAUNCH is not None:
            return f"q: expected a GPU for which Triton can compile ({CANNOT_LAUNCH})"
        if torch.version.hip or torch.cuda.get_device_properties(q.device).major < 8:
            return "q: expected an NVIDIA GPU of compute capability 8.0 or newer"
    elif not (INTERPRETED and q.device.type == "cpu"):
        return f"q: expected a CUDA tensor (or TRITON_INTERPRET=1 and a CPU tensor), got one on {q.device}"
    if q.dtype not in DTYPES:
        return f"q: expected float16, bfloat16 or float32, got {q.dtype}"
    if q.shape[-1] > MAX_DIM_HEAD:
        return f"q: expected a dim_head of at most {MAX_DIM_HEAD}, got {q.shape[-1]}"
    return None


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    bias: Bias | None,
    key_mask: Tensor | None,
    document_ids: Tensor | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """Every argument of the contract in memory linear in the sequence, and the same bits each time."""
    reason = refusal(q)
    if reason is not None:
        raise ValueError(f"backend 'triton': {reason}; backend 'sdpa' can")
    at = None if bias is None else bias.at
    if at is not None and torch.is_grad_enabled():
        raise ValueError("backend 'triton': bias: expected `at` to be None with gradients; 'sdpa' can")
    slopes = bias.slopes.float() if isinstance(bias, AlibiBias) else None
    offsets = bias.offsets(k.shape[2]).float() if isinstance(bias, RelativeBias) else None
    # Here and not in the op: backward has them from forward, and compiled code the layers from the first.
    documents = None if document_ids is None else document_spans(document_ids)
    # Drawn on the device, where the kernels read it: no wait, and checkpointing draws the same again.
    seed = torch.randint(1 << 62, (1,), device=q.device) if dropout_p > 0 else None
    out, _ = _attention(
        q, k, v, slopes, offsets, key_mask, documents, seed, at, causal, float(scale), float(dropout_p)
    )
    return out


@torch.library.custom_op("palm_pytorch::attention", mutates_args=(), tags=ANY_LAYOUT)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    documents: Tensor | None,
    seed: Tensor | None,
    at: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    return run_forward(q, k, v, slopes, offsets, key_mask, documents, seed, at, causal, scale, dropout_p)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    (b, h, i_len, _), g = q.shape, k.shape[1]
    return empty_like(q), q.new_empty(b * g, i_len * (h // g), dtype=torch.float32)


@torch.library.custom_op("palm_pytorch::attention_backward", mutates_args=(), tags=ANY_LAYOUT)
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets_grad: bool,
    slopes: Tensor | None,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    documents: Tensor | None,
    seed: Tensor | None,
    at: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (slopes, offsets, key_mask, documents, seed, at, causal, scale, dropout_p)
    return run_backward(grad, q, k, v, out, lse, offsets_grad, *options)


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, offsets_grad, _, offsets, *_ = others
    return (
        empty_like(q),
        empty_like(k),
        empty_like(v),
        offsets.new_empty(offsets.shape) if offsets_grad else q.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *tensors, causal, scale, dropout_p = inputs
    ctx.save_for_backward(q, k, v, *output, *tensors)
    ctx.options = (causal, scale, dropout_p)
    ctx.set_materialize_grads(False)  # nobody asks for the gradient of lse


def _gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    offsets_grad = ctx.needs_input_grad[4]
    dq, dk, dv, d_offsets = _attention_backward(grad, q, k, v, out, lse, offsets_grad, *tensors, *ctx.options)
    return dq, dk, dv, None, d_offsets if offsets_grad else None, *[None] * 7


_attention.register_autograd(_gradients, setup_context=_save)
