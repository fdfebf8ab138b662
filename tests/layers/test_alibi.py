"""ALiBi's slopes against the paper's, as written out in `definitions`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from definitions import ALIBI_SLOPES

from palm_pytorch.layers import alibi_slopes


@pytest.mark.parametrize(("heads", "expected"), ALIBI_SLOPES.items())
def test_slopes(heads: int, expected: list[float]) -> None:
    slopes = alibi_slopes(heads)
    assert slopes.dtype == torch.float32
    assert not slopes.requires_grad
    assert slopes.tolist() == pytest.approx(expected, rel=1e-7)
    assert torch.equal(alibi_slopes(np.int64(heads)), slopes)


def test_every_head_has_a_slope_of_its_own() -> None:
    for heads in range(1, 200):
        slopes = alibi_slopes(heads)
        assert slopes.shape == slopes.unique().shape == (heads,)
        assert (slopes > 0).all() and (slopes < 1).all()


def test_device() -> None:
    assert alibi_slopes(6, device="meta").is_meta


@pytest.mark.parametrize("heads", [0, -4])
def test_bad_head_counts_are_refused(heads: int) -> None:
    with pytest.raises(ValueError, match=f"heads: .*{heads}"):
        alibi_slopes(heads)


@pytest.mark.parametrize("heads", [2.5, "8", None])
def test_head_counts_are_integers(heads: object) -> None:
    with pytest.raises(TypeError, match="heads: "):
        alibi_slopes(heads)  # type: ignore[arg-type]
