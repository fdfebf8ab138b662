"""The backends that are measured: ours, torch's and flash-attn's."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from attention_bench.cases import Inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from palm_pytorch.ops.attention import AlibiBias, RelativeBias, attention

Work = Callable[[], Tensor]
# What a backend does once, outside of all timing, for given inputs; then it is called again and again.
Backend = Callable[[Inputs], Work]


class Refused(Exception):
    """A backend cannot serve a case, and this is why."""


def ours(name: str) -> Backend:
    """A backend of `palm_pytorch.ops.attention`."""

    def prepare(x: Inputs) -> Work:
        return lambda: attention(x.q, x.k, x.v, bias=x.bias, backend=name)

    return prepare


def torch_fused(kernel: SDPBackend, *, gqa: bool) -> Backend:
    """One of the kernels behind scaled_dot_product_attention and no other. It meets one key/value head by
    `enable_gqa`, or as a view with as many as there are query heads; a bias is a tensor (1, h, i, j)."""

    def prepare(x: Inputs) -> Work:
        (h, i), j = x.q.shape[1:3], x.k.shape[2]
        mask: Any = None
        if x.bias is not None:
            ahead = torch.ones(i, j, dtype=torch.bool, device=x.q.device).triu(x.shift + 1)
        elif 1 < i < j:
            mask = causal_lower_right(i, j)
        if isinstance(x.bias, AlibiBias):  # constant, so it is not in the time; by heads, or it would not fit
            mask = x.q.new_empty(1, h, i, j)
            for head, slope in enumerate(x.bias.slopes.split(1)):
                mask[0, head] = AlibiBias(slope).values(i, j)[0].masked_fill_(ahead, float("-inf"))

        def work() -> Tensor:
            k, v = (x.k, x.v) if gqa else (t.expand(-1, h, -1, -1) for t in (x.k, x.v))
            attn_mask = mask
            if isinstance(x.bias, RelativeBias):
                values = x.bias.windows(i, j).to(x.q.dtype)[None]
                attn_mask = values.masked_fill(ahead, float("-inf"))
            with sdpa_kernel(kernel), warnings.catch_warnings(record=True) as reasons:
                warnings.simplefilter("always")
                try:
                    return F.scaled_dot_product_attention(
                        x.q, k, v, attn_mask=attn_mask, is_causal=x.bias is None and i == j, enable_gqa=gqa
                    )
                except RuntimeError as error:
                    if not re.search("No (available kernel|viable backend)", str(error)):
                        raise
                    raise Refused(refusal_of([str(reason.message) for reason in reasons])) from error

        return work

    return prepare


def refusal_of(reasons: list[str]) -> str:
    """Torch warns of everything that keeps each kernel from running, of those that are switched off too."""
    noise = ("kernel not used because", "runtime disabled")
    reasons = [r.partition(" (Triggered internally")[0] for r in reasons if not any(n in r for n in noise)]
    return " ".join(dict.fromkeys(reasons)) or "torch has no such kernel for these inputs"


def flex(x: Inputs) -> Work:
    """Torch's FlexAttention, compiled for just these shapes; the block mask is not in the time."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Torch gives up compiling after some recompilations of the same code, which other shapes would be.
    torch.compiler.reset()
    i_len, j_len, shift = x.q.shape[2], x.k.shape[2], x.shift
    blocks = None
    if i_len > 1:
        blocks = create_block_mask(
            lambda b, h, i, j: i + shift >= j, None, None, i_len, j_len, device=x.q.device
        )
    slopes = x.bias.slopes if isinstance(x.bias, AlibiBias) else None

    def attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None) -> Tensor:
        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if slopes is not None:
                return s - slopes[h] * (i + shift - j)
            if offsets is not None:
                return s + offsets[h, (i + shift - j).clamp(0, offsets.shape[1] - 1)]
            return s

        out: Tensor = flex_attention(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True)
        return out

    compiled = torch.compile(attend, dynamic=False, fullgraph=True)

    def work() -> Tensor:
        offsets = None
        if isinstance(x.bias, RelativeBias):  # one more, for all that is further away
            offsets = F.pad(x.bias.offsets(j_len), (0, 1)).contiguous()
        return compiled(x.q, x.k, x.v, offsets)

    return work


def flash_attn(x: Inputs) -> Work:
    """The package of that name, which takes (b, n, h, d)."""
    from flash_attn import flash_attn_func, flash_attn_with_kvcache

    if isinstance(x.bias, RelativeBias):
        raise Refused("it has no learned bias")
    slopes = x.bias.slopes if x.bias is not None else None

    def work() -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
        if x.learn:
            out = flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)
        else:
            out = flash_attn_with_kvcache(q, k, v, causal=True)
        return out.transpose(1, 2)

    return work


def backends(device: torch.device) -> tuple[dict[str, dict[str, Backend]], dict[str, str]]:
    """By name, ours first, in each of the ways to call it, of which the fastest counts; and what is left out,
    and why."""
    if device.type == "cpu":
        left_out = {
            "triton": "needs a GPU",
            "flex": "torch has no gradient for it on a CPU",
            "flash_attn": "needs a GPU",
        }
        return {name: {"": ours(name)} for name in ("blockwise", "sdpa", "reference")}, left_out
    found: dict[str, dict[str, Backend]] = {"triton": {"": ours("triton")}, "sdpa": {"": ours("sdpa")}}
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    for name, kernel in kernels.items():
        found[name] = {
            "enable_gqa": torch_fused(kernel, gqa=True),
            "expanded": torch_fused(kernel, gqa=False),
        }
    found["flex"] = {"": flex}
    if find_spec("flash_attn") is None:
        return found, {"flash_attn": "not installed"}
    return found | {"flash_attn": {"": flash_attn}}, {}
