"""Attention as it is defined, in a few lines and any dtype: what every backend is compared with.

Shapes: q (b, h, i, d); k, v (b, g, j, d) with g dividing h; scores (b, h, i, j).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from palm_pytorch.ops.attention.bias import Bias, key_distance


def visible_keys(
    i_len: int,
    j_len: int,
    *,
    causal: bool,
    key_mask: Tensor | None,
    document_ids: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Which keys each query may see, (b or 1, 1, i, j), or None where it may see all."""
    visible = None
    if causal:
        visible = (key_distance(i_len, j_len, device) >= 0)[None, None]
    if key_mask is not None:
        mask = key_mask[:, None, None, :].expand(-1, 1, i_len, j_len)
        visible = mask if visible is None else visible & mask
    if document_ids is not None:
        # Fewer queries than keys are the last ones.
        same = (document_ids[:, j_len - i_len :, None] == document_ids[:, None, :])[:, None]
        visible = same if visible is None else visible & same
    return visible


def reference(
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
    """`softmax(scale * q k^T + bias) v` over the visible keys: products in the dtype of q, the rest in
    float32 or better."""
    g, i_len, j_len = k.shape[1], q.shape[2], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = rearrange(q, "b (g r) i d -> b g r i d", g=g)
    products = torch.einsum("b g r i d, b g j d -> b g r i j", grouped, k)
    scores = rearrange(products, "b g r i j -> b (g r) i j").to(wide) * scale
    if bias is not None:
        scores = scores + bias.values(i_len, j_len)
    visible = visible_keys(
        i_len, j_len, causal=causal, key_mask=key_mask, document_ids=document_ids, device=q.device
    )
    if visible is None:
        weights = scores.softmax(dim=-1)
    else:
        # A finite floor, then an exact zero: a row that may see nothing gives zeros and no NaN gradient.
        floor = torch.finfo(scores.dtype).min
        weights = scores.masked_fill(~visible, floor).softmax(dim=-1).masked_fill(~visible, 0.0)
    weights = F.dropout(weights, dropout_p).to(v.dtype)
    weights = rearrange(weights, "b (g r) i j -> b g r i j", g=g)
    out = torch.einsum("b g r i j, b g j d -> b g r i d", weights, v)
    return rearrange(out, "b g r i d -> b (g r) i d")
