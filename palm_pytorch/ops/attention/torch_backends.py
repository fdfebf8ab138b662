"""Attention through torch's own fused kernels: `sdpa` and `flex`.

Shapes: q (b, h, i, d); k, v (b, g, j, d) with g dividing h; f extra features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_pytorch.ops.attention.bias import AlibiBias, Bias, RelativeBias, alibi_features
from palm_pytorch.ops.attention.reference import visible_keys

# ALiBi as a feature rounds scores at the size of the largest `slope * position`, so it is served in pieces of
# this many queries, each measuring positions from its own end: float32 so that rounding does not show, half
# precisions so that float16 has a number for it.
ALIBI_QUERIES = 256
ALIBI_QUERIES_HALF = 4096
# Below this scale float16 has no number for `slope / scale` and its digits.
ALIBI_LEAST_SCALE = 2**-6


def sdpa(
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
    """`torch.nn.functional.scaled_dot_product_attention`: no mask tensor where plain causal attention is
    asked for, none with a head dimension unless the bias is learned, and the key/value head never expanded
    in memory."""
    (i_len, d), j_len = q.shape[-2:], k.shape[2]

    in_range = q.dtype != torch.float16 or scale >= ALIBI_LEAST_SCALE
    if causal and isinstance(bias, AlibiBias) and bias.at is None and in_range:
        if i_len > _alibi_queries(q.dtype, scale):
            return _in_pieces(q, k, v, key_mask, document_ids, bias=bias, dropout_p=dropout_p, scale=scale)
        q, k, v = _carry_alibi(q, k, v, bias, scale)
        bias = None

    mask, blind, is_causal = None, None, False
    if causal and i_len == j_len and bias is None and key_mask is None and document_ids is None:
        # Not the condition itself: in compiled code lengths may be symbols, and what compares them no bool.
        is_causal = True
    else:
        mask = visible_keys(
            i_len, j_len, causal=causal, key_mask=key_mask, document_ids=document_ids, device=q.device
        )
        if mask is not None:
            # The kernels differ in what they make of a row that may see nothing: it sees all, and is cleared.
            blind = ~mask.any(dim=-1, keepdim=True)
            mask = mask | blind
        if bias is not None:
            if isinstance(bias, RelativeBias) and bias.at is None:
                values = bias.windows(i_len, j_len)
            else:
                values = bias.values(i_len, j_len)
            values = values[None] if mask is None else values.masked_fill(~mask, float("-inf"))
            if values.dtype.itemsize > q.dtype.itemsize:
                # Softmax ignores what a row has in common, and rounding is finest near zero.
                values = values - values.detach().amax(dim=-1, keepdim=True)
            mask = values.to(q.dtype)

    if k.shape[1] == 1:
        k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=k.shape[1] != q.shape[1],
    )
    return (out if blind is None else out.masked_fill(blind, 0.0))[..., :d]


def _alibi_queries(dtype: torch.dtype, scale: float) -> int:
    if dtype == torch.float16:  # `slope * queries / scale` stays in its range
        return min(ALIBI_QUERIES_HALF, int(2**15 * scale))
    return ALIBI_QUERIES if dtype.itemsize >= 4 else ALIBI_QUERIES_HALF


def _in_pieces(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, document_ids: Tensor | None, **options: Any
) -> Tensor:
    """Causal attention, some queries at a time."""
    pieces: list[Tensor] = []
    for rows in q.split(_alibi_queries(q.dtype, options["scale"]), dim=2):
        done = sum(piece.shape[2] for piece in pieces)
        seen = k.shape[2] - q.shape[2] + done + rows.shape[2]
        if seen <= 0:
            pieces.append(torch.zeros_like(rows))
            continue
        mask, ids = (None if t is None else t[:, :seen] for t in (key_mask, document_ids))
        pieces.append(
            sdpa(
                rows, k[:, :, :seen], v[:, :, :seen], causal=True, key_mask=mask, document_ids=ids, **options
            )
        )
    return torch.cat(pieces, dim=2)


def _carry_alibi(
    q: Tensor, k: Tensor, v: Tensor, bias: AlibiBias, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with ALiBi in extra features (zeros in v, since the fused kernels want one width, in
    eights).
    """
    queries, keys = (torch.arange(1 - t.shape[2], 1, device=t.device) for t in (q, k))
    slopes = bias.slopes.to(torch.promote_types(q.dtype, torch.float32)) / scale
    query, key = alibi_features(slopes, queries, keys, q.dtype)
    padding = -(q.shape[-1] + key.shape[-1]) % 8
    query, key = (F.pad(t, (0, padding)) for t in (query.transpose(0, 1), key))
    q = torch.cat([q, query.expand(q.shape[0], -1, -1, -1)], dim=-1)
    k = torch.cat([k, key.expand(*k.shape[:2], -1, -1)], dim=-1)
    return q, k, F.pad(v, (0, key.shape[-1]))


