"""Dropout of whole positions of a prefix (Perceiver AR, Hawthorne et al. 2022, arXiv 2202.07765, section
3.4).

Shapes: b batch; p prefix length; p' what is left of it; j keys, the prefix first; c model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from palm_pytorch.ops.arguments import expect_number


class PrefixDropout(nn.Module):
    """In training, leaves out `share` of a prefix, drawn anew for each row; what stays keeps order and
    positions.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        expect_number("share", share, least=0, below=1)
        self.share = share

    def forward(
        self, prefix: Tensor, at: Tensor, *keys: Tensor | None, whole: bool = False
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """prefix (b, p, c), its positions (p,) and what is known of all keys, each (b, j) or None, with what
        is left: (b, p', c), (p',) or (b, p'), and (b, j - p + p') each.

        whole: nothing is left out in training either, as where a cache is to hold the prefix.
        """
        b, p, c = prefix.shape
        dropped = int(p * self.share + 1e-6)  # 0.29 of 100 are 29, which in floats are a little less
        if not self.training or whole or dropped == 0:
            return prefix, at, keys
        kept = torch.rand(b, p, device=prefix.device).argsort(dim=-1)[:, dropped:].sort(dim=-1).values
        left = (x if x is None else torch.cat([x.gather(1, kept), x[:, p:]], dim=1) for x in keys)
        return prefix.gather(1, kept[..., None].expand(-1, -1, c)), at[kept], tuple(left)
