"""Processes that score a batch together score each of its rows once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from palm_pytorch.data.batch import IGNORED, Batch
from palm_pytorch.training.observe import share_of


def rank(number: int, ranks: int) -> Any:
    def rows(size: int) -> range:
        share, rest = divmod(size, ranks)
        assert rest == 0
        return range(number * share, (number + 1) * share)

    return SimpleNamespace(data_ranks=ranks, rows=rows)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_shares_are_equally_many_rows_and_each_counts_once(size: int, ranks: int) -> None:
    tokens = torch.arange(size)[:, None].expand(size, 5) + 10
    labels = tokens.clone()
    labels[0, :2] = IGNORED
    batch = Batch(tokens, labels, document_ids=tokens - 10, prefix_mask=tokens > 10)
    shares = [share_of(batch, rank(number, ranks)) for number in range(ranks)]
    assert {len(share.tokens) for share in shares} == {-(-size // ranks)}
    counted = torch.cat([share.labels for share in shares])
    assert torch.equal(counted[:size], labels) and (counted[size:] == IGNORED).all()
    for field in ("tokens", "document_ids", "prefix_mask"):
        joined = torch.cat([getattr(share, field) for share in shares])
        assert torch.equal(joined[:size], getattr(batch, field))
