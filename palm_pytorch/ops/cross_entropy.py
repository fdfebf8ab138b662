"""Cross-entropy of a linear layer's outputs without ever holding all of them.

Shapes: t positions (any leading shape, flattened); c model width; v number of tokens.

Per chunk of positions, with z = hidden weight^T + bias:
    loss  = logsumexp(z) - z[label]                        (+ z_loss * logsumexp(z)^2, PaLM section 5)
    dz    = softmax(z) * (1 + 2 z_loss logsumexp(z)) - onehot(label)
    dhidden = dz weight;   dweight += dz^T hidden;   dbias += sum(dz)
The gradient is taken while the chunk's logits are at hand, so backward only scales it: no logits are
computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_pytorch.ops.arguments import expect_floating, expect_integer, expect_number, expect_tensor, readable
from palm_pytorch.ops.autocast import no_autocast, product_dtype
from palm_pytorch.ops.derivatives import first_derivative_only, transformed

# Logits held at a time: 64 MB in float32, plus as much for their gradient.
MAX_LOGITS = 1 << 24


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Mean cross-entropy in nats of `softmax(hidden @ weight.T + bias)` over the labels that count; a
    float32 scalar (float64 for float64 input).

    hidden: (..., c).  weight: (v, c).  bias: (v,) or None.
    labels: (...) integers in [0, v), or `ignore_index` where a position does not count.
    z_loss: weight of `logsumexp(logits)^2`, added to the loss of each position (PaLM, arXiv 2204.02311,
    section 5).
    chunk_tokens: positions whose logits are held at a time; None keeps them under 64 MB in float32.

    Products run in the autocast dtype where autocast is on, else in the dtype of hidden; softmax and sums
    in float32 or better. Where no label counts the loss is 0 and so are its gradients.

    Raises ValueError or TypeError naming the argument that does not fit.
    """
    _check(hidden, weight, labels, bias, ignore_index, z_loss, chunk_tokens)
    if transformed():
        return cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index, z_loss)
    if chunk_tokens is None:
        chunk_tokens = max(1, MAX_LOGITS // weight.shape[0])
    # Inside a Function gradients look wanted even where they are switched off.
    settings = (ignore_index, z_loss, chunk_tokens, product_dtype(hidden), torch.is_grad_enabled())
    inputs = (hidden.flatten(0, -2), weight, bias, labels.flatten().long())
    with no_autocast(hidden.device):  # which would cast anew what is computed in another dtype on purpose
        return _LinearCrossEntropy.apply(*inputs, settings)


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int, z_loss: float) -> Tensor:
    """The definition: as `linear_cross_entropy`, of all logits (..., v) at once."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = labels != ignore_index
    log_z = logits.logsumexp(dim=-1)
    label = logits.gather(-1, labels.long().where(counts, 0)[..., None])[..., 0]
    loss = (log_z - label + z_loss * log_z**2).masked_fill(~counts, 0)
    return loss.sum() / counts.sum().clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        settings: tuple[int, float, int, torch.dtype, bool],
    ) -> Tensor:
        ignore_index, z_loss, chunk_tokens, dtype, grads = settings
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = (grads and needed for needed in ctx.needs_input_grad[:3])
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs_bias else None

        counts = labels != ignore_index
        weight_cast = weight.to(dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        # A loop, if it is none, has a compiler take the number of positions for fixed.
        starts = [0] if len(hidden) <= chunk_tokens else range(0, len(hidden), chunk_tokens)
        for start in starts:
            rows = slice(start, start + chunk_tokens)
            hidden_cast = hidden[rows].to(dtype)
            logits = (hidden_cast @ weight_cast.T).to(wide)
            if bias is not None:
                logits += bias
            label = labels[rows].where(counts[rows], 0)[:, None]
            count = counts[rows, None]
            log_z = logits.logsumexp(dim=-1, keepdim=True)
            # The loss of what does not count may be no number.
            loss = log_z - logits.gather(1, label) + z_loss * log_z**2
            total += loss.masked_fill(~count, 0).sum()

            if not (needs_hidden or needs_weight or needs_bias):
                continue
            d_logits = logits.sub_(log_z).exp_().mul_((1 + 2 * z_loss * log_z) * count)
            d_logits.scatter_add_(1, label, -count.to(wide))
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            if d_weight is not None:
                # A sum over positions may leave float16's range.
                inner = wide if dtype == torch.float16 else dtype
                d_weight += d_logits.T.to(inner) @ hidden_cast.to(inner)
            if d_hidden is not None:
                d_hidden[rows] = d_logits.to(dtype) @ weight_cast
        # Gradients are kept as those of the sum: the mean's may be too small for a half precision.
        per_label = 1 / counts.sum().clamp(min=1).to(wide)
        ctx.save_for_backward(d_hidden, d_weight, d_bias, per_label)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total * per_label

    @staticmethod
    @first_derivative_only("linear_cross_entropy", "torch's cross_entropy of a model's logits")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias, per_label = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        factor = grad * per_label
        return (
            None if d_hidden is None else d_hidden * factor,
            None if d_weight is None else (d_weight * factor).to(weight_dtype),
            None if d_bias is None else (d_bias * factor).to(bias_dtype),
            None,
            None,
        )


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    z_loss: float,
    chunk_tokens: int | None,
) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        expect_floating(name, tensor)
    if bias is not None:
        expect_floating("bias", bias)
    expect_tensor("labels", labels)
    expect_integer("ignore_index", ignore_index, least=-(2**63))
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden, weight: expected (..., c) and (v, c), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}")
    if labels.dtype not in (torch.long, torch.int):
        raise TypeError(f"labels: expected torch.long or torch.int, got {labels.dtype}")
    for name, argument in {"weight": weight, "bias": bias, "labels": labels}.items():
        if argument is not None and argument.device != hidden.device:
            raise ValueError(f"{name}: expected the device of hidden, {hidden.device}, got {argument.device}")
    expect_number("z_loss", z_loss, least=0)
    if chunk_tokens is not None:
        expect_integer("chunk_tokens", chunk_tokens)
    if readable(labels) and labels.numel():
        counted = labels[labels != ignore_index]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < weight.shape[0]:
            raise ValueError(
                f"labels: expected values in [0, {weight.shape[0]}) or ignore_index={ignore_index}, "
                f"got values from {int(counted.min())} to {int(counted.max())}"
            )
