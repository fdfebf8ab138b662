"""Tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053, section 3), put on the models from outside.

    x --> norm --> f --> split projection --> own heads and features --> summed projection --> g --> (+)

f is the identity whose gradient is summed over the ranks, g a sum over the ranks whose gradient is passed on.
Query heads and inner features are split. The one key/value head of multi-query attention is on every rank;
each rank knows the gradient from its own query heads only, so the gradient of the key's and value's weights
is summed too, as is that of gains shared by all heads. Left out, nothing fails: ranks drift apart and learn
something else. Embeddings, norms and logits are whole on every rank, and get the same gradient there.

PyTorch's own plans for this, over DTensor, cut a weight into equal pieces, where a fused projection is cut
part by part and its one key/value head not at all, and leave what they do not name without the sum of its
gradients. So the layers here are plain ones; DTensor serves FSDP and resharding.

Shapes: t ranks; h heads; g key/value heads; d head dim; c model width; f inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from palm_pytorch.layers.attention import MultiQueryAttention
from palm_pytorch.layers.feedforward import FeedForward
from palm_pytorch.layers.norm import L2Norm
from palm_pytorch.layers.parallel import ParallelBlock
from palm_pytorch.layers.relative_bias import T5RelativeBias
from palm_pytorch.models.palm_lite import PaLMLiteBlock
from palm_pytorch.ops import AlibiBias
from palm_pytorch.training.tensor_layout import Layout, share
from palm_pytorch.training.tensor_sums import Sum, SumGradient, SumGradientOfSharedRows


class SplitLinear(nn.Linear):
    """Rows of a linear layer: each part that is split, and all of the others.

    `in_features` and `out_features` are those of the whole layer, which its initialisation goes by.
    """

    def __init__(self, whole: nn.Linear, layout: Layout) -> None:
        super().__init__(whole.in_features, whole.out_features, whole.bias is not None, device="meta")
        self.layout = layout
        self.weight = share(whole.weight, layout)
        if whole.bias is not None:
            self.bias = share(whole.bias, layout)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not all(self.layout.split):
            weight = SumGradientOfSharedRows.apply(weight, self.layout)
            if bias is not None:
                bias = SumGradientOfSharedRows.apply(bias, self.layout)
        return F.linear(x, weight, bias)


class TermLinear(nn.Linear):
    """Columns of a linear layer for the features of this rank: its term of the sum over all ranks.

    `in_features` and `out_features` are those of the whole layer, which its initialisation goes by.
    """

    def __init__(self, whole: nn.Linear, layout: Layout) -> None:
        super().__init__(whole.in_features, whole.out_features, whole.bias is not None, device="meta")
        self.group = layout.group
        self.weight, self.bias = share(whole.weight, layout), whole.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class SummedLinear(TermLinear):
    """The same, and the sum."""

    def forward(self, x: Tensor) -> Tensor:
        out = Sum.apply(super().forward(x), self.group)
        return out if self.bias is None else out + self.bias


def sum_gradients(module: nn.Module, group: ProcessGroup) -> None:
    """Sum the gradients of a module's parameters, which each rank knows in part, over the ranks."""
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        own = dict(module.named_parameters(recurse=False))
        summed = {name: SumGradient.apply(parameter, group) for name, parameter in own.items()}
        module._parameters.update(summed)
        try:
            return plain(x)
        finally:
            module._parameters.update(own)

    module.forward = forward


# -------------------------------------------------------------------------------------------------- blocks


def split_over(block: nn.Module, rank: int, group: ProcessGroup) -> None:
    """Leave in a block of any of the models, in place, what tensor rank `rank` of `group` computes; as many
    ranks as `choose_grid` allows.
    """
    cut = Cut(rank, dist.get_world_size(group), group)
    if isinstance(block, ParallelBlock):
        cut.parallel_block(block)
    else:
        cut.block(block)


@dataclass(frozen=True)
class Cut:
    """Cuts the share of one rank out of the layers of a block."""

    rank: int
    ranks: int
    group: ProcessGroup

    def layout(self, dim: int, widths: Sequence[int], split: Sequence[bool] | None = None) -> Layout:
        split = [True] * len(widths) if split is None else split
        return Layout(dim, tuple(widths), tuple(split), self.rank, self.ranks, self.group)

    def sum_gradient_of_output(self, norm: nn.Module) -> None:
        norm.register_forward_hook(lambda module, inputs, out: SumGradient.apply(out, self.group))

    def split(
        self, linear: nn.Linear, widths: Sequence[int], split: Sequence[bool] | None = None
    ) -> SplitLinear:
        return SplitLinear(linear, self.layout(0, widths, split))

    def term(self, linear: nn.Linear, kind: type[TermLinear] = TermLinear) -> TermLinear:
        return kind(linear, self.layout(1, [linear.in_features]))

    def parallel_block(self, block: ParallelBlock) -> None:
        # Queries; a key and a value, or one for both; value and gate of the feed-forward.
        split = [True, *[False] * block.narrow, True, True]
        self.sum_gradient_of_output(block.norm)
        block.fused_proj = projection = self.split(block.fused_proj, block.widths, split)
        block.widths = projection.layout.local_widths
        # Both of its branches are added to the stream, so that one sum does for them.
        terms = block.out
        block.attn_out, block.ff_out = self.term(block.attn_out), self.term(block.ff_out)
        block.out = lambda *inner: Sum.apply(terms(*inner), self.group)  # type: ignore[method-assign]
        for norm in (block.q_norm, block.k_norm):
            if isinstance(norm, L2Norm):
                sum_gradients(norm, self.group)
        if isinstance(block, PaLMLiteBlock):
            block.register_forward_pre_hook(self.own_slopes)

    def own_slopes(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a block, with the slopes of this rank's heads for those of all."""
        x, alibi, *rest = inputs
        return (x, AlibiBias(alibi.slopes.chunk(self.ranks)[self.rank]), *rest)

    def block(self, block: Any) -> None:
        """One after the other: attention, with or without a bias or a prefix, and feed-forward."""
        for name in ("attn_norm", "prefix_norm", "ff_norm"):
            if hasattr(block, name):
                self.sum_gradient_of_output(getattr(block, name))
        self.attention(block.attn)
        self.feedforward(block.ff)
        if hasattr(block, "relative_bias"):
            self.relative_bias(block.relative_bias)

    def attention(self, attention: MultiQueryAttention) -> None:
        width = attention.to_kv.out_features // 2
        split = width > attention.dim_head
        attention.to_q = self.split(attention.to_q, [attention.to_q.out_features])
        attention.to_kv = self.split(attention.to_kv, [width, width], [split, split])
        attention.to_out = self.term(attention.to_out, SummedLinear)

    def feedforward(self, feedforward: FeedForward) -> None:
        into, out = feedforward[0], feedforward[-1]
        assert isinstance(into, nn.Linear) and isinstance(out, nn.Linear)
        # A value and a gate, or one without gate.
        widths = [out.in_features] * (into.out_features // out.in_features)
        feedforward[0], feedforward[-1] = self.split(into, widths), self.term(out, SummedLinear)

    def relative_bias(self, bias: T5RelativeBias) -> None:
        bias.table = share(bias.table, self.layout(1, [bias.table.shape[1]]))
