"""Prefixes cut at random: a function of seed, batch and row, of the share and the lengths that were asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from palm_pytorch.training.evaluate import batch_loss
from palm_pytorch.training.loader import Loader
from palm_pytorch.training.prefix_truncation import truncated_prefix
from palm_pytorch.training.run import prepare


def mask(share: float = 0.5, rows: range = range(400), index: int = 3, seed: int = 1) -> torch.Tensor:
    return truncated_prefix(share=share, prefix_len=12, seed=seed, index=index, rows=rows)


def test_what_is_kept_is_the_end_of_the_prefix_at_every_length() -> None:
    seen = mask(share=1.0)
    assert seen.shape == (400, 12) and seen.dtype == torch.bool
    assert (seen.int().diff(dim=1) >= 0).all()
    kept = seen.sum(dim=1)
    assert set(kept.tolist()) == set(range(12))
    assert kept.double().mean().item() == pytest.approx(5.5, abs=4 * 3.45 / 20)  # four standard errors


def test_the_share_of_rows_that_are_cut() -> None:
    whole = mask(share=0.25).all(dim=1).double().mean().item()
    assert whole == pytest.approx(0.75, abs=0.09)
    assert mask(share=0.0).all()


def test_a_row_is_the_same_however_the_batch_is_cut() -> None:
    every = mask()
    assert torch.equal(torch.cat([mask(rows=range(0, 7)), mask(rows=range(7, 400))]), every)
    assert not torch.equal(mask(index=4), every)
    assert not torch.equal(mask(seed=2), every)


def test_a_run_trains_on_what_is_left(tiny: dict[str, Any]) -> None:
    """The second slice of a step: rows 4 to 7 of batch 0."""
    run = prepare(**tiny, model="perceiver-ar", cross_attn_seq_len=10, prefix_truncation=0.9, grad_accum=2)
    with Loader(run.data, run.config, run.parallel) as loader:
        loader.seek(run.state)
        _, batch = loader.read()
    model, windows = run.state.model, run.data.batch(seed=7, index=0, rows=range(4, 8))
    expected = truncated_prefix(share=0.9, prefix_len=10, seed=7, index=0, rows=range(4, 8))
    assert batch.prefix_mask is not None and torch.equal(batch.prefix_mask, expected)
    loss = batch_loss(model, batch, torch.float32)
    assert torch.equal(loss, model(windows.tokens, labels=windows.labels, prefix_mask=expected))
    assert not torch.equal(loss, model(windows.tokens, labels=windows.labels))
    run.close()
