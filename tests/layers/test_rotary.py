"""Rotary embedding against its definition in float64, at positions up to 131,072."""

from __future__ import annotations

import math

import pytest
import torch
from definitions import error, turned, xpos_zeta
from torch import Tensor

from palm_pytorch.layers import Rotary, apply_rotary
from palm_pytorch.layers.rotary import RotaryTable

FAR = 131_072


def test_half_split_on_paper() -> None:
    table, _ = Rotary(4)(torch.tensor([1]))
    out = apply_rotary(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), table)
    c, s, c2, s2 = math.cos(1), math.sin(1), math.cos(0.01), math.sin(0.01)
    assert out.flatten().tolist() == pytest.approx([c - 3 * s, 2 * c2 - 4 * s2, 3 * c + s, 4 * c2 + 2 * s2])


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize(("d", "rotated"), [(16, 16), (80, 80), (72, 36), (48, 32), (2, 2)])
def test_definition_and_gradient(d: int, rotated: int, base: float) -> None:
    """Partial rotary turns the first dims and leaves the rest."""
    positions = torch.tensor([0, 1, 2, 17, 1000, 8191, FAR - 1, FAR])
    x = torch.randn(2, 3, 8, d, requires_grad=True)
    query, key = Rotary(rotated, base)(positions)
    wanted, grad = turned(x, positions, rotated, base), torch.randn(2, 3, 8, d)
    for table in (query, key):
        out = apply_rotary(x, table)
        assert (out.double() - wanted).abs().max() <= 1e-6
        assert torch.equal(out[..., rotated:], x[..., rotated:])
        (dx,) = torch.autograd.grad(out, x, grad, retain_graph=True)
        (exact,) = torch.autograd.grad(wanted, x, grad.double(), retain_graph=True)
        assert (dx - exact).abs().max() <= 1e-6


def test_positions_may_differ_by_row() -> None:
    positions = torch.tensor([[0, 5, 9], [3, 4, 100_000]])
    x = torch.randn(2, 4, 3, 16)
    assert (apply_rotary(x, Rotary(16)(positions)[0]) - turned(x, positions, 16)).abs().max() <= 1e-6


def test_last_positions_of_a_table() -> None:
    x = torch.randn(1, 2, 3, 16)
    table, _ = Rotary(16)(torch.arange(10))
    assert error(apply_rotary(x, table.last(3)), turned(x, torch.arange(7, 10), 16)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_turned_alike_with_and_without_gradients(dtype: torch.dtype) -> None:
    """To the nearest of what float64 gives; angles of 100,000 have no place in half precision."""
    x, (table, _) = torch.randn(1, 1, 9, 16).to(dtype).requires_grad_(), Rotary(16)(100_000 + torch.arange(9))
    wide = apply_rotary(x.detach().double(), RotaryTable(table.cos.double(), table.sin.double())).to(dtype)
    with torch.no_grad():
        without = apply_rotary(x, table)
    for found in (apply_rotary(x, table), without):
        assert (found != wide).float().mean() <= 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_model_keeps_every_position_apart(dtype: torch.dtype) -> None:
    """Positions held in bfloat16 leave 513 of 1,024."""
    rotary = Rotary(64).to(dtype)
    for start in (0, FAR - 1024):
        positions = torch.arange(start, start + 1024)
        unit = torch.zeros(1, 1, 1024, 64, dtype=dtype)
        unit[..., :32] = 1
        out = apply_rotary(unit, rotary(positions)[0])
        assert out.dtype == dtype
        assert len(out[0, 0].unique(dim=0)) == 1024
        assert (out.double() - turned(unit, positions, 64)).abs().max() <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]
)
def test_scores_depend_on_the_distance_alone(dtype: torch.dtype, tolerance: float) -> None:
    q, k = torch.randn(2, 1, 4, 1, 64, dtype=dtype)

    def score(i: int, j: int) -> Tensor:
        (at_i, _), (_, at_j) = Rotary(64)(torch.tensor([i])), Rotary(64)(torch.tensor([j]))
        return (apply_rotary(q, at_i).double() * apply_rotary(k, at_j).double()).sum(dim=-1)

    for distance in (0, 1, 100, 5000):
        near, far = score(distance, 0), score(FAR, FAR - distance)
        assert ((near - far).abs() <= tolerance * q.double().norm(dim=-1) * k.double().norm(dim=-1)).all()


# xPos


