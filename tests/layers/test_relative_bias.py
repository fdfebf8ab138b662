"""T5's causal buckets against the published boundaries, other settings against whole-number arithmetic."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from definitions import t5_bucket
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from palm_pytorch.layers import T5RelativeBias
from palm_pytorch.ops import RelativeBias

# The first distance of each of 32 buckets, for a max distance of 128.
STARTS = [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]


def bucket_table(num_buckets: int, max_distance: int) -> RelativeBias:
    """A bias whose value is the bucket's number."""
    return RelativeBias(torch.arange(num_buckets, dtype=torch.float64)[:, None], max_distance)


def test_definition_has_the_published_boundaries() -> None:
    buckets = [t5_bucket(distance, 32, 128) for distance in range(1000)]
    assert [buckets.index(bucket) for bucket in range(32)] == STARTS


def test_buckets_begin_at_the_published_distances() -> None:
    (row,) = bucket_table(32, 128).values(1, 1000)[0].int().tolist()
    buckets = row[::-1]  # the last key is at distance 0
    assert [buckets.index(bucket) for bucket in range(32)] == STARTS
    assert buckets == sorted(buckets)
    assert set(buckets[113:]) == {31}


@given(exact=st.integers(1, 64), max_distance=st.integers(2, 2000))
def test_buckets_of_other_settings(exact: int, max_distance: int) -> None:
    max_distance = max(max_distance, exact + 1)
    buckets = bucket_table(2 * exact, max_distance).values(1, 300)[0, 0].int().tolist()[::-1]
    assert buckets == [t5_bucket(distance, 2 * exact, max_distance) for distance in range(300)]


def test_values_are_scaled_by_head_and_later_keys_count_as_distance_zero() -> None:
    table = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]], requires_grad=True)
    values = RelativeBias(table, 4, scale=0.5).values(3, 4)
    # Queries 1, 2, 3 of keys 0..3; distances 0, 1, 2, 3: a bucket each but the last, where 2.83 begins it.
    first = [[1.0, 0.5, 0.5, 0.5], [1.5, 1.0, 0.5, 0.5], [2.0, 1.5, 1.0, 0.5]]
    assert values.tolist() == [first, [[10 * x for x in row] for row in first]]
    values.sum().backward()
    assert table.grad is not None
    assert table.grad[:, 0].tolist() == [3.0, 1.5, 1.0, 0.5]


def test_module_gives_its_table_settings_and_gradient() -> None:
    module = T5RelativeBias(3, num_buckets=8, max_distance=20, scale=4.0)
    bias = module()
    assert bias.table is module.table and (bias.max_distance, bias.scale) == (20, 4.0)
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == {"table": (8, 3)}
    default = T5RelativeBias(3)()
    assert (default.table.shape, default.max_distance, default.scale) == ((32, 3), 128, 1.0)
    bias.values(5, 9).sum().backward()
    assert module.table.grad is not None and (module.table.grad != 0).any()


def test_a_fresh_table_is_small_and_finite() -> None:
    module = T5RelativeBias(8)
    assert module.table.isfinite().all() and 0 < module.table.std() < 0.1
    with torch.no_grad():
        module.table.fill_(torch.nan)
    module.reset_parameters()
    assert module.table.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"heads": 0}, "heads: .*0"),
        ({"num_buckets": 7}, "num_buckets: .*7"),
        ({"num_buckets": 0}, "num_buckets: .*0"),
        ({"num_buckets": -2}, "num_buckets: .*-2"),
        ({"max_distance": 16}, "max_distance: .*16"),
    ],
)
def test_bad_settings_are_refused_when_built(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        T5RelativeBias(**{"heads": 2, **arguments})


@pytest.mark.parametrize("first", ["plain", "jvp of grad", "fake"])
def test_no_kind_of_tensor_is_left_behind_for_another(first: str) -> None:
    """The buckets' bounds are copied to a device once. Those that a transform or a fake had made served all
    that came later, which then failed."""
    starts = import_module("palm_pytorch.ops.attention.bias")._starts_once
    starts.cache_clear()
    table, far = torch.randn(32, 2, dtype=torch.float64), torch.tensor([0, 5, 500])

    def loss(table: torch.Tensor) -> torch.Tensor:
        return RelativeBias(table, 128).offsets(200).square().sum()

    def jvp_of_grad() -> torch.Tensor:
        return torch.func.jvp(torch.func.grad(loss), (table,), (table,))[1]

    def fake() -> torch.Size:
        with FakeTensorMode():
            return RelativeBias(torch.zeros(32, 2), 128).offsets(200).shape

    def plain() -> list[int]:
        return RelativeBias(table, 128).buckets(far).tolist()

    ways = {"plain": plain, "jvp of grad": jvp_of_grad, "fake": fake}
    ways[first]()
    # Quadratic: the Hessian times the weights is the gradient.
    torch.testing.assert_close(jvp_of_grad(), torch.func.grad(loss)(table))
    assert fake() == (2, 113) and plain() == [0, 5, 31]
