"""The kernels, in Triton's interpreter: what `test_attention` does not ask of every backend.

Shapes: b batch; h query heads; g key/value heads; i, j query and key length; d head dim.
"""

from __future__ import annotations

import importlib
import mmap
import sys
from shutil import which
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_problems import SIZES, Case, Problem, cases, errors, leeway, needs_interpreter
from definitions import error, plain_attention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR
from palm_pytorch.ops import RelativeBias, attention

pytestmark = [
    needs_interpreter,
    # The log of the weights of a row that sees nothing, and the maximum of NaNs that a test put there.
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|All-NaN):RuntimeWarning"),
]


def module(name: str) -> Any:
    return importlib.import_module(f"palm_pytorch.ops.attention.{name}")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 keys and 16 or 32 rows, so that few positions are many blocks of every kind. ALiBi comes
    of a product, as on Hopper GPUs."""
    launch = module("triton_kernels.launch")
    wide, square = (launch.Launch(rows, 16, 4, 2, tilted=True) for rows in (32, 16))
    monkeypatch.setattr(launch, "blocks_for", lambda *_, **__: launch.Blocks(wide, square, square, wide))


def spread(sizes: list[Any], masks: list[str | None]) -> list[Case]:
    """Every size with every bias, each of these pairs with a mask and a direction, in turn."""
    biases, found = [None, "alibi", "t5", "t5-other"], []
    for s, size in enumerate(sizes):
        for b, bias in enumerate(biases):
            mask = masks[(s + b) % len(masks)]
            if size[3] > size[4] and "documents" in str(mask):
                mask = "keys"
            found.append(Case(size, causal=(s + b // 2) % 3 > 0, bias=bias, mask=mask))
    return found


# Outputs and gradients


# The interpreter takes its time for every block, and so many positions already have blocks of every kind.
INTERPRETED_SIZES = [(b, h, g, min(i, 193), min(j, 193), d) for b, h, g, i, j, d in SIZES]


@pytest.mark.parametrize("case", spread(INTERPRETED_SIZES, [None, "keys", "documents"]), ids=str)
def test_float32_agrees_with_the_definition(case: Case) -> None:
    found = errors(case, torch.float32, "triton")
    assert max(found.values()) <= 1e-5, found


#              b, h, g, i, j, d
SMALL_SIZES = [
    (2, 3, 1, 67, 67, 16),
    (1, 4, 2, 50, 50, 24),
    (2, 5, 1, 7, 90, 16),
    (1, 2, 2, 40, 23, 8),
    (1, 1, 1, 100, 100, 8),
    (1, 16, 1, 33, 33, 16),
]


@pytest.mark.parametrize(
    "case", spread(SMALL_SIZES, ["keys+documents", None, "documents", "unsorted-documents", "keys"]), ids=str
)
def test_many_small_blocks_agree_with_the_definition(case: Case, small_blocks: None) -> None:
    found = errors.__wrapped__(case, torch.float32, "triton")
    assert max(found.values()) <= 1e-5, found


HALF_CASES = cases([SIZES[1], SIZES[5]], [None, "alibi", "t5", "t5-scaled"], [None, "keys-far"])[::3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision_errs_at_most_twice_as_much_as_the_reference(case: Case, dtype: torch.dtype) -> None:
    found, allowed = errors(case, dtype, "triton"), errors(case, dtype, "reference")
    rounding, times = torch.finfo(dtype).eps, leeway("triton", dtype)
    assert all(found[name] <= times * (allowed[name] + rounding / 8) for name in found), (found, allowed)


@pytest.mark.parametrize("d", [1, 16, 96, 256])
def test_head_dims(d: int) -> None:
    found = errors(Case((1, 2, 1, 33, 33, d), bias="t5"), torch.float32, "triton")
    assert max(found.values()) <= 1e-5, found


def test_the_same_bits_every_time(small_blocks: None) -> None:
    case = Case((2, 4, 1, 67, 67, 16), bias="t5", mask="keys")
    first, second = (Problem.of(case, torch.bfloat16).solve(case, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_slice_of_a_projection_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the output lies as the next projection wants it: merging heads is a view."""
    seen: list[int] = []
    launch = module("triton_kernels.launch")
    view_of = launch.view_of

    def recording(x: Tensor) -> Any:
        seen.append(x.untyped_storage().data_ptr())
        return view_of(x)

    monkeypatch.setattr(launch, "view_of", recording)
    fused = torch.randn(2, 17, 4 * 16 + 2 * 16)
    q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in fused.split([64, 16, 16], dim=-1))
    out = attention(q, k, v, backend="triton")
    assert seen.count(fused.untyped_storage().data_ptr()) == 3
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("i", [96, 48])
def test_documents_elsewhere_are_not_even_read(i: int, causal: bool, small_blocks: None) -> None:
    """All that is theirs is NaN, which a masked product would let through."""
    ids = torch.arange(3).repeat_interleave(32)[None]
    inputs = torch.randn(1, 2, i, 16), torch.randn(1, 1, 96, 16), torch.randn(1, 2, i, 16)

    def solve(seen: Tensor) -> list[Tensor]:
        q, kv, grad = (t.where(seen[-t.shape[2] :, None], torch.nan) for t in inputs)
        leaves = [q, kv, kv.clone()]
        for leaf in leaves:
            leaf.requires_grad_()
        out = attention(*leaves, causal=causal, document_ids=ids, backend="triton")
        results = [out, *torch.autograd.grad(out, leaves, grad)]
        return [t.transpose(1, 2)[:, seen[-t.shape[2] :]] for t in results]

    whole = solve(torch.ones(96, dtype=torch.bool))
    for document in range(3):
        own = ids[0] == document
        wanted = [t[:, own[own.numel() - t.shape[1] :]] for t in whole]
        assert all(torch.equal(a, b) for a, b in zip(solve(own), wanted, strict=True))


