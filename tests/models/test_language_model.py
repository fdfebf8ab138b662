"""What holds for all four models: causality, loss, initialisation, precision, saving, bad input."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from definitions import error
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR
from palm_pytorch.ops import attention, cross_entropy

V = 37
SHAPE: dict[str, Any] = {"num_tokens": V, "dim": 24, "depth": 2, "heads": 3, "dim_head": 16, "ff_mult": 2}
LENGTHS = {"max_seq_len": 40, "cross_attn_seq_len": 9}
MODELS: dict[type[nn.Module], dict[str, Any]] = {PaLM: {}, PaLMLite: {}, LaMDA: {}, PerceiverAR: LENGTHS}

models = pytest.mark.parametrize("kind", MODELS, ids=[kind.__name__ for kind in MODELS])
Kind = Callable[..., nn.Module]


def build(kind: Kind, **options: Any) -> nn.Module:
    return kind(**{**SHAPE, **MODELS[kind], **options})  # type: ignore[index]


def random_tokens(n: int = 30) -> Tensor:
    return torch.randint(V, (2, n))


def first_prediction(kind: Kind) -> int:
    """The first position that logits are given for."""
    return LENGTHS["cross_attn_seq_len"] if kind is PerceiverAR else 0


# Causality


@models
@torch.no_grad()
def test_a_token_changes_the_logits_from_its_own_position_on(kind: Kind) -> None:
    net, tokens, first = build(kind).double(), random_tokens(), first_prediction(kind)
    before = net(tokens)
    for position in (0, 5, 17, 29):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % V
        difference = (net(changed) - before).abs().amax(dim=-1)
        assert (difference[:, : max(0, position - first)] <= 1e-13).all()
        assert (difference[:, max(0, position - first) :] > 1e-9).all()


@models
@torch.no_grad()
def test_order_matters(kind: Kind) -> None:
    net, tokens = build(kind).double(), random_tokens()
    swapped = tokens.clone()
    swapped[:, [2, 4]] = tokens[:, [4, 2]]
    swapped[:, 2] = (tokens[:, 4] + (tokens[:, 4] == tokens[:, 2])) % V
    assert (net(swapped)[:, -1] - net(tokens)[:, -1]).abs().max() > 1e-9


@models
@torch.no_grad()
def test_rows_do_not_see_each_other(kind: Kind) -> None:
    net, tokens = build(kind).double(), random_tokens()
    assert error(net(tokens)[:1], net(tokens[:1])) <= 1e-13


@models
@torch.no_grad()
def test_calls_of_other_lengths_leave_nothing_behind(kind: Kind) -> None:
    net, tokens = build(kind).double(), random_tokens()
    fresh = {n: copy.deepcopy(net)(tokens[:, :n]) for n in (30, 12, 25)}
    for n, expected in fresh.items():
        assert torch.equal(net(tokens[:, :n]), expected)


# Loss


@models
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_loss_is_the_cross_entropy_of_the_logits(kind: Kind, ignore_index: int) -> None:
    net, tokens, labels = build(kind).double(), random_tokens(), random_tokens()
    labels[:, ::3] = ignore_index
    found = net(tokens, labels=labels, ignore_index=ignore_index)
    logits = net(tokens).flatten(0, 1)
    counted = labels[:, first_prediction(kind) :].flatten()
    wanted = F.cross_entropy(logits, counted, ignore_index=ignore_index)
    assert found.shape == () and error(found, wanted) <= 1e-12
    weights = dict(net.named_parameters())
    gradients = (torch.autograd.grad(loss, list(weights.values())) for loss in (found, wanted))
    for name, a, b in zip(weights, *gradients, strict=True):
        assert error(a, b) <= 1e-9, name


@models
def test_z_loss(kind: Kind) -> None:
    net, tokens, labels = build(kind).double(), random_tokens(), random_tokens()
    log_z = net(tokens).logsumexp(dim=-1)
    with_z, plain = net(tokens, labels=labels, z_loss=0.1), net(tokens, labels=labels)
    assert error(with_z - plain, 0.1 * log_z.square().mean()) <= 1e-10


@models
def test_byte_zero_is_a_target_like_any_other(kind: Kind) -> None:
    net, tokens = build(kind), random_tokens()
    assert net(tokens, labels=torch.zeros_like(tokens)).item() > 0.1


@models
def test_loss_never_holds_all_logits(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm"):
                self.numel = max(self.numel, result.numel())
            return result

    v = 5000
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 4 * v)
    net, tokens = build(kind, num_tokens=v, dim=4), random_tokens()
    with Largest() as largest:
        net(tokens, labels=tokens).backward()
    assert largest.numel <= 4 * v


@models
def test_every_parameter_learns(kind: Kind) -> None:
    net = build(kind)
    net(random_tokens(), labels=random_tokens()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@models
def test_a_few_steps_learn_a_sequence_by_heart(kind: Kind) -> None:
    net, tokens = build(kind), random_tokens()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = net(tokens[:, :-1], labels=tokens[:, 1:])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(V), abs=0.3)
    assert losses[-1] < 0.5 * losses[0]


# Transforms of torch.func


@models
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func(kind: Kind) -> None:
    """The gradient, that of each row, and the change of it along a direction."""
    net, tokens, labels = build(kind).double(), random_tokens(), random_tokens()
    labels[0, 20] = -100
    weights = dict(net.named_parameters())

    def loss(weights: dict[str, Tensor], tokens: Tensor, labels: Tensor) -> Tensor:
        return functional_call(net, weights, tokens, {"labels": labels, "z_loss": 1e-4})

    def by_autograd(rows: slice) -> dict[str, Tensor]:
        wanted = net(tokens[rows], labels=labels[rows], z_loss=1e-4)
        return dict(zip(weights, torch.autograd.grad(wanted, list(weights.values())), strict=True))

    def along(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return sum(float((one[name] * other[name]).sum()) for name in weights)

    whole = by_autograd(slice(None))
    found = grad(loss)(weights, tokens, labels)
    each = vmap(grad(loss), (None, 0, 0))(weights, tokens[:, None], labels[:, None])
    for name in weights:
        assert error(found[name], whole[name]) <= 1e-12
        assert error(each[name][1], by_autograd(slice(1, 2))[name]) <= 1e-12
    u, v = ({name: torch.randn_like(weight) for name, weight in weights.items()} for _ in "uv")
    rise = jvp(lambda w: loss(w, tokens, labels), (weights,), (u,))[1]
    assert rise.item() == pytest.approx(along(whole, u))
    turned = [jvp(lambda w: grad(loss)(w, tokens, labels), (weights,), (d,))[1] for d in (u, v)]
    assert along(turned[0], v) == pytest.approx(along(turned[1], u), rel=1e-9)  # the Hessian is symmetric


def test_hand_written_derivatives_are_refused_there_by_name() -> None:
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match=r"backend 'blockwise': .*torch\.func.*'reference' can"):
        grad(lambda q: attention(q, q, q, backend="blockwise").sum())(q)


# Initialisation


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (PaLMLite, {"norm": "rmsnorm-clamped"}),
        (PaLM, {"final_norm": False}),
        (LaMDA, {"norm": "layernorm-biased", "bias": True, "tie_embeddings": False}),
        (PerceiverAR, {"norm": "layernorm-biased", "final_norm": False, "gated": False, "prefix_bias": True}),
    ],
    ids=str,
)
def test_parts_of_older_models_are_initialised(kind: Kind, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        net = build(kind, **options)
    net.to_empty(device="cpu")  # poisoned
    net.init_weights()  # type: ignore[operator]
    for name, parameter in net.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
    tokens = random_tokens()
    net(tokens, labels=tokens).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@models
def test_built_on_meta_then_initialised(kind: Kind) -> None:
    with torch.device("meta"):
        net = build(kind)
    assert all(p.is_meta for p in net.parameters())
    net.to_empty(device="cpu")
    assert any(p.isnan().any() for p in net.parameters()), "memory should have been poisoned"
    net.init_weights()  # type: ignore[operator]
    assert all(p.isfinite().all() for p in net.parameters())
    assert net(random_tokens(), labels=random_tokens()).item() == pytest.approx(math.log(V), abs=0.3)


@models
def test_weights_keep_the_scale_of_their_input(kind: Kind) -> None:
    """Variance 1 / fan-in for kernels, standard deviation 0.02 for embeddings, gains of one."""
    net = build(kind, dim=96, num_tokens=1000)
    for name, p in net.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
        elif "emb" in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
        elif "table" not in name:
            assert p.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.1), name


@models
def test_palm_s_embeddings_and_logits(kind: Kind) -> None:
    """Of std 1 and scaled by dim^-0.5 (arXiv 2204.02311, section 5): logits have about the variance of the
    normed stream, 1, and the scale is in every way to a loss or a logit."""
    net = build(kind, dim=96, num_tokens=1000, embedding_std=1.0, logit_scale=96**-0.5).double()
    assert net.token_emb.weight.std().item() == pytest.approx(1, rel=0.1)  # type: ignore[union-attr]
    plain = build(kind, dim=96, num_tokens=1000).double()
    plain.load_state_dict(net.state_dict())
    tokens, labels = torch.randint(1000, (2, 30)), torch.randint(1000, (2, 30))
    logits = net(tokens)
    assert error(logits, plain(tokens) * 96**-0.5) <= 1e-12
    # Tied as they are, the logit of the token that was read stands out.
    others = logits.scatter(2, tokens[:, -logits.shape[1] :, None], 0.0)
    assert others.std().item() == pytest.approx(1, rel=0.2)
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, -logits.shape[1] :].flatten())
    assert error(net(tokens, labels=labels), expected) <= 1e-12
    assert error(net(tokens, last_only=True), logits[:, -1:]) <= 1e-12
    assert error(net.logits(net.hidden(tokens)), logits) <= 1e-12
    assert type(net)(**net.config)(tokens).shape == logits.shape


@models
@pytest.mark.parametrize("name", ["embedding_std", "logit_scale"])
def test_scales_that_are_not_above_zero_are_refused(kind: Kind, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a finite number above 0, got 0"):
        build(kind, **{name: 0})


@models
def test_initialisation_follows_the_seed(kind: Kind) -> None:
    torch.manual_seed(1)
    first = build(kind).state_dict()
    torch.manual_seed(1)
    second = build(kind).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = build(kind).state_dict()
    assert not torch.equal(first["token_emb.weight"], third["token_emb.weight"])


@models
def test_it_runs_on_meta(kind: Kind) -> None:
    """For shapes without work."""
    with torch.device("meta"):
        net = build(kind)
        tokens = torch.zeros(2, 30, dtype=torch.long)
        logits = net(tokens)
        net(tokens, labels=tokens).backward()
    assert logits.is_meta and logits.shape == (2, 30 - first_prediction(kind), V)
    assert all(p.grad is not None and p.grad.is_meta for p in net.parameters())


@models
def test_it_runs_on_fake_tensors(kind: Kind) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = build(kind)(torch.zeros(2, 30, dtype=torch.long), labels=torch.zeros(2, 30, dtype=torch.long))
    assert loss.shape == ()


@models
def test_numbers_of_numpy_are_numbers(kind: Kind, tmp_path: Any) -> None:
    net = build(kind, num_tokens=random_tokens().numpy().max() + 1, embedding_std=np.float32(0.5))
    assert type(net.config["num_tokens"]) is int and type(net.config["embedding_std"]) is float
    net.save_pretrained(tmp_path)


@models
def test_dropout_reaches_attention_and_only_in_training(kind: Kind, monkeypatch: Any) -> None:
    seen: list[float] = []

    def spying(*tensors: Tensor, dropout_p: float, **options: Any) -> Tensor:
        seen.append(dropout_p)
        return attention(*tensors, dropout_p=dropout_p, **options)

    for module in ("parallel", "attention"):
        monkeypatch.setattr(f"palm_pytorch.layers.{module}.attention", spying)
    name = "attn_dropout" if kind in (PaLM, PaLMLite) else "dropout"
    net = build(kind, **{name: 0.3})
    for training in (True, False):
        seen.clear()
        net.train(training)(random_tokens())
        assert seen and set(seen) == {0.3 if training else 0.0}


@pytest.mark.parametrize("kind", [PaLM, PaLMLite])
def test_feed_forward_dropout_is_of_the_inner_features(kind: Kind) -> None:
    net, zeros = build(kind, ff_dropout=0.5), []
    net.layers[0].ff_out.register_forward_pre_hook(lambda _, inputs: zeros.append(inputs[0] == 0))
    net.train()(random_tokens())
    assert zeros[0].float().mean().item() == pytest.approx(0.5, abs=0.05)


@models
def test_a_loss_of_the_last_position_alone_is_refused(kind: Kind) -> None:
    with pytest.raises(ValueError, match=r"last_only: .*labels"):
        build(kind)(random_tokens(), labels=random_tokens(), last_only=True)


# Saving


@models
@pytest.mark.parametrize("options", [{}, {"norm": "layernorm", "tie_embeddings": False}], ids=str)
def test_config_builds_the_same_shape_again(kind: Kind, options: dict[str, Any]) -> None:
    net, tokens = build(kind, **options), random_tokens()
    config = json.loads(json.dumps(net.config))
    assert config == net.config
    assert {**SHAPE, **MODELS[kind], **options}.items() <= config.items()  # type: ignore[index]
    again = type(net)(**config)
    assert again.config == config
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(tokens), net(tokens))


@models
@pytest.mark.parametrize("tied", [True, False])
def test_state_holds_parameters_and_nothing_else(kind: Kind, tied: bool) -> None:
    net = build(kind, tie_embeddings=tied)
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
    heads = [name for name, p in net.named_parameters() if p.shape == (V, 24)]
    assert len(heads) == (1 if tied else 2)


@models
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_copies_are_whole_and_apart(kind: Kind, copied: Callable[[nn.Module], nn.Module]) -> None:
    net, tokens = build(kind), random_tokens()
    twin, before = copied(net), net(tokens)
    assert torch.equal(twin(tokens), before)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(net(tokens), before)


# Precision


@models
@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str)
def test_half_precision_models(kind: Kind, dtype: torch.dtype, tolerance: float) -> None:
    """Logits of a model in half precision, and of one under autocast, against the same weights in float64."""
    net, tokens = build(kind).to(dtype), random_tokens()
    wide, single = copy.deepcopy(net).double(), copy.deepcopy(net).float()
    exact = wide(tokens)
    assert net(tokens).dtype == dtype
    assert error(net(tokens), exact) <= tolerance
    with torch.autocast("cpu", dtype):
        assert error(single(tokens), exact) <= tolerance
        loss = single(tokens, labels=tokens)
    assert loss.dtype == torch.float32
    assert abs(loss - wide(tokens, labels=tokens)).item() <= tolerance


@models
@pytest.mark.parametrize("way", ["model", "autocast"])
def test_half_precision_gradients(kind: Kind, way: str) -> None:
    net, tokens = build(kind).bfloat16(), random_tokens()
    wide = copy.deepcopy(net).double()
    wide(tokens, labels=tokens).backward()
    if way == "autocast":
        net = net.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        net(tokens, labels=tokens).backward()
    for (name, a), b in zip(net.named_parameters(), wide.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert a.grad.dtype == a.dtype
        assert (a.grad.double() - b.grad).norm() <= 5e-2 * b.grad.norm() + 1e-4, name


# Modes


@models
def test_dropout_is_for_training(kind: Kind) -> None:
    names = ("attn_dropout", "ff_dropout") if kind in (PaLM, PaLMLite) else ("dropout",)
    for name in names:
        net, tokens = build(kind, **{name: 0.5}), random_tokens()
        torch.manual_seed(0)
        first = net(tokens)
        assert not torch.equal(first, net(tokens)), name
        torch.manual_seed(0)
        assert torch.equal(first, net(tokens)), name
        plain = build(kind)
        plain.load_state_dict(net.state_dict())
        assert torch.equal(net.eval()(tokens), plain(tokens)), name


@pytest.mark.parametrize("backend", ["blockwise", "sdpa"])
@models
def test_the_whole_model_compiles(kind: Kind, backend: str) -> None:
    """Loss and gradients without a graph break, of one length, which the compiler takes for a number, and
    of another, which it does not."""
    torch.compiler.reset()
    own = {"xpos": True, "qk_norm": True} if kind is PaLM else {}
    net = build(kind, depth=1, attention_backend=backend, **own)
    fullgraph = backend != "blockwise" or torch.__version__ >= "2.13"
    compiled = torch.compile(net, fullgraph=fullgraph, backend="aot_eager")
    counters.clear()
    for n in (30, 21, 27, 25, 14):
        tokens, found = random_tokens(n), []
        for model in (net, compiled):
            net.zero_grad()
            loss = model(tokens, labels=tokens)
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in net.parameters())])
        assert all(error(a, b) <= 1e-5 for a, b in zip(*found, strict=True))
    if backend == "sdpa" and kind in (PaLM, PaLMLite):  # the others are compiled for each length
        assert counters["stats"]["unique_graphs"] == 2


def capped(net: Any, hidden: Tensor) -> Tensor:
    return type(net).logits(net, hidden).tanh()


def one_of_its_own(net: Any) -> None:
    kind = type(net)
    net.__class__ = type("Own", (kind,), {"logits": lambda self, hidden: kind.logits(self, hidden).tanh()})


# Each makes the logits of a model something else than a product with `head_weight`.
HEADS: dict[str, Callable[[Any], Any]] = {
    "module": lambda net: setattr(net, "to_logits", nn.Sequential(net.to_logits, nn.Tanh())),
    "subclass": one_of_its_own,
    "object's own": lambda net: setattr(net, "logits", partial(capped, net)),
    "object's own forward": lambda net: setattr(
        net.to_logits, "forward", lambda x: nn.Linear.forward(net.to_logits, x).tanh()
    ),
    "hook": lambda net: net.to_logits.register_forward_hook(lambda module, inputs, out: out.tanh()),
    "hook before": lambda net: net.to_logits.register_forward_pre_hook(lambda module, x: (x[0].tanh(),)),
    "pruned by a hook": lambda net: prune.l1_unstructured(net.to_logits, "weight", 0.5),
    "parametrization": lambda net: nn.utils.parametrizations.weight_norm(net.to_logits),
}


@pytest.mark.parametrize("change", HEADS)
@models
def test_a_head_that_the_user_has_changed_counts(kind: Kind, change: str) -> None:
    """In the loss as in the logits, step after step."""
    net, tokens, labels = build(kind, tie_embeddings=False), random_tokens(), random_tokens()
    labels[0, 21] = -100
    HEADS[change](net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        found = net(tokens, labels=labels, z_loss=0.1)
        logits = net(tokens)
        counted = labels[:, -logits.shape[1] :].flatten()
        z = logits.flatten(0, 1).logsumexp(-1)[counted != -100]
        wanted = nn.functional.cross_entropy(logits.flatten(0, 1), counted) + 0.1 * z.square().mean()
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        weights = [weight for weight in net.parameters() if weight.requires_grad]
        grads = [torch.autograd.grad(loss, weights, allow_unused=True) for loss in (found, wanted)]
        assert all(a is b is None or error(a, b) <= 1e-4 for a, b in zip(*grads, strict=True))
        for weight, gradient in zip(weights, grads[0], strict=True):
            weight.grad = gradient
        optimizer.step()


@models
def test_layers_may_be_taken_away(kind: Kind) -> None:
    net, tokens = build(kind, depth=3), random_tokens()[:, :22]
    net.layers = net.layers[:2]
    found = [net.generate(tokens, 5, temperature=0, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*found)


@models
def test_what_is_no_cache_is_refused(kind: Kind) -> None:
    with pytest.raises(TypeError, match=r"cache: .*new_cache.* str"), torch.no_grad():
        build(kind)(random_tokens(), cache="all of it")


@models
def test_int32_tokens(kind: Kind) -> None:
    net, tokens = build(kind), random_tokens()
    assert torch.equal(net(tokens.int()), net(tokens))
    assert torch.equal(net(tokens.int(), labels=tokens.int()), net(tokens, labels=tokens))


@models
def test_tokens_and_labels_are_left_alone(kind: Kind) -> None:
    net, tokens, labels = build(kind), random_tokens(), random_tokens()
    before = tokens.clone(), labels.clone()
    net(tokens, labels=labels).backward()
    assert torch.equal(tokens, before[0]) and torch.equal(labels, before[1])


# Bad input


@models
@pytest.mark.parametrize(
    ("tokens", "error_type", "said"),
    [
        ([[1, 2, 3]], TypeError, "tokens: .*list"),
        (None, TypeError, "tokens: .*NoneType"),
        (torch.zeros(2, 30), TypeError, "tokens: .*float32"),
        (torch.zeros(2, 30, dtype=torch.bool), TypeError, "tokens: .*bool"),
        (torch.zeros(2, 30, dtype=torch.uint8), TypeError, "tokens: .*uint8"),
        (torch.zeros(30, dtype=torch.long), ValueError, r"tokens: .*\(30,\)"),
        (torch.zeros(1, 2, 30, dtype=torch.long), ValueError, r"tokens: .*\(1, 2, 30\)"),
        (torch.zeros(2, 0, dtype=torch.long), ValueError, r"tokens: .*\(2, 0\)"),
        (torch.zeros(0, 30, dtype=torch.long), ValueError, r"tokens: .*\(0, 30\)"),
        (torch.full((2, 30), V), ValueError, r"tokens: .*\[0, 37\).*37"),
        (torch.full((2, 30), -1), ValueError, "tokens: .*-1"),
        (torch.zeros(2, 30, dtype=torch.long, device="meta"), ValueError, "tokens: .*meta"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_tokens_are_refused_by_name(
    kind: Kind, tokens: Any, error_type: type[Exception], said: str
) -> None:
    with pytest.raises(error_type, match=said):
        build(kind)(tokens)


@models
@pytest.mark.parametrize(
    ("labels", "error_type", "said"),
    [
        ([[1] * 30] * 2, TypeError, "labels: .*list"),
        (torch.zeros(2, 29, dtype=torch.long), ValueError, r"labels: .*\(2, 30\).*\(2, 29\)"),
        (torch.zeros(60, dtype=torch.long), ValueError, r"labels: .*\(60,\)"),
        (torch.zeros(2, 30), TypeError, "labels: .*float32"),
        (torch.full((2, 30), V), ValueError, "labels: .*37"),
        (torch.full((2, 30), -1), ValueError, "labels: .*-1"),
        (torch.zeros(2, 30, dtype=torch.long, device="meta"), ValueError, "labels: .*meta"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_labels_are_refused_by_name(
    kind: Kind, labels: Any, error_type: type[Exception], said: str
) -> None:
    with pytest.raises(error_type, match=said):
        build(kind)(random_tokens(), labels=labels)


@models
@pytest.mark.parametrize("name", ["num_tokens", "dim", "depth", "heads", "dim_head", "ff_mult"])
@pytest.mark.parametrize(
    ("value", "error_type"),
    [
        (0, ValueError),
        (-1, ValueError),
        (2.0, TypeError),
        ("8", TypeError),
        (True, TypeError),
        (None, TypeError),
    ],
)
def test_bad_shapes_are_refused_by_name(
    kind: Kind, name: str, value: Any, error_type: type[Exception]
) -> None:
    with pytest.raises(error_type, match=rf"^{name}: .*{value}"):
        build(kind, **{name: value})


@models
@pytest.mark.parametrize(
    ("arguments", "error_type", "said"),
    [
        ({"norm": "batchnorm"}, ValueError, "norm: .*'batchnorm'"),
        ({"norm": None}, (ValueError, TypeError), "norm: .*None"),
        ({"tie_embeddings": "no"}, TypeError, "tie_embeddings: .*'no'"),
        ({"attention_backend": "cudnn"}, ValueError, "attention_backend: .*'cudnn'"),
        ({"surprise": 1}, TypeError, "surprise"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(
    kind: Kind, arguments: dict[str, Any], error_type: type[Exception], said: str
) -> None:
    with pytest.raises(error_type, match=said):
        build(kind, **arguments)


@models
@pytest.mark.parametrize(
    ("value", "error_type"),
    [(1.0, ValueError), (-0.1, ValueError), (math.nan, ValueError), ("0.1", TypeError)],
)
def test_bad_dropout_is_refused_by_name(kind: Kind, value: Any, error_type: type[Exception]) -> None:
    names = ("attn_dropout", "ff_dropout") if kind in (PaLM, PaLMLite) else ("dropout",)
    for name in names:
        with pytest.raises(error_type, match=rf"^{name}: .*{value}"):
            build(kind, **{name: value})


@models
def test_unknown_inputs_are_refused_by_name(kind: Kind) -> None:
    with pytest.raises(TypeError, match="surprise"):
        build(kind)(random_tokens(), surprise=1)
