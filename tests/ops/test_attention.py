"""Every backend against the definition in float64: outputs and all gradients, at awkward shapes.

Shapes: b batch; h query heads; g key/value heads; i, j query and key length; d head dim.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_problems import (
    BIASES,
    MASKS,
    SIZES,
    T5,
    Case,
    Problem,
    cases,
    errors,
    exact,
    leeway,
    needs_interpreter,
    projected,
)
from definitions import ANYWHERE, alibi_bias, error, plain_attention, t5_bias
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from palm_pytorch.ops import AlibiBias, RelativeBias, attention
from palm_pytorch.ops.attention import BACKENDS

blockwise_module = importlib.import_module("palm_pytorch.ops.attention.blockwise")

backends = pytest.mark.parametrize("backend", ANYWHERE)
# The kernels serve any call but for float64.
TRITON = pytest.param("triton", marks=needs_interpreter)
in_float32 = pytest.mark.parametrize("backend", [*ANYWHERE, TRITON])

# The definition itself, by hand


def test_definition_on_paper() -> None:
    """Two queries, two keys; the second query weighs its keys by exp(1) : exp(0)."""
    q, k = torch.tensor([[[[5.0], [1.0]]]]), torch.tensor([[[[1.0], [0.0]]]])
    v = torch.tensor([[[[10.0], [20.0]]]])
    share = 2.718281828 / 3.718281828
    expected = torch.tensor([[[[10.0], [10 * share + 20 * (1 - share)]]]])
    torch.testing.assert_close(plain_attention(q, k, v), expected)
    for backend in ANYWHERE:
        torch.testing.assert_close(attention(q, k, v, backend=backend), expected)


# Outputs and gradients


@backends
@pytest.mark.parametrize("case", cases(SIZES, [None, "alibi", "t5", "t5-other"], [None, "keys"]), ids=str)
def test_float32_agrees_with_the_definition(case: Case, backend: str) -> None:
    found = errors(case, torch.float32, backend)
    assert max(found.values()) <= 1e-5, found


# Enough keys, queries and buckets for the ratio of two rounding errors to mean something.
HALF_SIZES = [SIZES[n] for n in (1, 2, 4, 5)]
HALF_CASES = cases(HALF_SIZES, [None, "alibi", "t5", "t5-scaled"], [None, "keys-far"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [name for name in ANYWHERE if name != "reference"])
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision_errs_at_most_twice_as_much_as_the_reference(
    case: Case, backend: str, dtype: torch.dtype
) -> None:
    found, allowed = errors(case, dtype, backend), errors(case, dtype, "reference")
    rounding = torch.finfo(dtype).eps
    assert all(found[name] <= 2 * allowed[name] + rounding / 4 for name in found), (found, allowed)
    assert max(allowed.values()) <= 4 * rounding, allowed


@pytest.mark.parametrize("bias", [None, "alibi", "t5"])
def test_a_mask_that_changes_before_backward_is_noticed(bias: str | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(blockwise_module, "MAX_KEPT", 0)
    case = Case((2, 3, 1, 17, 17, 16), bias=bias, mask="keys")
    problem = Problem.of(case, torch.float32)
    out = attention(problem.q, problem.k, problem.v, bias=problem.bias(case), **problem.options)
    problem.options["key_mask"].logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@backends
def test_mixed_dtypes_are_cast_under_autocast(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 16)
    wanted = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=backend)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v.bfloat16(), backend=backend), wanted)
    with pytest.raises(TypeError, match="v: expected the dtype of q"):
        attention(q, k, v.bfloat16(), backend=backend)


@pytest.mark.parametrize("bias", [None, "alibi", "t5"])
def test_auto_is_one_of_the_backends(bias: str | None) -> None:
    case = Case((2, 3, 1, 33, 33, 16), bias=bias)
    named = [Problem.of(case, torch.float32).solve(case, backend) for backend in ANYWHERE]
    auto = Problem.of(case, torch.float32).solve(case, "auto")
    assert any(all(torch.equal(auto[name], results[name]) for name in auto) for results in named)


@in_float32
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads_use_neighbouring_queries(backend: str, causal: bool) -> None:
    """Query heads 0 and 1 read key/value head 0, heads 2 and 3 read head 1."""
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    v = torch.stack([torch.full((3, 8), 1.0), torch.full((3, 8), 2.0)])[None]
    out = attention(q, k, v, causal=causal, backend=backend)
    assert out[0, :, :, 0].tolist() == [[1.0] * 3, [1.0] * 3, [2.0] * 3, [2.0] * 3]


@in_float32
@pytest.mark.parametrize("scale", [1.0, 0.01, 30.0])
@pytest.mark.parametrize("bias", [None, "alibi", "t5"])
def test_scale(backend: str, scale: float, bias: str | None) -> None:
    found = errors(Case((2, 3, 1, 17, 17, 16), bias=bias, scale=scale), torch.float32, backend)
    assert max(found.values()) <= 1e-5 * max(1, scale), found


@in_float32
@pytest.mark.parametrize(("n", "scale"), [(1100, 1 / 128), (2100, 1 / 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_alibi_under_a_small_scale(backend: str, dtype: torch.dtype, n: int, scale: float) -> None:
    """With scale 1 / d, ALiBi's part of the scores is large beside q k^T before scaling: float16 ends at
    65,504.
    """
    n = n // 4 if backend == "triton" else n  # which has one way for all lengths, and is interpreted here
    case = Case((1, 1, 1, n, n, 8), bias="alibi", scale=scale)
    found, allowed = errors(case, dtype, backend), errors(case, dtype, "reference")
    times = leeway(backend, dtype)
    assert all(found[name] <= times * allowed[name] + 1e-4 for name in found), (found, allowed)


@backends
def test_contiguous_inputs_and_an_expanded_gradient(backend: str) -> None:
    """`out.sum().backward()` hands the backward pass a tensor without strides."""
    case = Case((2, 4, 2, 33, 33, 16), bias="t5")
    problem, definition = Problem.of(case), Problem.of(case)
    for p in (problem, definition):
        p.grad = torch.ones((), dtype=torch.float64).expand(p.grad.shape)
    problem.q, problem.k, problem.v = (
        t.detach().contiguous().requires_grad_() for t in (problem.q, problem.k, problem.v)
    )
    assert definition.table is not None
    bias = t5_bias(definition.table, 128, 1.0, 33, 33)
    wanted = definition.named(plain_attention(definition.q, definition.k, definition.v, bias=bias))
    for name, value in problem.solve(case, backend).items():
        assert error(value, wanted[name]) <= 1e-12, name


@backends
@pytest.mark.parametrize("kind", ["requires grad", "constant"])
def test_key_and_value_may_be_one_tensor(backend: str, kind: str) -> None:
    """PaLM-lite's; the gradient of both roles adds up. Queries alone may need a gradient, too."""
    q, kv = projected(2, 17, [3, 1], 16)
    q.requires_grad_()
    kv.requires_grad_(kind == "requires grad")
    leaves = [t for t in (q, kv) if t.requires_grad]
    found = torch.autograd.grad(attention(q, kv, kv, backend=backend).square().sum(), leaves)
    wanted = torch.autograd.grad(plain_attention(q, kv, kv).square().sum(), leaves)
    assert all(error(a, b) <= 1e-12 for a, b in zip(found, wanted, strict=True))