@pytest.mark.parametrize("bias", [None, "alibi", "t5"])
@pytest.mark.parametrize("i", [1, 40])
def test_what_lies_beside_a_head_is_not_read(i: int, bias: str | None, small_blocks: None) -> None:
    """Heads of 24 dims in blocks of 32, and positions behind the last: all NaN, which a product with zero
    lets through. On a GPU it may be nobody's memory."""
    case = Case((1, 4, 2, i, 100, 24), bias=bias)
    problem = Problem.of(case, torch.float32)

    def beside(x: Tensor) -> Tensor:
        _, heads, n, d = x.shape
        inside = torch.full((1, heads, n + 16, 32), torch.nan)[:, :, :n, :d]
        return inside.copy_(x.detach())

    def solve(*inputs: Tensor) -> list[Tensor]:
        *leaves, grad = (t.requires_grad_() for t in inputs)
        out = attention(*leaves, bias=problem.bias(case), backend="triton")
        return [out, *torch.autograd.grad(out, leaves, grad.detach())]

    inputs = [t.detach() for t in (problem.q, problem.k, problem.v, problem.grad)]
    results = zip(solve(*map(beside, inputs)), solve(*inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in results)


def test_document_ids_however_they_lie_in_memory() -> None:
    q, kv = torch.randn(2, 2, 19, 16), torch.randn(2, 1, 19, 16)
    ids = torch.randint(3, (19, 2)).T
    found = attention(q, kv, kv, document_ids=ids, backend="triton")
    assert error(found, plain_attention(q, kv, kv, document_ids=ids)) <= 1e-5


def test_document_ids_beyond_32_bits() -> None:
    ids = torch.tensor([[5, 5, 5 + 2**32, 5 + 2**32, 5]])
    q, kv = torch.randn(1, 2, 5, 16), torch.randn(1, 1, 5, 16)
    found = attention(q, kv, kv, document_ids=ids, backend="triton")
    assert error(found, plain_attention(q, kv, kv, document_ids=ids)) <= 1e-5


def test_offsets_beyond_32_bits() -> None:
    """Keys a megabyte apart, in memory that is hardly touched."""
    n, stride = 2100, 2**20
    memory = mmap.mmap(-1, 2 * n * stride)
    k = torch.frombuffer(memory, dtype=torch.float16).as_strided((1, 1, n, 16), (0, 0, stride, 1))
    packed = torch.randn(1, 1, n, 16).half()
    k.copy_(packed)
    results = []
    for keys in (k, packed):
        q = torch.ones(1, 2, 3, 16).half().requires_grad_()
        out = attention(q, keys, keys, backend="triton")
        results.append([out, *torch.autograd.grad(out.sum(), q)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("i", [1, 4])
def test_few_queries_of_grouped_heads_share_out_the_keys(i: int) -> None:
    """Heads between one and all: those of a group lie apart in memory from those of another."""
    found = errors(Case((2, 4, 2, i, 700, 16)), torch.float32, "triton")
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("processors", [3, 100])
def test_few_queries_share_out_the_keys(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding: one query against many keys, some of the shares wholly masked."""
    combined: list[int] = []
    launch = module("triton_kernels.launch")
    run = launch.combine.run

    def recording(*arguments: Any, **constants: Any) -> Any:
        combined.append(constants["SPLITS"])
        return run(*arguments, **constants)

    monkeypatch.setattr(launch.combine, "run", recording)
    monkeypatch.setattr(launch, "processors_of", lambda device: processors)
    q, k, v = torch.randn(2, 8, 1, 64), torch.randn(2, 1, 3000, 64), torch.randn(2, 1, 3000, 64)
    key_mask = torch.arange(3000).expand(2, -1) >= torch.tensor([[100], [2900]])
    found = attention(q, k, v, key_mask=key_mask, backend="triton")
    assert combined == [launch.FEW_SPLITS if processors == 3 else launch.MAX_SPLITS]
    assert error(found, plain_attention(q, k, v, key_mask=key_mask)) <= 1e-5
    assert not attention(q, k, v, key_mask=torch.zeros_like(key_mask), backend="triton").any()


# Dropout


@pytest.mark.parametrize("bias", [None, "t5-two"])
def test_gradients_under_dropout(bias: str | None, small_blocks: None) -> None:
    """Those of the plain definition with the weights that were dropped, read off one-hot values."""
    n, p = 37, 0.4
    problem = Problem.of(Case((1, 4, 2, n, n, n), bias=bias), torch.float32)
    case = Case((1, 4, 2, n, n, n), bias=bias)

    def call(v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention(
            problem.q, problem.k, v, bias=problem.bias(case), dropout_p=p, backend="triton", **problem.options
        )

    kept = call(torch.eye(n).expand_as(problem.v)).detach() != 0
    found = problem.named(call(problem.v))
    q, k, v = (t.detach().double().requires_grad_() for t in (problem.q, problem.k, problem.v))
    leaves = [q, k, v]
    scores = q @ k.repeat_interleave(2, 1).mT * n**-0.5
    if problem.table is not None:
        table = problem.table.detach().double().requires_grad_()
        leaves.append(table)
        scores = scores + RelativeBias(table, 3, 1.5).values(n, n)
    weights = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1) * kept / (1 - p)
    out = weights @ v.repeat_interleave(2, 1)
    wanted = [out, *torch.autograd.grad(out, leaves, problem.grad.double())]
    for (name, value), right in zip(found.items(), wanted, strict=True):
        assert error(value, right) <= 1e-5, name


# torch.library, torch.compile, checkpointing


@pytest.mark.parametrize("options", ["plain", "everything"])
def test_opcheck(options: str) -> None:
    q, k, v = (torch.randn(2, h, 9, 16, requires_grad=True) for h in (4, 2, 2))
    everything: tuple[Any, ...] = (None,) * 6
    if options == "everything":
        documents = module("triton_kernels.launch").document_spans(torch.randint(3, (2, 9)))
        offsets, key_mask = torch.randn(4, 5, requires_grad=True), torch.rand(2, 9) > 0.3
        everything = (None, offsets, key_mask, documents, torch.tensor([7]), None)
    dropout_p = 0.0 if options == "plain" else 0.2
    torch.library.opcheck(module("triton_op")._attention, (q, k, v, *everything, True, 0.25, dropout_p))


@pytest.mark.parametrize("heads", [(8, 2), (4, 4)])
def test_what_is_traced_lies_in_memory_as_what_is_computed(heads: tuple[int, int]) -> None:
    """With the rows shared out among several programs, and without. Compiled code relies on the strides."""
    op, (h, g) = module("triton_op"), heads
    q, grad, k, v = (torch.randn(1, n, 40, 16) for n in (h, h, g, g))
    offsets = torch.randn(5, h).T

    def strides(*tensors: Tensor) -> list[Any]:
        q, k, v, grad, offsets = tensors
        options = (None, offsets, None, None, None, None, True, 0.25, 0.0)
        results = op._attention(q, k, v, *options)
        results += op._attention_backward(grad, q, k, v, *results, True, *options)
        return [(t.shape, t.stride(), t.dtype) for t in results]

    with FakeTensorMode() as mode:
        traced = strides(*(mode.from_tensor(t) for t in (q, k, v, grad, offsets)))
    assert traced == strides(q, k, v, grad, offsets)


@pytest.mark.parametrize("bias", [None, "alibi", "t5"])
def test_compiles_without_a_graph_break(bias: str | None) -> None:
    case = Case((2, 4, 2, 17, 17, 16), bias=bias, mask="keys+documents")
    plain, compiled = Problem.of(case, torch.float32), Problem.of(case, torch.float32)
    wanted = plain.solve(case, "triton")
    call = torch.compile(attention, fullgraph=True, backend="aot_eager")
    out = call(
        compiled.q, compiled.k, compiled.v, bias=compiled.bias(case), backend="triton", **compiled.options
    )
    for name, value in compiled.named(out).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.skipif(not (which("c++") or which("g++")), reason="needs a C++ compiler")
@torch.no_grad()
def test_compiled_code_copies_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which attention is shown a part that the same code writes to."""
    op, shown = module("triton_op"), []
    run = op.run_forward
    monkeypatch.setattr(op, "run_forward", lambda *x: shown.extend(t.data_ptr() for t in x[1:3]) or run(*x))
    stored = [torch.randn(2, 2, 40, 16) for _ in range(2)]
    q, new, at = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16), torch.tensor([19])

    def step(*stored: Tensor) -> Tensor:
        for each in stored:
            each.index_copy_(2, at, new)
        return attention(q, *stored, backend="triton")

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, options={"fx_graph_cache": False})
    out = compiled(*(each[:, :, :24] for each in stored))
    assert shown == [each.data_ptr() for each in stored]
    assert torch.equal(out, attention(q, *(each[:, :, :24] for each in stored), backend="triton"))
    torch.compiler.reset()


def test_checkpointing_draws_the_same_dropout() -> None:
    case = Case((1, 3, 1, 33, 33, 16), bias="t5")

    def gradients(through: Any) -> dict[str, Tensor]:
        problem = Problem.of(case, torch.float32)
        torch.manual_seed(5)
        out = through(
            lambda q: attention(
                q, problem.k, problem.v, bias=problem.bias(case), dropout_p=0.3, backend="triton"
            ),
            problem.q,
        )
        return problem.named(out)

    plain = gradients(lambda call, q: call(q))
    again = gradients(lambda call, q: checkpoint(call, q, use_reentrant=False))
    assert all(torch.equal(plain[name], again[name]) for name in plain)


# Models


@pytest.mark.parametrize("model", [PaLM, PaLMLite, LaMDA, PerceiverAR])
def test_models_agree_with_the_reference(model: Any) -> None:
    lengths = {"max_seq_len": 40, "cross_attn_seq_len": 23} if model is PerceiverAR else {}
    options = {"num_tokens": 32, "dim": 32, "depth": 2, "heads": 3, "dim_head": 16, **lengths}
    tokens = torch.randint(32, (2, 40))
    found = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        net = model(**options, attention_backend=backend)
        loss = net(tokens, labels=tokens)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in net.parameters())])
    assert all(error(a, b) <= 1e-4 for a, b in zip(*found, strict=True))


