"""Perceiver AR: training with prefixes of any length, so that a short one is nothing new when writing begins.

Its authors train on crops of random length (Hawthorne et al. 2022, arXiv 2202.07765; `minimum_crop_length`
in their code). Here a sequence keeps its place and its latents, and the start of its prefix is masked.

Shapes: b rows; p prefix length.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def truncated_prefix(*, share: float, prefix_len: int, seed: int, index: int, rows: range) -> Tensor:
    """A prefix mask (b, p) for rows of batch `index`: True where a token may be attended to.

    With probability `share` a row keeps only the last of its prefix, 0 to p - 1 tokens, all equally likely;
    else all of it. A row's draw is a function of (seed, index, row) alone, as its text is, from a counter
    that the text's draws do not reach.
    """
    generator = np.random.Philox(counter=[0, 0, 0, 1], key=np.array([seed, index], dtype=np.uint64))
    draws = generator.random_raw(2 * (max(rows) + 1)).reshape(-1, 2)[np.asarray(rows)]
    truncated = draws[:, 0] / 2.0**64 < share
    kept = np.where(truncated, draws[:, 1] % np.uint64(prefix_len), np.uint64(prefix_len)).astype(np.int64)
    return torch.arange(prefix_len) >= prefix_len - torch.from_numpy(kept)[:, None]