# Rows that see nothing


@in_float32
@pytest.mark.parametrize("bias", [None, "alibi", "t5"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_query_without_keys_gives_zeros_and_takes_no_gradient(
    backend: str, bias: str | None, causal: bool
) -> None:
    case = Case((2, 3, 1, 19, 7, 16), causal, bias)
    problem = Problem.of(case, torch.float32)
    problem.options["key_mask"] = torch.tensor([[False] * 2 + [True] * 5, [False] * 7])
    found = problem.solve(case, backend)
    blind = torch.zeros(2, 19, dtype=torch.bool)
    blind[0, : 12 + 2 if causal else 0] = True  # query 12 is the first to see key 0, query 14 to see key 2
    blind[1] = True
    for name in ("out", "dq"):
        rows = found[name].transpose(1, 2)
        assert (rows[blind] == 0).all(), name
        assert (rows[~blind] != 0).any(dim=-1).any(dim=-1).sum() >= (~blind).sum() - 1, (
            name
        )  # a lone key has dq 0
    for name in ("dk", "dv"):
        assert (found[name][0, :, :2] == 0).all() and (found[name][1] == 0).all(), name
        assert found[name][0, :, 2:].isfinite().all()


@in_float32
def test_masked_keys_change_nothing(backend: str) -> None:
    case = Case((2, 3, 1, 33, 33, 16), bias="t5", mask="keys")
    before = Problem.of(case, torch.float32)
    after = Problem.of(case, torch.float32)
    hidden = ~before.options["key_mask"]
    with torch.no_grad():
        for tensor in (after.k, after.v):
            tensor.transpose(1, 2)[hidden] = 1e4
    found, wanted = after.solve(case, backend), before.solve(case, backend)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-6)


# Documents


@in_float32
@pytest.mark.parametrize("causal", [True, False])
def test_fewer_queries_than_keys_are_the_last_positions_of_their_documents(
    backend: str, causal: bool
) -> None:
    """Which of six keys the last three of six positions weigh, read off one-hot values."""
    ids = torch.tensor([[7, 7, 3, 3, 7, 3], [1, 1, 1, 1, 1, 2]])
    q, k, v = torch.randn(2, 2, 3, 16), torch.randn(2, 1, 6, 16), torch.eye(6, 16).expand(2, 1, 6, 16)
    out = attention(q, k, v, causal=causal, document_ids=ids, backend=backend)
    expected = [
        [[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 1]],
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]],
    ]
    if not causal:
        expected[0][0][5] = expected[1][0][4] = 1
    assert ((out != 0).int() == F.pad(torch.tensor(expected), (0, 10))[:, None]).all()