def xpos_scores(q: Tensor, k: Tensor, i: int, j: int, scale_base: float) -> Tensor:
    """Scores of q at position i and k at j (d,): each pair's product times zeta^((i - j) / scale_base)."""
    d = q.shape[-1]
    decay = xpos_zeta(d) ** ((i - j) / scale_base)
    at_i, at_j = (turned(t.view(1, 1, 1, d), torch.tensor([p]), d).flatten() for t, p in ((q, i), (k, j)))
    return (at_i * at_j * decay).sum()


@pytest.mark.parametrize("start", [0, 7, 100_000])
@pytest.mark.parametrize(("n", "scale_base"), [(1, 512), (24, 512), (25, 20), (300, 64)])
def test_xpos_scores(n: int, scale_base: int, start: int) -> None:
    """The formula, wherever the sequence begins."""
    q, k = torch.randn(2, 16)
    query, key = Rotary(16, xpos_scale_base=scale_base)(torch.arange(start, start + n))
    queries = apply_rotary(q.expand(1, 1, n, 16), query)[0, 0].double()
    keys = apply_rotary(k.expand(1, 1, n, 16), key)[0, 0].double()
    for i, j in {(0, 0), (n - 1, 0), (n - 1, n // 2), (n // 2, n // 3)}:
        exact = xpos_scores(q, k, start + i, start + j, scale_base)
        assert ((queries[i] * keys[j]).sum() - exact).abs() <= 1e-5 * queries[i].norm() * keys[j].norm()


def test_xpos_for_positions_that_differ_by_row() -> None:
    """However far apart the rows are."""
    positions = torch.tensor([[0, 5, 9], [100_300, 100_400, 100_500]])
    q, k = torch.randn(2, 16)
    query, key = Rotary(16, xpos_scale_base=64)(positions)
    queries = apply_rotary(q.expand(2, 1, 3, 16), query)[:, 0].double()
    keys = apply_rotary(k.expand(2, 1, 3, 16), key)[:, 0].double()
    for row, at in enumerate(positions.tolist()):
        exact = xpos_scores(q, k, at[2], at[0], 64)
        assert ((queries[row, 2] * keys[row, 0]).sum() - exact).abs() <= 1e-5 * q.norm() * k.norm()


def test_xpos_is_finite_up_to_where_it_refuses() -> None:
    rotary = Rotary(8, xpos_scale_base=1)
    x = torch.randn(1, 1, 1000, 8)
    refused = []
    for n in range(1, 1000):
        try:
            tables = rotary(torch.arange(n))
        except ValueError as refusal:
            assert "positions: " in str(refusal) and str(n) in str(refusal)
            refused.append(n)
        else:
            assert all(apply_rotary(x[:, :, :n], table).isfinite().all() for table in tables), n
    assert refused[0] > 100 and len(refused) == 1000 - refused[0]


def test_xpos_of_few_positions_far_apart_is_finite_or_refused() -> None:
    try:
        tables = Rotary(8, xpos_scale_base=512)(torch.tensor([0, 200_000]))
    except ValueError as refusal:
        assert "positions" in str(refusal)
    else:
        assert all(apply_rotary(torch.ones(1, 1, 2, 8), table).isfinite().all() for table in tables)


# The module


def test_it_holds_no_tensors() -> None:
    """Nothing to round with the model, to forget on the meta device, or to go stale."""
    rotary = Rotary(16)
    assert not rotary.state_dict() and not list(rotary.parameters()) and not list(rotary.buffers())
    long = apply_rotary(torch.ones(1, 1, 100, 16), rotary(torch.arange(100))[0])
    short = apply_rotary(torch.ones(1, 1, 7, 16), rotary(torch.arange(7))[0])
    assert torch.equal(long[:, :, :7], short)


def test_the_input_is_left_alone() -> None:
    x = torch.randn(1, 2, 5, 16)
    before = x.clone()
    apply_rotary(x, Rotary(8)(torch.arange(5))[0])
    assert torch.equal(x, before)


@pytest.mark.parametrize("dim", [0, 1, 7, -2])
def test_bad_dims_are_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"dim: .*{dim}"):
        Rotary(dim)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"base: .*-1"):
        Rotary(8, base=-1.0)
    with pytest.raises(ValueError, match=r"xpos_scale_base: .*0"):
        Rotary(8, xpos_scale_base=0)


def test_a_table_wider_than_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8.*4|4.*8"):
        apply_rotary(torch.randn(1, 1, 5, 4), Rotary(8)(torch.arange(5))[0])
