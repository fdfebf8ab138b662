"""The four models as plainly as PyTorch allows: what `training.py` and `generation.py` measure against.

Einsum over all heads, masks and biases as (i, j) tensors, float32, all logits at once; nothing in chunks.
Masks, rotary angles and bucket numbers depend on shapes alone and are computed once, in the peer's favour.

Parameters have the package's names: `plain.load_state_dict(ours.state_dict())` gives the same function.

Shapes: b batch; n sequence length; i, j query and key length; h heads; d head dim; r rotated dims of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@cache
def future(i: int, j: int, device: torch.device) -> Tensor:
    """True where key j comes after query i, (i, j); the last query is aligned with the last key."""
    return torch.ones(i, j, dtype=torch.bool, device=device).triu(j - i + 1)


@cache
def rotary_angles(n: int, dim: int, device: torch.device) -> Tensor:
    """(n, dim), both halves alike."""
    frequency = 10000 ** (-torch.arange(0, dim, 2, device=device) / dim)
    angles = torch.arange(n, device=device)[:, None] * frequency
    return torch.cat([angles, angles], dim=-1)


@cache
def alibi(heads: int, n: int, device: torch.device) -> Tensor:
    """(h, i, j), for a number of heads that is a power of two."""
    slopes = 2 ** (-8 / heads * torch.arange(1, heads + 1, device=device))
    position = torch.arange(n, device=device)
    return -slopes[:, None, None] * (position[:, None] - position[None, :]).abs()


@cache
def t5_buckets(n: int, num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """(i, j)."""
    position = torch.arange(n, device=device)
    distance = (position[:, None] - position[None, :]).clamp(min=0)
    exact = num_buckets // 2
    ratio = (distance.clamp(min=1) / exact).log() / math.log(max_distance / exact)
    return torch.where(distance < exact, distance, exact + (ratio * exact).long()).clamp(max=num_buckets - 1)


def build(package: Any, case: Any, longest: int) -> Any:
    """The model that a benchmark's case names, from `palm_pytorch` or this module.

    longest: Perceiver AR's longest sequence; `case.prefix_len` is 0 for the others.
    """
    names = {"palm": "PaLM", "palm-lite": "PaLMLite", "lamda": "LaMDA", "perceiver-ar": "PerceiverAR"}
    shape = {name: getattr(case, name) for name in ("num_tokens", "dim", "depth", "heads", "dim_head")}
    if case.prefix_len:
        shape |= {"max_seq_len": longest, "cross_attn_seq_len": case.prefix_len}
    return getattr(package, names[case.model])(**shape)


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * self.weight


def gated(x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return activation(gate) * value


class FeedForward(nn.ModuleDict):
    def __init__(self, dim: int, activation: Callable[[Tensor], Tensor]) -> None:
        # named by their places in the package's sequence of layers
        super().__init__({"0": nn.Linear(dim, 8 * dim, bias=False), "3": nn.Linear(4 * dim, dim, bias=False)})
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self["3"](gated(self["0"](x), self.activation))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x (..., n, d), its first dims by angles (n, r)."""
    x, rest = x.split([angles.shape[-1], x.shape[-1] - angles.shape[-1]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin(), rest], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """q (b, h, i, d); k and v (b, j, d), or (b, h, j, d) where each head has its own; returns (b, i, h d)."""
    keys = "b j d" if k.dim() == 3 else "b h j d"
    scores = torch.einsum(f"b h i d, {keys} -> b h i j", q * q.shape[-1] ** -0.5, k)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(future(*scores.shape[-2:], q.device), -torch.finfo(scores.dtype).max)
    out = torch.einsum(f"b h i j, {keys} -> b h i d", scores.softmax(dim=-1), v)
    return rearrange(out, "b h i d -> b i (h d)")


class ParallelBlock(nn.Module):
    """`lite`: ALiBi for rotary, and one projection is both key and value."""

    def __init__(self, dim: int, heads: int, dim_head: int, *, lite: bool) -> None:
        super().__init__()
        self.heads, self.lite = heads, lite
        self.widths = [heads * dim_head, *[dim_head] * (1 if lite else 2), 8 * dim]
        self.norm = RMSNorm(dim)
        self.fused_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.attn_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff_out = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, *kv, ff = self.fused_proj(self.norm(x)).split(self.widths, dim=-1)
        q, k, v = rearrange(q, "b n (h d) -> b h n d", h=self.heads), kv[0], kv[-1]
        bias = None
        if self.lite:
            bias = alibi(self.heads, x.shape[1], x.device)
        else:
            angles = rotary_angles(x.shape[1], k.shape[-1], x.device)
            q, k = rotate(q, angles), rotate(k, angles)
        return x + self.attn_out(attention(q, k, v, bias)) + self.ff_out(gated(ff, F.silu))


class PlainModel(nn.Module):
    """Embedding, layers, norm and logits that share the embedding's weight."""

    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.norm = RMSNorm(dim)
        self.layers = nn.ModuleList()

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.token_emb(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, tokens: Tensor, *, labels: Tensor) -> Tensor:
        """tokens, labels (b, n) -> mean loss, of the last positions where only these have hidden states."""
        logits = self.hidden(tokens) @ self.token_emb.weight.T
        return F.cross_entropy(logits.flatten(0, 1), labels[:, -logits.shape[1] :].flatten())


class PaLM(PlainModel):
    def __init__(
        self, *, num_tokens: int, dim: int, depth: int, heads: int, dim_head: int, lite: bool = False
    ) -> None:
        super().__init__(num_tokens, dim)
        self.layers.extend(ParallelBlock(dim, heads, dim_head, lite=lite) for _ in range(depth))


PaLMLite = partial(PaLM, lite=True)


class RelativeBias(nn.Module):
    def __init__(self, heads: int, dim_head: int) -> None:
        super().__init__()
        self.scale = dim_head**0.5
        self.table = nn.Parameter(torch.empty(32, heads))

    def forward(self, n: int) -> Tensor:
        buckets = t5_buckets(n, len(self.table), 128, self.table.device)
        return rearrange(F.embedding(buckets, self.table), "i j h -> h i j") * self.scale


class Attention(nn.Module):
    """Keys and values of the `context`, if given, and of x behind it, with rotary in `rotary_dim` dims."""

    def __init__(self, dim: int, heads: int, dim_head: int, kv_heads: int = 1, rotary_dim: int = 0) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.rotary_dim = heads, kv_heads, rotary_dim
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        source = x if context is None else torch.cat([context, x], dim=1)
        q, (k, v) = self.to_q(x), self.to_kv(source).chunk(2, dim=-1)
        q = rearrange(q, "b i (h d) -> b h i d", h=self.heads)
        if self.kv_heads > 1:
            k, v = (rearrange(t, "b j (h d) -> b h j d", h=self.heads) for t in (k, v))
        if self.rotary_dim:
            angles = rotary_angles(source.shape[1], self.rotary_dim, x.device)
            q, k = rotate(q, angles[-x.shape[1] :]), rotate(k, angles)
        return self.to_out(attention(q, k, v, bias))


class LaMDABlock(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.attn_norm, self.ff_norm = RMSNorm(dim), RMSNorm(dim)
        self.relative_bias = RelativeBias(heads, dim_head)
        self.attn = Attention(dim, heads, dim_head)
        self.ff = FeedForward(dim, F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), bias=self.relative_bias(x.shape[1]))
        return x + self.ff(self.ff_norm(x))


class LaMDA(PlainModel):
    def __init__(self, *, num_tokens: int, dim: int, depth: int, heads: int, dim_head: int) -> None:
        super().__init__(num_tokens, dim)
        self.layers.extend(LaMDABlock(dim, heads, dim_head) for _ in range(depth))


class LatentBlock(nn.Module):
    """`perceives`: attends to a prefix too."""

    def __init__(self, dim: int, heads: int, dim_head: int, *, perceives: bool = False) -> None:
        super().__init__()
        self.attn_norm, self.ff_norm = RMSNorm(dim), RMSNorm(dim)
        if perceives:
            self.prefix_norm = RMSNorm(dim)
        rotary_dim = max(32, dim_head // 2)
        self.attn = Attention(dim, heads, dim_head, kv_heads=heads, rotary_dim=rotary_dim)
        self.ff = FeedForward(dim, F.silu)

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor:
        context = None if prefix is None else self.prefix_norm(prefix)
        x = x + self.attn(self.attn_norm(x), context)
        return x + self.ff(self.ff_norm(x))


class PerceiverAR(PlainModel):
    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        max_seq_len: int,
        cross_attn_seq_len: int,
    ) -> None:
        super().__init__(num_tokens, dim)
        self.prefix_len = cross_attn_seq_len
        self.pos_emb = nn.Embedding(max_seq_len, dim)
        self.perceive_layers = nn.ModuleList([LatentBlock(dim, heads, dim_head, perceives=True)])
        self.layers.extend(LatentBlock(dim, heads, dim_head) for _ in range(depth))

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.token_emb(tokens) + self.pos_emb(torch.arange(tokens.shape[1], device=tokens.device))
        prefix, x = x[:, : self.prefix_len], x[:, self.prefix_len :]
        for layer in self.perceive_layers:
            x = layer(x, prefix)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