# Long sequences


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_alibi_is_exact_at_131072_keys(backend: str, dtype: torch.dtype) -> None:
    case = Case((1, 3, 1, 4, 131_072, 16), bias="alibi")
    found = errors(case, dtype, backend)
    allowed = dict.fromkeys(found, 2e-5)
    if dtype != torch.float32:
        allowed = {name: 2 * e for name, e in errors(case, dtype, "reference").items()}
    assert all(found[name] <= allowed[name] for name in found), (found, allowed)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any tensor has that is made under it."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            # What is expanded takes no memory: as many elements as lie between its first and its last.
            if isinstance(t, Tensor) and t.numel():
                span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                self.numel = max(self.numel, min(span, t.numel()))
        return result


@pytest.mark.parametrize("bias", [None, "alibi", "t5"])
@pytest.mark.parametrize("mask", [None, "keys+documents"])
def test_blockwise_memory_does_not_grow_with_the_square(
    monkeypatch: pytest.MonkeyPatch, bias: str | None, mask: str | None
) -> None:
    monkeypatch.setitem(blockwise_module.MAX_SCORES, "cpu", 1 << 14)
    monkeypatch.setattr(blockwise_module, "MAX_KEPT", 0)
    n = 1000
    case = Case((1, 3, 1, n, n, 16), bias=bias, mask=mask)
    problem = Problem.of(case, torch.float32)
    with LargestTensor() as largest:
        problem.solve(case, "blockwise")
    assert largest.numel <= n * n / 4


@pytest.mark.parametrize("i", [1, 64])
def test_far_reaching_relative_bias_costs_no_more_than_the_keys_there_are(i: int) -> None:
    """T5's `max_distance` may lie far beyond the sequence."""
    q, k, v = torch.randn(2, 4, i, 8), torch.randn(2, 1, 64, 8), torch.randn(2, 1, 64, 8)
    bias = RelativeBias(torch.randn(32, 4, requires_grad=True), max_distance=20_000)
    with LargestTensor() as largest:
        attention(q, k, v, bias=bias, backend="blockwise").sum().backward()
    assert largest.numel <= 2 * 4 * 128 * 300 * 4


