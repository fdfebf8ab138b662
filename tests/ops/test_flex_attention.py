"""FlexAttention as a backend: on a CPU torch computes its outputs alone; gradients are for a GPU."""

from __future__ import annotations

import pytest
import torch
from attention_problems import SIZES, Case, Problem, cases, errors, exact

from palm_pytorch.ops import attention

# Said of torch's own plain path for a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

CASES = cases(SIZES, [None, "alibi", "t5", "t5-other"], [None, "keys", "documents"])


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_outputs_agree_with_the_definition(case: Case) -> None:
    problem = Problem.of(case, torch.float32)
    with torch.no_grad():
        out = attention(
            problem.q, problem.k, problem.v, bias=problem.bias(case), backend="flex", **problem.options
        )
    assert exact(case, torch.float32).errors({"out": out})["out"] <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_on_a_gpu(case: Case) -> None:
    found = errors(case, torch.float32, "flex", "cuda")
    assert max(found.values()) <= 1e-5, found


def test_what_it_cannot_serve_is_refused_by_name() -> None:
    q, kv = torch.randn(1, 2, 5, 16), torch.randn(1, 1, 5, 16)
    with pytest.raises(ValueError, match=r"'flex': dropout_p: .*0\.5.*'sdpa'"):
        attention(q, kv, kv, dropout_p=0.5, backend="flex")
    with pytest.raises(ValueError, match=r"'flex': q, k, v, bias: .*cpu.*'sdpa'"):
        attention(q.requires_grad_(), kv, kv, backend="flex")