# Calls it cannot serve


@pytest.mark.parametrize(
    ("dtype", "d", "said"),
    [(torch.float64, 16, "q: .*float64"), (torch.float32, 257, "q: .*257")],
)
def test_what_it_cannot_serve_is_refused_by_name(dtype: torch.dtype, d: int, said: str) -> None:
    q, kv = torch.randn(1, 2, 5, d, dtype=dtype), torch.randn(1, 1, 5, d, dtype=dtype)
    with pytest.raises(ValueError, match=f"'triton': {said}.*'sdpa'"):
        attention(q, kv, kv, backend="triton")
    attention(q, kv, kv)


def test_without_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("triton_op"), "INTERPRETED", False)
    q, kv = torch.randn(1, 2, 5, 16), torch.randn(1, 1, 5, 16)
    with pytest.raises(ValueError, match=r"'triton': q: .*CUDA.*cpu.*'sdpa'"):
        attention(q, kv, kv, backend="triton")


@pytest.mark.parametrize("trouble", ["not there", "old"])
def test_without_a_triton_it_can_use(monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    monkeypatch.delitem(sys.modules, "palm_pytorch.ops.attention.triton_op", raising=False)
    if trouble == "old":
        monkeypatch.setattr(sys.modules["triton"], "__version__", "3.2.0")
    else:
        monkeypatch.setitem(sys.modules, "triton", None)
    q, kv = torch.randn(1, 2, 5, 16), torch.randn(1, 1, 5, 16)
    with pytest.raises(ValueError, match=f"'triton': .*{'3.2.0' if trouble == 'old' else 'triton'}.*'sdpa'"):
        attention(q, kv, kv, backend="triton")
    attention(q, kv, kv)


def test_a_machine_on_which_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers with a GPU and no C compiler: the call goes to another backend, or is refused by name."""

    class Driver:
        @property
        def active(self) -> Any:
            raise RuntimeError("Failed to find C compiler.\nPlease specify")

    op = module("triton_op")
    assert op.cannot_launch() is None
    monkeypatch.setattr(op, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(op.triton.runtime, "driver", Driver())
    monkeypatch.setattr(op, "CANNOT_LAUNCH", op.cannot_launch())
    q = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(1, 1, 5, 16))
    assert "Failed to find C compiler." in op.refusal(q) and "\n" not in op.refusal(q)
    assert importlib.import_module("palm_pytorch.ops.attention")._fastest(q) == "sdpa"