# Blocks


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three queries, one key/value head at a time, no weights kept for backward."""
    monkeypatch.setattr(blockwise_module, "MAX_ROWS", 3)
    monkeypatch.setattr(blockwise_module, "MAX_KEPT", 0)
    monkeypatch.setitem(blockwise_module.MAX_SCORES, "cpu", 1)
    torch_backends = importlib.import_module("palm_pytorch.ops.attention.torch_backends")
    monkeypatch.setattr(torch_backends, "ALIBI_QUERIES", 3)


SMALL_SIZES = [(2, 3, 1, 17, 17, 16), (2, 4, 2, 7, 20, 8), (3, 2, 2, 20, 7, 8)]


SMALL_CASES = cases(SMALL_SIZES, [None, "alibi", "t5", "t5-other"], MASKS)


@pytest.mark.parametrize("backend", ["blockwise", "sdpa"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_many_small_blocks_agree_with_the_definition(case: Case, backend: str, small_blocks: None) -> None:
    found = errors(case, torch.float64, backend)
    assert max(found.values()) <= 1e-12, found


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", BIASES[:3])
def test_weights_are_the_same_kept_or_computed_again(
    bias: str | None, dropout_p: float, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case((2, 4, 2, 17, 17, 8), bias=bias, mask="keys+documents")
    results = []
    for most in (0, 1 << 20):
        monkeypatch.setattr(blockwise_module, "MAX_KEPT", most)
        problem = Problem.of(case, torch.float32)
        results.append(problem.solve(case, "blockwise", dropout_p=dropout_p))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("bias", [None, "alibi", "t5"])
def test_half_precision_gradients_survive_many_blocks(bias: str | None, small_blocks: None) -> None:
    """Sums over blocks in bfloat16 would stop growing after some hundred."""
    case = Case((1, 3, 1, 400, 400, 16), bias=bias)
    problem = Problem.of(case, torch.bfloat16)
    problem.grad = torch.ones_like(problem.grad)
    plain = Problem.of(case, torch.bfloat16)
    plain.grad = problem.grad
    wide = Problem.of(case, torch.bfloat16)
    wide.q, wide.k, wide.v, wide.grad = (
        t.detach().double().requires_grad_() for t in (wide.q, wide.k, wide.v, problem.grad)
    )
    if wide.table is not None:
        wide.table = wide.table.detach().double().requires_grad_()
    truth, reference = wide.solve(case, "reference"), plain.solve(case, "reference")
    for name, value in problem.solve(case, "blockwise").items():
        assert error(value, truth[name]) <= 2 * error(reference[name], truth[name]) + 2e-3, name


GRADCHECK_CASES = cases([(2, 2, 1, 3, 3, 2), (1, 2, 2, 2, 4, 2)], [None, "alibi", "t5-two"], [None, "keys"])


@backends
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=str)
def test_gradcheck(case: Case, backend: str) -> None:
    problem = Problem.of(case)
    if problem.table is None:
        bias, inputs = problem.bias(case), problem.leaves
    else:
        bias, inputs = None, [*problem.leaves[:3], problem.table]

    def call(q: Tensor, k: Tensor, v: Tensor, *table: Tensor) -> Tensor:
        learned = RelativeBias(table[0], *T5["t5-two"][1:]) if table else bias
        return attention(q, k, v, bias=learned, backend=backend, **problem.options)

    torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("backend", ["sdpa", "blockwise"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    b=st.integers(1, 3),
    g=st.integers(1, 3),
    repeats=st.integers(1, 3),
    i=st.integers(1, 20),
    j=st.integers(1, 20),
    d=st.integers(1, 20),
    causal=st.booleans(),
    bias=st.sampled_from(BIASES),
    mask=st.sampled_from(MASKS),
)
def test_any_shape_and_option(
    small_blocks: None, backend: str, b: int, g: int, repeats: int, i: int, j: int, d: int, **options: Any
) -> None:
    if "documents" in str(options["mask"]):
        i = min(i, j)
    case = Case((b, g * repeats, g, i, j, d), **options)
    found = errors(case, torch.float64, backend)
    assert max(found.values()) <= 1e-12, found


# Dropout


def weights_after_dropout(backend: str, n: int, p: float, **options: Any) -> tuple[Tensor, Tensor]:
    """The weights with and without dropout, (b, h, n, n): what attention makes of one-hot values."""
    q, k = torch.randn(2, 4, n, n), torch.randn(2, 2, n, n)
    v = torch.eye(n).expand(2, 2, n, n)
    dropped = attention(q, k, v, causal=False, dropout_p=p, backend=backend, **options)
    return dropped, attention(q, k, v, causal=False, backend=backend, **options)


@in_float32
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_dropout_scales_what_it_keeps(backend: str, p: float, small_blocks: None) -> None:
    dropped, weights = weights_after_dropout(backend, 64, p)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / (1 - p), rtol=1e-4, atol=1e-6)
    # 32,768 weights: four standard deviations.
    assert abs((~kept).float().mean().item() - p) <= 4 * (p * (1 - p) / kept.numel()) ** 0.5


@in_float32
def test_dropout_draws_every_position_by_itself(backend: str, small_blocks: None) -> None:
    kept = weights_after_dropout(backend, 64, 0.5)[0] != 0
    rows = kept.flatten(0, 2).float()
    assert len(rows.unique(dim=0)) == len(rows)
    # Correlation between any two of the 512 rows: standard deviation 1/8.
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() <= 6 / 8


@in_float32
def test_dropout_drops_the_same_weights_backward(backend: str, small_blocks: None) -> None:
    """The output is linear in v, so the gradient of v is the transpose of the weights that were used."""
    n = 16
    q, k = torch.randn(1, 3, n, n), torch.randn(1, 1, n, n)
    v = torch.eye(n).expand(1, 1, n, n).clone().requires_grad_()
    weights = attention(q, k, v, dropout_p=0.4, backend=backend)
    grad = torch.randn_like(weights)
    (dv,) = torch.autograd.grad(weights, v, grad)
    torch.testing.assert_close(dv, torch.einsum("bhij,bhid->bjd", weights, grad)[:, None])


@backends
@pytest.mark.parametrize("bias", ["alibi", "t5-two"])
def test_gradcheck_with_dropout(backend: str, bias: str, small_blocks: None) -> None:
    case = Case((1, 2, 1, 5, 5, 2), bias=bias)
    problem = Problem.of(case)

    def call(q: Tensor, k: Tensor, v: Tensor, *table: Tensor) -> Tensor:
        torch.manual_seed(0)
        learned = RelativeBias(table[0], *T5["t5-two"][1:]) if table else problem.bias(case)
        return attention(q, k, v, bias=learned, dropout_p=0.3, backend=backend)

    torch.autograd.gradcheck(call, problem.leaves)


@in_float32
def test_dropout_follows_the_seed(backend: str) -> None:
    q, kv = torch.randn(1, 2, 9, 8), torch.randn(1, 1, 9, 8)

    def call(seed: int, p: float) -> Tensor:
        torch.manual_seed(seed)
        return attention(q, kv, kv, dropout_p=p, backend=backend)

    assert torch.equal(call(0, 0.5), call(0, 0.5))
    assert not torch.equal(call(0, 0.5), call(1, 0.5))
    assert torch.equal(call(0, 0.0), attention(q, kv, kv, backend=backend))


# Precision and device


@in_float32
def test_autocast_computes_in_its_dtype(backend: str) -> None:
    case = Case((2, 3, 1, 33, 33, 16), bias="t5")
    wide, rounded = Problem.of(case, torch.float32), Problem.of(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(wide.q, wide.k, wide.v, bias=wide.bias(case), backend=backend)
    assert found.dtype == torch.bfloat16
    q, k, v = (t.bfloat16() for t in (rounded.q, rounded.k, rounded.v))
    wanted = attention(q, k, v, bias=rounded.bias(case), backend=backend)
    torch.testing.assert_close(found, wanted)
    found.backward(wide.grad.bfloat16())
    wanted.backward(wide.grad.bfloat16())
    for name in ("q", "k", "v", "table"):
        a, b = getattr(wide, name).grad, getattr(rounded, name).grad
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, msg=name)


@backends
def test_autocast_leaves_float64_alone_as_a_matrix_product_does(backend: str) -> None:
    q, kv = torch.randn(1, 2, 5, 8, dtype=torch.float64), torch.randn(1, 1, 5, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, kv, kv, backend=backend).dtype == torch.matmul(q, q.mT).dtype == torch.float64


@in_float32
def test_backward_inside_autocast(backend: str) -> None:
    """Forward outside autocast and backward inside."""
    case = Case((2, 3, 1, 33, 33, 16), bias="t5")
    problem = Problem.of(case, torch.float32)
    out = attention(problem.q, problem.k, problem.v, bias=problem.bias(case), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = problem.named(out)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert max(exact(case, torch.float32).errors(found).values()) <= 1e-2


@in_float32
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_of_another_dtype(backend: str, dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    q, kv = torch.randn(1, 3, 9, 16, dtype=dtype), torch.randn(1, 1, 9, 16, dtype=dtype)
    table = torch.randn(32, 3, dtype=table_dtype, requires_grad=True)
    for bias in (RelativeBias(table), AlibiBias(torch.tensor([0.5, 0.25, 0.125], dtype=table_dtype))):
        for causal in (True, False):
            out = attention(q, kv, kv, bias=bias, causal=causal, backend=backend)
            assert out.dtype == dtype
            values = t5_bias(table.double(), 128, 1.0, 9, 9)
            if isinstance(bias, AlibiBias):
                values = alibi_bias(bias.slopes.double(), 9, 9)
            wanted = plain_attention(q.double(), kv.double(), kv.double(), bias=values, causal=causal)
            assert error(out, wanted) <= (2e-5 if dtype == torch.float32 else 2e-2)
    attention(q, kv, kv, bias=RelativeBias(table), backend=backend).sum().backward()
    assert table.grad is not None and table.grad.dtype == table_dtype


@pytest.mark.parametrize(("i", "j"), [(1, 1), (1, 40), (17, 17), (5, 300), (40, 9)])
def test_windows_on_distances_are_the_bias_and_so_is_their_gradient(i: int, j: int) -> None:
    table = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    bias, grad = RelativeBias(table, 50, 0.7), torch.randn(3, i, j, dtype=torch.float64)
    found, wanted = bias.windows(i, j), bias.values(i, j)
    assert torch.equal(found, wanted)
    (found,), (wanted,) = (torch.autograd.grad(t, table, grad) for t in (found, wanted))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12 * grad.numel())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases(SIZES[1:6], ["alibi", "t5"], [None, "keys"]), ids=str)
def test_on_a_gpu(case: Case, backend: str) -> None:
    found = errors(case, torch.float32, backend, "cuda")
    assert max(found.values()) <= 1e-5, found
    found, allowed = (errors(case, torch.bfloat16, name, "cuda") for name in (backend, "reference"))
    assert all(found[name] <= 2 * allowed[name] + 1e-3 for name in found), (found, allowed)


# Bad input


def q_k_v(**changes: Any) -> dict[str, Any]:
    """A call that is right but for the changes."""
    kv = torch.randn(2, 2, 5, 8)
    return {"q": torch.randn(2, 4, 5, 8), "k": kv, "v": kv, **changes}


MASK = torch.ones(2, 5, dtype=torch.bool)
IDS = torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"q": None}, TypeError, "q"),
        ({"k": [1.0]}, TypeError, "k"),
        ({"v": None}, TypeError, "v"),
        ({"q": torch.randn(4, 5, 8)}, ValueError, r"q.*\(4, 5, 8\)"),
        ({"k": torch.randn(2, 5, 8), "v": torch.randn(2, 5, 8)}, ValueError, r"k.*\(2, 5, 8\)"),
        ({"v": torch.randn(2, 2, 6, 8)}, ValueError, r"v: .*\(2, 2, 6, 8\)"),
        ({"q": torch.randn(3, 4, 5, 8)}, ValueError, r"k: .*batch 3"),
        ({"q": torch.randn(2, 4, 5, 16)}, ValueError, r"k: .*dim_head 16"),
        ({"q": torch.randn(2, 3, 5, 8)}, ValueError, "k: .*divides the 3"),
        ({"q": torch.randn(2, 1, 5, 8)}, ValueError, "k: .*divides the 1"),
        ({"q": torch.randn(2, 4, 0, 8)}, ValueError, "q"),
        ({"k": torch.randn(2, 2, 0, 8), "v": torch.randn(2, 2, 0, 8)}, ValueError, "k"),
        ({"q": torch.ones(2, 4, 5, 8, dtype=torch.long)}, TypeError, "q: .*int64"),
        ({"q": torch.ones(2, 4, 5, 8, dtype=torch.complex64)}, TypeError, "q: .*complex64"),
        ({"k": torch.randn(2, 2, 5, 8).double()}, TypeError, "k: .*float64"),
        ({"v": torch.randn(2, 2, 5, 8).bfloat16()}, TypeError, "v: .*bfloat16"),
        ({"v": torch.randn(2, 2, 5, 8, device="meta")}, ValueError, "v: .*meta"),
        ({"bias": torch.zeros(4, 5, 5)}, TypeError, "bias: .*Tensor"),
        ({"bias": AlibiBias(torch.ones(3))}, ValueError, "bias: .*4 heads, got 3"),
        ({"bias": RelativeBias(torch.ones(32, 2))}, ValueError, "bias: .*4 heads, got 2"),
        ({"bias": AlibiBias(torch.ones(4, device="meta"))}, ValueError, "bias: .*meta"),
        ({"key_mask": MASK.float()}, TypeError, "key_mask: .*float32"),
        ({"key_mask": [True] * 5}, TypeError, "key_mask: "),
        ({"key_mask": MASK[:, :4]}, ValueError, r"key_mask: .*\(2, 4\)"),
        ({"key_mask": MASK[:1]}, ValueError, r"key_mask: .*\(1, 5\)"),
        ({"key_mask": MASK.to("meta")}, ValueError, "key_mask: .*meta"),
        ({"document_ids": IDS.float()}, TypeError, "document_ids: .*float32"),
        ({"document_ids": MASK}, TypeError, "document_ids: .*bool"),
        ({"document_ids": 3}, TypeError, "document_ids: "),
        ({"document_ids": IDS[:, 1:]}, ValueError, r"document_ids: .*\(2, 4\)"),
        (
            {"document_ids": IDS, "q": torch.randn(2, 4, 7, 8)},
            ValueError,
            "document_ids: .*7 queries and 5 keys",
        ),
        ({"document_ids": IDS.to("meta")}, ValueError, "document_ids: .*meta"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: .*-0.1"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: .*1.0"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p: .*nan"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p: "),
        ({"scale": "large"}, TypeError, "scale: "),
        ({"scale": 0.0}, ValueError, "scale: .*0"),
        ({"scale": -0.1}, ValueError, "scale: .*-0.1"),
        ({"scale": float("nan")}, ValueError, "scale: .*nan"),
        ({"scale": float("inf")}, ValueError, "scale: .*inf"),
        ({"backend": "cudnn"}, ValueError, "backend: .*'cudnn'"),
        ({"backend": None}, (TypeError, ValueError), "backend: "),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=rf"(^|\W){said}"):
        attention(**q_k_v(**changes))


@pytest.mark.parametrize(
    ("bias", "arguments", "kind", "said"),
    [
        (AlibiBias, [[0.5, 0.25]], TypeError, "slopes: "),
        (AlibiBias, [torch.ones(2, 2)], ValueError, r"slopes: .*\(2, 2\)"),
        (AlibiBias, [torch.ones(2, dtype=torch.long)], TypeError, "slopes: .*int64"),
        (AlibiBias, [torch.ones(2, requires_grad=True)], ValueError, "slopes: "),
        (RelativeBias, [[[0.5]]], TypeError, "table: "),
        (RelativeBias, [torch.ones(32)], ValueError, r"table: .*\(32,\)"),
        (RelativeBias, [torch.ones(32, 2, dtype=torch.long)], TypeError, "table: .*int64"),
        (RelativeBias, [torch.ones(31, 2)], ValueError, "31"),
        (RelativeBias, [torch.ones(0, 2)], ValueError, "0"),
        (RelativeBias, [torch.ones(32, 2), 16], ValueError, "max_distance: .*16"),
        (RelativeBias, [torch.ones(32, 2), "far"], TypeError, "max_distance: "),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_bias_is_refused_by_name(
    bias: Any, arguments: list[Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        bias(*arguments)


@pytest.mark.parametrize("backend", ANYWHERE)
def test_a_second_derivative_is_right_or_refused(backend: str) -> None:
    q, kv = torch.randn(1, 2, 5, 16, requires_grad=True), torch.randn(1, 1, 5, 16)
    out = attention(q, kv, kv, backend=backend).sum()
    if backend == "reference":
        (slope,) = torch.autograd.grad(out, q, create_graph=True)
        assert slope.square().sum().requires_grad
        return
    with pytest.raises(
        (RuntimeError, NotImplementedError), match=r"second derivative|not implemented|autograd"
    ):
        torch.autograd.grad(torch.autograd.grad(out, q, create_graph=True)[0].square().sum(), q)


def test_a_call_leaves_its_inputs_alone() -> None:
    case = Case((2, 3, 1, 33, 33, 16), bias="t5", mask="keys+documents")
    for backend in ANYWHERE:
        problem, untouched = Problem.of(case, torch.float32), Problem.of(case, torch.float32)
        problem.solve(case, backend)
        for name in ("q", "k", "v", "table", "grad"):
            assert torch.equal(getattr(problem, name), getattr(untouched, name)), (backend, name)


def test_blockwise_on_a_device_without_autocast() -> None:
    """Its backward pass switches autocast off, which such devices do not know."""
    q, kv = torch.randn(1, 2, 5, 8, device="meta", requires_grad=True), torch.randn(1, 1, 5, 8, device="meta")
    (found,) = torch.autograd.grad(attention(q, kv, kv, backend="blockwise").sum(), q)
    assert found.shape == q.shape and found.is_meta


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blockwise", TRITON])
@pytest.mark.parametrize("n", [33, 113, 114, 130])
def test_the_far_bucket_s_gradient(n: int, backend: str) -> None:
    """It is what no key is in, or a few. As what the other buckets' leave it was their rounding."""
    q, k, v, grad = (torch.randn(2, h, n, 16).bfloat16() for h in (4, 1, 1, 4))
    table = torch.randn(32, 4).mul(0.3).bfloat16()

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        bias = RelativeBias(table.to(dtype).requires_grad_(), 128, 4.0)
        out = attention(q.to(dtype), k.to(dtype), v.to(dtype), bias=bias, backend=backend)
        return torch.autograd.grad(out, bias.table, grad.to(dtype))[0]

    exact, found = gradient(torch.float64, "reference"), gradient(torch.bfloat16, backend)
    if n <= 113:
        assert (found[-1] == 0).all() and (exact[-1] == 0).all()
    elif backend != "triton":  # where the sum of all is 0
        assert error(found[-1], exact[-1]) <= 0.06