def flex(
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
    """`torch.nn.attention.flex_attention`: bias and mask as functions of positions, compiled into one kernel
    on a GPU. A table's gradient is summed there by atomic additions, so its bits differ from run to run.
    """
    from torch.nn.attention import flex_attention as torch_flex

    if bias is not None and bias.at is not None:
        raise ValueError("backend 'flex': bias: expected `at` to be None; backend 'sdpa' can")
    if dropout_p > 0:
        raise ValueError(f"backend 'flex': dropout_p: expected 0, got {dropout_p}; backend 'sdpa' can")
    on_gpu = q.device.type == "cuda"
    learns = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, None if bias is None else bias.per_head)
    )
    if learns and not on_gpu:
        raise ValueError(
            f"backend 'flex': q, k, v, bias: expected none that requires grad on {q.device}, where torch has "
            "no gradient for it; backend 'sdpa' can"
        )
    i_len, j_len = q.shape[2], k.shape[2]
    attend: Callable[..., Any] = torch_flex.flex_attention
    block_mask: Callable[..., Any] = torch_flex.create_block_mask
    if not on_gpu:  # where even a tensor that could require grad is refused
        q, k, v = q.detach(), k.detach(), v.detach()
    elif not torch.compiler.is_compiling():
        attend, block_mask = _compiled(attend), _compiled(block_mask)
    visible = _flex_mask(i_len, j_len, causal, key_mask, document_ids)
    blocks = visible and block_mask(
        visible,
        None if key_mask is None and document_ids is None else len(q),
        None,
        i_len,
        j_len,
        device=q.device,
    )
    return attend(
        q,
        k,
        v,
        score_mod=_flex_bias(i_len, j_len, bias),
        block_mask=blocks,
        scale=scale,
        enable_gqa=k.shape[1] != q.shape[1],
    )


_compiled = cache(torch.compile)


def _flex_mask(
    i_len: int, j_len: int, causal: bool, key_mask: Tensor | None, document_ids: Tensor | None
) -> Callable[..., Tensor] | None:
    """Whether query i of batch row b sees key j."""
    if not causal and key_mask is None and document_ids is None:
        return None

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i + (j_len - i_len) >= j if causal else i >= 0
        if key_mask is not None:
            seen = seen & key_mask[b, j]
        if document_ids is not None:
            seen = seen & (document_ids[b, i + (j_len - i_len)] == document_ids[b, j])
        return seen

    return visible


def _flex_bias(i_len: int, j_len: int, bias: Bias | None) -> Callable[..., Tensor] | None:
    """The score of query i and key j with its bias."""
    if bias is None:
        return None
    if isinstance(bias, AlibiBias):
        slopes = bias.slopes

        def with_slope(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - slopes[h] * (i + (j_len - i_len) - j).abs()

        return with_slope
    # One more column: what is further away than the table knows has no offset.
    offsets = F.pad(bias.offsets(j_len), (0, 1)).contiguous()
    reach = offsets.shape[1] - 1

    def with_offset(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + offsets[h, (i + (j_len - i_len) - j).clamp(0, reach)]

    return with_offset
