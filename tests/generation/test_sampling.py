"""Filters against sets written out by hand, samples against the distribution they are drawn from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from palm_pytorch.generation.sampling import (
    Sampling,
    min_p_filter,
    penalise_repetition,
    sample,
    top_k_filter,
    top_p_filter,
)

INF = math.inf


def drawn(logits: list[float], times: int = 4000, **options: Any) -> list[float]:
    """How often each token comes up."""
    tokens = sample(torch.tensor(logits).expand(times, -1), **options)
    return (tokens.bincount(minlength=len(logits)) / times).tolist()


# top_k_filter


def test_all_but_the_largest_are_hidden() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0], [-1.0, -4.0, -2.0, -3.0]])
    assert top_k_filter(logits, 2).tolist() == [[-INF, 4.0, -INF, 3.0], [-1.0, -INF, -2.0, -INF]]
    assert top_k_filter(logits, 1).tolist() == [[-INF, 4.0, -INF, -INF], [-1.0, -INF, -INF, -INF]]
    for k in (4, 5, 1000):
        assert torch.equal(top_k_filter(logits, k), logits)


def test_ties_and_infinities() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [-INF, 2.0, -INF, -INF]])
    assert top_k_filter(logits, 1).tolist() == [[-INF, 3.0, 3.0, -INF], [-INF, 2.0, -INF, -INF]]
    assert top_k_filter(logits, 3).tolist() == [[1.0, 3.0, 3.0, -INF], [-INF, 2.0, -INF, -INF]]


@pytest.mark.parametrize("k", [0, -1])
def test_k_of_none_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: .*{k}"):
        top_k_filter(torch.zeros(1, 4), k)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.integers(1, 40))
def test_what_is_kept_is_at_least_as_large_as_what_is_not(values: list[int], k: int) -> None:
    logits = torch.tensor([values], dtype=torch.float32)
    filtered = top_k_filter(logits, k)
    kept = filtered.isfinite()
    assert kept.sum() >= min(k, len(values))
    assert torch.equal(filtered[kept], logits[kept])
    if not kept.all():
        assert logits[~kept].max() < logits[kept].min()
    assert (logits > logits[kept].min()).sum() < k


# sample


def test_frequencies_are_those_of_the_softmax() -> None:
    """Logits of 0 and ln 3 are 1/4 and 3/4; at temperature 0.5, 1/10 and 9/10."""
    logits = [0.0, math.log(3.0)]
    assert drawn(logits)[0] == pytest.approx(0.25, abs=0.03)
    assert drawn(logits, temperature=0.5)[0] == pytest.approx(0.10, abs=0.02)
    assert drawn(logits, temperature=1e6)[0] == pytest.approx(0.50, abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 0, 1e-10, 1e-45])
def test_temperatures_near_zero_take_the_most_likely(temperature: float) -> None:
    logits = torch.randn(50, 300) * 100
    assert torch.equal(sample(logits, temperature=temperature), logits.argmax(dim=-1))


@pytest.mark.parametrize(
    ("tokens", "filter_thres", "left"),
    [
        (256, 0.0, 256),
        (256, 0.9, 25),  # the older projects' default and vocabulary
        (100, 0.9, 10),  # 1 - 0.9 is less than 0.1
        (10, 0.3, 7),
        (10, 0.95, 1),  # half a token
        (256, 0.999, 1),
        (256, 1.0, 1),
        (1, 0.9, 1),
    ],
)
def test_filter_leaves_the_likeliest_share(tokens: int, filter_thres: float, left: int) -> None:
    """Logits so close that every token left is drawn."""
    order = torch.randperm(tokens)
    logits = (-1e-3 * order).expand(20 * tokens + 100, -1)
    found = sample(logits, filter_thres=filter_thres).unique()
    assert found.tolist() == sorted(order.argsort()[:left].tolist())


def test_tokens_that_are_ruled_out_are_never_drawn() -> None:
    assert drawn([-INF, 0.0, -INF, 0.0])[::2] == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_shape(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 11, dtype=dtype)
    before = logits.clone()
    for temperature in (0.0, 0.7):
        tokens = sample(logits, temperature=temperature, filter_thres=0.5)
        assert tokens.shape == (5,) and tokens.dtype == torch.long
        assert ((tokens >= 0) & (tokens < 11)).all()
    assert torch.equal(logits, before)


def test_half_precision_logits_keep_their_order_at_low_temperature() -> None:
    """Divided in float16, 100 / 0.001 is infinite."""
    logits = torch.tensor([[100.0, 101.0, 90.0]], dtype=torch.float16).expand(100, -1)
    assert (sample(logits, temperature=1e-3) == 1).all()


def test_rows_are_drawn_apart_and_follow_the_seed() -> None:
    def tokens(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return sample(torch.zeros(100, 50))

    assert len(tokens(0).unique()) > 20
    assert torch.equal(tokens(0), tokens(0)) and not torch.equal(tokens(0), tokens(1))


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"temperature": -1.0}, ValueError, "temperature: .*-1.0"),
        ({"temperature": math.nan}, ValueError, "temperature: .*nan"),
        ({"temperature": INF}, ValueError, "temperature: .*inf"),
        ({"temperature": "hot"}, TypeError, "temperature: .*hot"),
        ({"filter_thres": -0.1}, ValueError, "filter_thres: .*-0.1"),
        ({"filter_thres": 1.1}, ValueError, "filter_thres: .*1.1"),
        ({"filter_thres": math.nan}, ValueError, "filter_thres: .*nan"),
        ({"filter_thres": "most"}, TypeError, "filter_thres: .*most"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        sample(torch.zeros(1, 4), **options)


# top_p_filter and min_p_filter


def log(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def kept(logits: Tensor) -> list[int]:
    return logits[0].isfinite().nonzero()[:, 0].tolist()


PROBABILITIES = (0.1, 0.4, 0.05, 0.3, 0.15)


@pytest.mark.parametrize(
    ("p", "left"),
    [
        (1e-9, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 3, 4]),
        (0.84, [1, 3, 4]),
        (0.86, [0, 1, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_the_likeliest_that_reach_p_together_stay(p: float, left: list[int]) -> None:
    logits = log(*PROBABILITIES) + 7
    filtered = top_p_filter(logits, p)
    assert kept(filtered) == left and torch.equal(filtered[0, left], logits[0, left])


def test_rows_are_filtered_apart() -> None:
    logits = torch.cat([log(0.7, 0.2, 0.1), log(0.1, 0.45, 0.45)])
    assert top_p_filter(logits, 0.6).isfinite().tolist() == [[True, False, False], [False, True, True]]
    assert min_p_filter(logits, 0.3).isfinite().tolist() == [[True, False, False], [False, True, True]]


def test_what_is_ruled_out_already_stays_so() -> None:
    logits = torch.tensor([[-INF, 1.0, 1.0, -INF]])
    assert kept(top_p_filter(logits, 0.99)) == [1, 2] and kept(min_p_filter(logits, 0.01)) == [1, 2]


@pytest.mark.parametrize(
    ("p", "left"),
    [
        (0.0, [0, 1, 2, 3, 4]),
        (0.12, [0, 1, 2, 3, 4]),
        (0.13, [0, 1, 3, 4]),
        (0.5, [1, 3]),
        (0.76, [1]),
        (1.0, [1]),
    ],
)
def test_tokens_near_the_likeliest_stay(p: float, left: list[int]) -> None:
    assert kept(min_p_filter(log(*PROBABILITIES) - 3, p)) == left


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_top_p_keeps_enough_and_no_more_than_it_must(values: list[int], p: float) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    probabilities = logits.softmax(dim=-1)[0]
    left = top_p_filter(logits, p)[0].isfinite()
    assert probabilities[left].sum() >= p - 1e-9
    # Without the least likely that are left (ties go together) it would not be enough.
    assert probabilities[left & (logits[0] > logits[0][left].min())].sum() < p


# Sampling


def test_repetition_divides_what_is_positive_and_multiplies_what_is_negative() -> None:
    logits, seen = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[True, True, False, False]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]
    assert penalise_repetition(logits, seen, 0.5).tolist() == [[4.0, -1.0, 2.0, -2.0]]
    assert Sampling(temperature=0, repetition_penalty=2.0).draw(logits, seen=seen).tolist() == [2]


def found_by(logits: Tensor, **options: Any) -> list[int]:
    return Sampling(**options).draw(logits.expand(3000, -1)).unique().tolist()


def test_filters_apply_together_and_after_the_temperature() -> None:
    logits = log(*PROBABILITIES)
    assert found_by(logits) == [0, 1, 2, 3, 4]
    assert found_by(logits, top_k=3) == [1, 3, 4]
    assert found_by(logits, top_k=3, top_p=0.6) == [1, 3]  # of what top-k leaves, 0.4 / 0.85 is not enough
    assert found_by(logits, top_k=4, min_p=0.5) == [1, 3]
    # At temperature 0.5 probabilities are squared: 0.16, 0.09 and 0.0225 of 0.285.
    assert found_by(logits, top_p=0.8, temperature=0.5) == [1, 3]
    assert found_by(logits, top_p=0.8) == [1, 3, 4]


def test_draws_follow_their_generator_alone() -> None:
    logits = torch.zeros(50, 30)
    drawn = [Sampling().draw(logits, generator=torch.Generator().manual_seed(s)).tolist() for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


class Called(TorchDispatchMode):
    """The names of what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(call.name().removeprefix("aten::"))
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({"temperature": 0.0, "top_k": 3, "top_p": 0.9, "min_p": 0.1}, set()),
        ({}, {"multinomial"}),
        ({"top_k": 3, "min_p": 0.1, "top_p": 1.0}, {"multinomial", "topk"}),
        ({"top_p": 0.9}, {"multinomial", "sort"}),
    ],
)
def test_the_vocabulary_is_ordered_only_for_top_p(options: dict[str, Any], needs: set[str]) -> None:
    """And nothing at all is drawn where the likeliest is taken."""
    with Called() as called:
        Sampling(**options).draw(torch.randn(2, 50))
    ordering = {"sort", "topk", "argsort", "multinomial", "_softmax"}
    assert called.names & ordering - {"_softmax"} == needs
    assert ("argmax" in called.names) == (not needs) == ("_softmax" not in called.names)