def test_the_definition_sums_a_table_s_gradient_in_float32() -> None:
    """Of half a million scores, in bfloat16, it was a tenth off."""
    q, k, v, grad = (torch.randn(1, h, 1024, 16).bfloat16() for h in (2, 1, 1, 2))
    table = torch.randn(32, 2).mul(0.3).bfloat16()
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        bias = RelativeBias(table.to(dtype).requires_grad_(), 128, 4.0)
        out = attention(q.to(dtype), k.to(dtype), v.to(dtype), bias=bias, backend="reference")
        found.append(torch.autograd.grad(out, bias.table, grad.to(dtype))[0])
    assert error(found[1], found[0]) <= 1e-2


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_the_output_may_be_changed_in_place(backend: str) -> None:
    """As by a hook that switches a head off. (Torch's kernel goes on from its output, and refuses.)"""
    q, kv = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 1, 5, 8)
    out = attention(q, kv, kv, backend=backend, bias=AlibiBias(torch.ones(2)))
    out[:, :1].zero_()
    (found,) = torch.autograd.grad(out.sum(), q)
    assert (found[:, 0] == 0).all() and (found[:, 1, 1:] != 0).any()


def test_a_batch_of_gradients_is_refused_by_name() -> None:
    def last(x: Tensor) -> Tensor:
        return attention(x, x, x, backend="blockwise")[0, 0, -1]

    x = torch.randn(1, 2, 5, 8)
    with pytest.raises(RuntimeError, match=r"'blockwise': takes no batch of gradients.*'reference' does"):
        torch.autograd.functional.jacobian(last, x, vectorize=True)
    torch.autograd.functional.jacobian(last, x)
