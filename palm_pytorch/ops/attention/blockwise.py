"""Exact attention a block of queries at a time, as plain matrix products: the fast path on a CPU.

Shapes: q (b, h, i, d) is taken as (t, i, r, d) and k, v (b, g, j, d) as (t, j, d), where t = b * g and
r = h / g: all the query heads of a key/value head stand beside each other, so that one product serves them
together and the key/value head is never repeated. A block has `rows` queries and sees the first `seen` keys:
scores (t, rows, r, seen).

Forward, per block:   S = scale Q K^T + bias;  P = softmax(S);  O = P V
Backward, per block:  P again (or kept, where P is small), then  dP = dO V^T;  dS = P (dP - rowsum(P dP));
                      dQ = scale dS K;  dK += scale dS^T Q;  dV += P^T dO

Keys ahead of the causal diagonal are hardly visited. What outlives a block is linear in the sequence, but for
weights up to a fixed size. T5's bias is added only near the diagonal, where its buckets differ, since softmax
ignores what is constant along a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from palm_pytorch.ops.attention.bias import AlibiBias, Bias, RelativeBias, key_distance
from palm_pytorch.ops.autocast import no_autocast
from palm_pytorch.ops.derivatives import first_derivative_only

# Most queries in a block, and most scores: on a CPU a few score blocks should fit in the last-level cache.
MAX_ROWS = 128
MAX_SCORES = {"cpu": 1 << 21}
MAX_SCORES_ELSEWHERE = 1 << 25
# Different numbers of keys that blocks see, at most: oneDNN compiles every shape of product anew and keeps
# it, about 1 MB each. Blocks that see a few keys more than they need cost less.
MAX_LENGTHS = 16
# Attention weights that forward may keep for backward, at most: while they are no more than the layer's other
# activations, to keep them costs less than to compute them again.
MAX_KEPT = 1 << 25


def blockwise(
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
    """Every argument of the contract in memory linear in the sequence, forward and backward, on any
    device.
    """
    single = q.shape[2] == 1 and dropout_p == 0 and document_ids is None and not torch.is_grad_enabled()
    at = None if bias is None else bias.at
    if single and (q.device.type == "cpu" or at is not None):
        return _one_query(q, k, v, bias, key_mask, scale)
    if at is not None:
        raise ValueError(
            "backend 'blockwise': bias: expected `at` to be None with dropout or gradients; 'sdpa' can"
        )
    seed = int(torch.randint(1 << 62, (), device="cpu")) if dropout_p > 0 else 0
    per_head = None if bias is None else bias.per_head
    # Inside a Function gradients look wanted even where they are switched off.
    keep = torch.is_grad_enabled() and q.numel() // q.shape[-1] * k.shape[2] <= MAX_KEPT
    if v is k:  # compiled code knows each argument of a Function once
        v = v.view_as(v)
    call = _Call(causal, bias, dropout_p, seed, scale, keep)
    out = _apply(q, k, v, per_head, key_mask, document_ids, call)
    return rearrange(out, "(b g) i r d -> b (g r) i d", g=k.shape[1])


def _one_query(
    q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, key_mask: Tensor | None, scale: float
) -> Tensor:
    """The last query by itself, as generation asks for it: torch's kernel, to which the query heads of a
    key/value head are so many queries. It takes keys as they lie in a cache, and any number of them without
    compiling anew.
    """
    (b, h, _, d), (_, g, j_len, _) = q.shape, k.shape
    # Compiled code would copy the keys for each share.
    if g == 1 and q.device.type == "cpu" and not torch.compiler.is_compiling():
        g = _shares(h, torch.get_num_threads() // b)
        k, v = k.expand(-1, g, -1, -1), v.expand(-1, g, -1, -1)
    mask, blind = None, None
    if bias is not None:
        # Wider than the queries only where torch's kernel takes that: a GPU's reads it as theirs, unasked.
        wide = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else q.dtype
        row = _last_row(bias, j_len).to(wide)
        mask = row.view(1, g, h // g, j_len)
    if key_mask is not None:
        blind = ~key_mask.any(dim=-1)[:, None, None, None]
        seen = key_mask[:, None, None] | blind
        mask = seen if mask is None else mask.masked_fill(~seen, float("-inf"))
    out = F.scaled_dot_product_attention(q.reshape(b, g, h // g, d), k, v, attn_mask=mask, scale=scale)
    return (out if blind is None else out.masked_fill(blind, 0.0)).view(q.shape)


def _shares(heads: int, cores: int) -> int:
    """How many groups the query heads of one key/value head go in: torch's kernel has a core for each.

    Shares of the keys instead, put together by their sums, took 6% off a token after 4,000 others in float32
    and nothing in bfloat16, on two cores.
    """
    return max(share for share in range(1, max(1, min(heads, cores)) + 1) if heads % share == 0)


def _last_row(bias: Bias, j_len: int) -> Tensor:
    """What a bias adds to the scores of the last query, (h, j), up to a number that all keys have in
    common.
    """
    if isinstance(bias, AlibiBias):
        return bias.values(1, j_len)[:, 0]
    if bias.at is not None:
        offsets = F.pad(bias.offsets(j_len), (0, 1))
        distance = key_distance(1, j_len, offsets.device, bias.at)[0]
        return offsets[:, distance.clamp(0, offsets.shape[1] - 1)]
    near = bias.offsets(j_len).flip(-1)
    return F.pad(near, (j_len - near.shape[1], 0))


class _Call(NamedTuple):
    causal: bool
    bias: Bias | None
    dropout_p: float
    seed: int
    scale: float
    keep: bool


class _Block(NamedTuple):
    """Which rows of the batch (t), queries and keys a block covers; `position` is its first query's, among
    the keys.
    """

    t: slice
    queries: slice
    position: int
    seen: int
    number: int


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        per_head: Tensor | None,
        key_mask: Tensor | None,
        document_ids: Tensor | None,
        call: _Call,
    ) -> Tensor:
        ctx.call = call
        scores = _Scores(q, k, per_head, key_mask, document_ids, call)
        values = rearrange(v, "b g j d -> (b g) j d").contiguous()
        out = torch.zeros_like(scores.q)
        kept: list[Tensor] = []
        for block in scores.blocks():
            weights = scores.weights(block)
            if call.keep:
                kept.append(weights)
            weights = scores.dropped(block, weights).flatten(1, 2)
            rows = out[block.t, block.queries]
            rows.copy_(_product(weights, values[block.t, : block.seen]).view_as(rows))
        ctx.save_for_backward(q, k, v, per_head, key_mask, document_ids, *kept)
        return out

    @staticmethod
    @first_derivative_only("backend 'blockwise'", "backend 'reference'")
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        # In the dtypes of forward, whatever surrounds the call of backward.
        with no_autocast(grad_out.device):
            return _Blockwise.gradients(ctx, grad_out)

    @staticmethod
    def gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, per_head, key_mask, document_ids, *kept = ctx.saved_tensors
        call: _Call = ctx.call
        g = k.shape[1]
        scores = _Scores(q, k, per_head, key_mask, document_ids, call)
        keys, values = scores.k, rearrange(v, "b g j d -> (b g) j d").contiguous()
        grad_out = grad_out.contiguous()
        dq = torch.zeros_like(scores.q)
        # Sums over blocks: a half precision would lose what the later blocks add.
        wide = torch.promote_types(q.dtype, torch.float32)
        dk, dv = (torch.zeros_like(t, dtype=wide) for t in (keys, values))
        for block in scores.blocks():
            weights = kept[block.number] if kept else scores.weights(block)
            dropped = scores.dropped(block, weights).flatten(1, 2)
            q_rows = scores.q[block.t, block.queries].flatten(1, 2)
            g_rows = grad_out[block.t, block.queries].flatten(1, 2)
            dv[block.t, : block.seen] += _product(dropped.mT, g_rows)
            dp = _product(g_rows, values[block.t, : block.seen].mT).view_as(weights)
            dp = scores.dropped(block, dp)
            # A table's gradient sums so many of these that a half precision's rounding would show.
            kind = scores.wide if isinstance(call.bias, RelativeBias) else weights.dtype
            ds = torch.ops.aten._softmax_backward_data(dp.to(kind), weights.to(kind), -1, kind)
            if scores.band is not None:
                scores.band.collect_grad(ds, block)
            ds = ds.to(weights.dtype).flatten(1, 2)
            rows = dq[block.t, block.queries]
            rows.copy_(_product(ds, keys[block.t, : block.seen]).view_as(rows))
            dk[block.t, : block.seen] += _product(ds.mT, q_rows)
        return (
            rearrange(dq.mul_(call.scale), "(b g) i r d -> b (g r) i d", g=g),
            rearrange(dk.mul_(call.scale), "(b g) j d -> b g j d", g=g).to(k.dtype),
            rearrange(dv, "(b g) j d -> b g j d", g=g).to(v.dtype),
            None if scores.band is None else scores.band.per_head_grad(g),
            *(None, None, None),
        )


def _apply(*inputs: Any) -> Tensor:
    out: Tensor = _Blockwise.apply(*inputs)
    return out


if torch.__version__ < "2.13":  # whose compilers do not follow it, and fail where they should go around it
    # Other than `torch.compiler.disable`, it does not import the compiler for that.
    _apply = torch._disable_dynamo(_apply)  # type: ignore[attr-defined]


def _queries_of(x: Tensor, g: int) -> Tensor:
    """(b, h, i, d) as (t, i, r, d): free for one key/value head and the layout that projections give."""
    return rearrange(x, "b (g r) i d -> (b g) i r d", g=g).contiguous()


def _product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale * a @ b for batches of matrices, the factor applied before the result is rounded."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    if len(a) == 1:  # the batched product copies operands that this one takes as they lie
        return torch.addmm(out[0], a[0], b[0], beta=0, alpha=scale)[None]
    return torch.baddbmm(out, a, b, beta=0, alpha=scale)


class _Scores:
    """The biased, masked scores of each block and their softmax, for forward and for backward's second
    look.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        per_head: Tensor | None,
        key_mask: Tensor | None,
        document_ids: Tensor | None,
        call: _Call,
    ) -> None:
        self.key_mask, self.document_ids, self.call = key_mask, document_ids, call
        self.g = k.shape[1]
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k = _queries_of(q, self.g), rearrange(k, "b g j d -> (b g) j d").contiguous()
        self.t_len, self.i_len, self.r, _ = self.q.shape
        self.j_len = self.k.shape[1]
        budget = MAX_SCORES.get(q.device.type, MAX_SCORES_ELSEWHERE)
        self.rows = max(1, min(MAX_ROWS, self.i_len, max(16, budget // (self.r * self.j_len))))
        self.t_step = max(1, budget // (self.r * self.j_len * self.rows))
        self.seen_step = max(self.rows, -(-self.j_len // MAX_LENGTHS))
        if per_head is not None:
            # (t, r, ...): what each query head of each batch row carries
            heads = rearrange(per_head.detach().to(self.wide), "(g r) ... -> g r ...", g=self.g)
            per_head = heads.repeat(self.t_len // self.g, *[1] * (heads.dim() - 1))
            if isinstance(call.bias, AlibiBias):
                self.slopes = per_head
        self.band: _Band | None = None
        if call.causal or isinstance(call.bias, RelativeBias):
            bias = call.bias if isinstance(call.bias, RelativeBias) else None
            ahead = self.rows + self.seen_step if call.causal else self.i_len + self.j_len
            self.band = _Band(
                self.q, bias, per_head, j_len=self.j_len, rows=self.rows, ahead=ahead, causal=call.causal
            )

    def _arange(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.q.device)

    def blocks(self) -> Iterator[_Block]:
        """All blocks with something to see, in a fixed order."""
        shift = self.j_len - self.i_len
        first = max(0, -shift) if self.call.causal else 0
        number = 0
        for t in range(0, self.t_len, self.t_step):
            for start in range(first, self.i_len, self.rows):
                stop = min(start + self.rows, self.i_len)
                needed = shift + stop if self.call.causal else self.j_len
                seen = min(-(-needed // self.seen_step) * self.seen_step, self.j_len)
                yield _Block(slice(t, t + self.t_step), slice(start, stop), shift + start, seen, number)
                number += 1

    def weights(self, block: _Block) -> Tensor:
        """softmax of the block's scores, (t, rows, r, seen); rows that may see nothing are zeros."""
        call = self.call
        q, k = self.q[block.t, block.queries], self.k[block.t, : block.seen]
        rows = q.shape[1]
        scores = _product(q.flatten(1, 2), k.mT, call.scale).view(len(q), rows, self.r, block.seen)
        if call.bias is not None:
            # A bias may be large, and a half precision would round the score away beside it.
            scores = scores.to(self.wide)
        if isinstance(call.bias, AlibiBias):
            i = self._arange(block.position, block.position + rows)
            distance = (i[:, None] - self._arange(0, block.seen)).abs().to(self.wide)
            scores.addcmul_(self.slopes[block.t, None, :, None], distance[:, None], value=-1)
        if self.band is not None:
            self.band.add_to(scores, block)
        if self.key_mask is None and self.document_ids is None:
            return scores.softmax(dim=-1).to(q.dtype)
        scores.masked_fill_(self._masked(block), float("-inf"))
        blind = scores.amax(dim=-1, keepdim=True) == float("-inf")
        return scores.softmax(dim=-1).masked_fill_(blind, 0.0).to(q.dtype)

    def _masked(self, block: _Block) -> Tensor:
        """The keys that key mask and documents take away, (t, rows or 1, 1, seen)."""
        batch = self._arange(0, self.t_len)[block.t] // self.g
        masked = torch.zeros((), dtype=torch.bool, device=self.q.device)
        if self.key_mask is not None:
            masked = masked | ~self.key_mask[batch, None, : block.seen]
        if self.document_ids is not None:
            ids = self.document_ids[batch]
            own = ids[:, self.j_len - self.i_len :][:, block.queries]
            masked = masked | (own[..., None] != ids[:, None, : block.seen])
        return masked[:, :, None]

    def dropped(self, block: _Block, weights: Tensor) -> Tensor:
        """weights (or their gradient) after dropout; the same positions go each time a block is visited."""
        p = self.call.dropout_p
        if p == 0:
            return weights
        generator = torch.Generator(weights.device).manual_seed(self.call.seed + block.number)
        kept = torch.rand(weights.shape, device=weights.device, generator=generator) >= p
        return weights * kept / (1 - p)


class _Band:
    """What is added to scores near the diagonal: -inf for keys ahead of a query if causal, and T5's bias
    less that of its last bucket, which is zero from `reach` behind. It is the same for every block.

    Row x of the band is a block's query x; column c is the key at distance `x - c + reach` from it.
    """

    def __init__(
        self,
        q: Tensor,
        bias: RelativeBias | None,
        per_head: Tensor | None,
        *,
        j_len: int,
        rows: int,
        ahead: int,
        causal: bool,
    ) -> None:
        self.bias = bias
        self.reach = 0 if bias is None else bias.reach(j_len)
        row, column = torch.arange(rows, device=q.device), torch.arange(self.reach + ahead, device=q.device)
        distance = row[:, None] - column + self.reach
        values = torch.zeros(1, rows, 1, len(column), device=q.device)
        if bias is not None and per_head is not None:
            self.buckets = bias.buckets(distance)
            offsets = (per_head - per_head[..., -1:]) * bias.scale
            values = offsets[:, :, self.buckets].transpose(1, 2)
        if causal:
            values = values.masked_fill(distance[:, None] < 0, float("-inf"))
        self.values = (values.to(q.dtype) if bias is None else values).expand(len(q), -1, -1, -1)
        self.grad: Tensor | None = None

    def _columns(self, block: _Block) -> tuple[slice, slice]:
        """Where the band lies among the block's keys, and which of its own columns those are."""
        start = max(0, block.position - self.reach)
        first = start - block.position + self.reach
        return slice(start, block.seen), slice(first, first + block.seen - start)

    def add_to(self, scores: Tensor, block: _Block) -> None:
        keys, own = self._columns(block)
        scores[..., keys] += self.values[block.t, : scores.shape[1], :, own]

    def collect_grad(self, grad: Tensor, block: _Block) -> None:
        """Adds a block's score gradients to those of the band, if it is learned."""
        if self.bias is None:
            return
        if self.grad is None:
            self.grad, self.far = torch.zeros_like(self.values), torch.zeros_like(self.values[:, 0, :, 0])
        keys, own = self._columns(block)
        self.grad[block.t, : grad.shape[1], :, own] += grad[..., keys]
        if keys.start > 0:
            self.far[block.t] += grad[..., : keys.start].sum(dim=(1, 3))

    def per_head_grad(self, g: int) -> Tensor | None:
        """The gradient (h, buckets) of the table. (Score gradients sum to zero along each row, but rounded
        ones nearly so: what the others leave is not the last bucket's where few keys are so far.)"""
        if self.bias is None:
            return None
        if self.grad is None:  # no query saw any key
            return torch.zeros_like(self.bias.per_head)
        per_head = rearrange(self.grad, "(b g) i r c -> b (g r) (i c)", g=g).sum(0)
        member = F.one_hot(self.buckets.flatten(), self.bias.table.shape[0]).to(per_head.dtype)
        grad = per_head @ member
        grad[:, -1] += rearrange(self.far, "(b g) r -> b (g r)", g=g).sum(0)
        return (grad * self.bias.scale).to(self.bias.table.dtype)
