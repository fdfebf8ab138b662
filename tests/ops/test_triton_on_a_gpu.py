"""The kernels on a GPU: what the interpreter cannot vouch for, from rounding to the order of threads.

Shapes: b batch; h query heads; g key/value heads; i, j query and key length; d head dim.
"""

from __future__ import annotations

import pytest
import torch
from attention_problems import Case, Problem, cases, errors
from definitions import error

from palm_pytorch.ops import attention

pytestmark = pytest.mark.gpu

#        b, h, g, i, j, d
SIZES = [(2, 3, 1, 129, 129, 72), (1, 8, 2, 300, 300, 64), (2, 4, 1, 5, 700, 128), (1, 2, 2, 257, 257, 256)]
CASES = cases(SIZES, [None, "alibi", "t5"], [None, "keys", "documents", "unsorted-documents"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_agrees_with_the_definition(case: Case) -> None:
    found = errors(case, torch.float32, "triton", "cuda")
    assert max(found.values()) <= 2e-5, found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision_errs_at_most_twice_as_much_as_the_reference(case: Case, dtype: torch.dtype) -> None:
    found, allowed = (errors(case, dtype, backend, "cuda") for backend in ("triton", "reference"))
    rounding = torch.finfo(dtype).eps
    assert all(found[name] <= 2 * allowed[name] + rounding / 4 for name in found), (found, allowed)


def test_a_long_row_is_as_right_as_a_short_one() -> None:
    """The first key has the highest score, so what is summed up is never scaled: a factor that is a rounding
    error off 1 would add up over the blocks of a row."""
    q, (k, v) = torch.randn(1, 8, 64, 64, device="cuda"), torch.randn(2, 1, 1, 1 << 15, 64, device="cuda")
    q[..., 0], k[..., 0], k[:, :, 0, 0] = 3.0, 0.0, 20.0
    found = attention(q, k, v, backend="triton")
    exact = attention(q.double(), k.double(), v.double(), backend="reference")
    assert error(found, exact) <= 5e-6


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("bias", [None, "alibi", "t5"])
def test_the_same_bits_every_time(bias: str | None, dropout_p: float) -> None:
    case = Case((2, 8, 1, 1000, 1000, 64), bias=bias)
    runs = []
    for _ in range(3):
        problem = Problem.of(case, torch.bfloat16, "cuda")
        torch.manual_seed(3)
        runs.append(problem.solve(case, "triton", dropout_p=dropout_p))
    assert all(torch.equal(runs[0][name], run[name]) for run in runs[1:] for name in run)


def test_dropout_drops_the_same_weights_backward() -> None:
    """The output is linear in v, so the gradient of v is the transpose of the weights that were used."""
    n = 128
    q, k = torch.randn(1, 3, n, n, device="cuda"), torch.randn(1, 1, n, n, device="cuda")
    v = torch.eye(n, device="cuda").expand(1, 1, n, n).clone().requires_grad_()
    weights = attention(q, k, v, dropout_p=0.4, backend="triton")
    grad = torch.randn_like(weights)
    (dv,) = torch.autograd.grad(weights, v, grad)
    assert error(dv, torch.einsum("bhij,bhid->bjd", weights, grad)[:, None]) <= 1e-5


@pytest.mark.parametrize("bias", [None, "alibi", "t5"])
def test_compiled_into_a_graph_it_gives_the_same_bits(bias: str | None) -> None:
    case = Case((2, 4, 1, 129, 129, 64), bias=bias)
    plain, compiled = Problem.of(case, torch.bfloat16, "cuda"), Problem.of(case, torch.bfloat16, "cuda")
    wanted = plain.solve(case, "triton")
    call = torch.compile(attention, fullgraph=True)
    out = call(compiled.q, compiled.k, compiled.v, bias=compiled.bias(case), backend="triton")
    assert all(torch.equal(value, wanted[name]) for name, value in compiled.named(out).items())


def test_auto_takes_the_kernels() -> None:
    case = Case((1, 4, 1, 65, 65, 64), bias="t5")
    found, wanted = (
        Problem.of(case, torch.bfloat16, "cuda").solve(case, name) for name in ("auto", "triton")
    )
    assert all(torch.equal(found[name], wanted[name]) for name in found)
