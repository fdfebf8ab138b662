"""Perceiver AR against its definition in float64, with the model's own weights.

Shapes: p prefix length; m latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pytest
import torch
from definitions import ANYWHERE, NORMS, error, heads_of, joined, plain_attention, silu, turned
from torch import Tensor, nn

from palm_pytorch import PerceiverAR

V, DIM, DEPTH, HEADS, INNER, LONGEST, P = 37, 24, 2, 6, 48, 40, 25


def model(prefix: int = P, dim_head: int = 48, **options: Any) -> PerceiverAR:
    """Small, in float64, every gain away from one."""
    shape: dict[str, Any] = {
        "num_tokens": V,
        "dim": DIM,
        "depth": DEPTH,
        "heads": HEADS,
        "dim_head": dim_head,
        "ff_mult": 2,
    }
    net = PerceiverAR(**shape, max_seq_len=LONGEST, cross_attn_seq_len=prefix, **options).double()
    for weight in net.parameters():
        nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.3)
    return net


def definition(
    w: Mapping[str, Tensor], tokens: Tensor, config: dict[str, Any], prefix_masks: list[Tensor] | None = None
) -> Tensor:
    """prefix_masks: (b, p) for each layer that attends to the prefix."""
    norm, d, p_len = NORMS[config["norm"]], config["dim_head"], config["cross_attn_seq_len"]
    (b, n), rotated = tokens.shape, min(d, max(32, d // 2))
    at, width = torch.arange(n), config["kv_heads"] * d
    prefix_masks = prefix_masks or [torch.ones(b, p_len, dtype=torch.bool)] * config["perceive_depth"]

    def attend(p: str, y: Tensor, source: Tensor, key_mask: Tensor | None = None) -> Tensor:
        kv = source @ w[p + "to_kv.weight"].T
        q, k, v = (heads_of(t, d) for t in (y @ w[p + "to_q.weight"].T, kv[..., :width], kv[..., width:]))
        q, k = turned(q, at[-y.shape[1] :], rotated), turned(k, at[-source.shape[1] :], rotated)
        return joined(plain_attention(q, k, v, key_mask=key_mask)) @ w[p + "to_out.weight"].T

    def feed_forward(p: str, x: Tensor) -> Tensor:
        inner = norm(x, w[p + "ff_norm.weight"]) @ w[p + "ff.0.weight"].T
        return (silu(inner[..., INNER:]) * inner[..., :INNER]) @ w[p + "ff.3.weight"].T

    embedded = w["token_emb.weight"][tokens] + w["pos_emb.weight"][:n]
    prefix, x = embedded[:, :p_len], embedded[:, p_len:]
    for layer, mask in enumerate(prefix_masks):
        p = f"perceive_layers.{layer}."
        y = norm(x, w[p + "attn_norm.weight"])
        source = torch.cat([norm(prefix, w[p + "prefix_norm.weight"]), y], dim=1)
        key_mask = torch.cat([mask, torch.ones(b, n - p_len, dtype=torch.bool)], dim=1)
        x = x + attend(p + "attn.", y, source, key_mask)
        x = x + feed_forward(p, x)
    for layer in range(DEPTH):
        p = f"layers.{layer}."
        y = norm(x, w[p + "attn_norm.weight"])
        x = x + attend(p + "attn.", y, y)
        x = x + feed_forward(p, x)
    head = w["token_emb.weight"] if config["tie_embeddings"] else w["to_logits.weight"]
    return norm(x, w["norm.weight"]) @ head.T


@pytest.mark.parametrize("backend", [*ANYWHERE, "auto"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"perceive_depth": 2, "norm": "layernorm", "tie_embeddings": False},
        {"kv_heads": 2, "dim_head": 80},
        {"kv_heads": 1, "dim_head": 16},
    ],
    ids=str,
)
def test_logits_and_gradients(options: dict[str, Any], masked: bool, backend: str) -> None:
    net = model(attention_backend=backend, **options)
    weights, tokens = dict(net.named_parameters()), torch.randint(V, (2, 37))
    mask = (torch.rand(2, P) > 0.4) if masked else None
    if mask is not None:
        mask[1] = False
    masks = None if mask is None else [mask] * net.config["perceive_depth"]
    found, wanted = net(tokens, prefix_mask=mask), definition(weights, tokens, net.config, masks)
    assert found.shape == (2, 37 - P, V)
    assert error(found, wanted) <= 1e-6
    grad = torch.randn_like(found)
    gradients = (torch.autograd.grad(out, list(weights.values()), grad) for out in (found, wanted))
    for name, a, b in zip(weights, *gradients, strict=True):
        assert error(a, b) <= 1e-6, name


def test_a_long_prefix() -> None:
    net = PerceiverAR(
        num_tokens=20000, dim=16, depth=1, heads=2, dim_head=16, max_seq_len=4096, cross_attn_seq_len=3072
    )
    with torch.no_grad():
        assert net(torch.randint(20000, (1, 4096))).shape == (1, 1024, 20000)


def test_every_head_has_its_own_key_and_value_by_default() -> None:
    assert model().config["kv_heads"] == HEADS


@pytest.mark.parametrize("length", [P + 1, LONGEST])
def test_shortest_and_longest_sequence(length: int) -> None:
    net = model()
    tokens = torch.randint(V, (1, length))
    assert error(net(tokens), definition(dict(net.named_parameters()), tokens, net.config)) <= 1e-6


# cross_attn_dropout: with a short prefix every outcome can be tried


def outcomes(net: PerceiverAR, tokens: Tensor, kept: int, seen: Tensor) -> dict[Any, Tensor]:
    """What the definition gives for each choice of `kept` prefix positions in each perceiving layer."""
    prefix, layers = net.config["cross_attn_seq_len"], net.config["perceive_depth"]
    weights = {name: w.detach() for name, w in net.named_parameters()}
    choices = list(combinations(range(prefix), kept))
    every = [(c,) for c in choices] if layers == 1 else [(a, b) for a in choices for b in choices]

    def mask(choice: tuple[int, ...]) -> Tensor:
        return (
            torch.zeros(prefix, dtype=torch.bool).index_fill(0, torch.tensor(choice, dtype=torch.long), True)
            & seen
        )

    return {
        choice: definition(weights, tokens, net.config, [mask(c).expand(len(tokens), -1) for c in choice])
        for choice in every
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("prefix", "share", "kept", "layers"), [(5, 0.4, 3, 1), (5, 0.5, 3, 1), (4, 0.99, 1, 1), (4, 0.5, 2, 2)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_training_keeps_an_exact_share_of_the_prefix_in_place(
    prefix: int, share: float, kept: int, layers: int, masked: bool
) -> None:
    """`p - int(p * share)` positions stay, with their own order, rotary positions and mask, drawn anew for
    each row and layer: each result is that of some choice, and every choice comes up.
    """
    net = model(prefix, dim_head=16, cross_attn_dropout=share, perceive_depth=layers)
    assert net.training
    n = 1000
    tokens = torch.randint(V, (1, prefix + 3)).expand(n, -1)
    seen = torch.arange(prefix) != 1 if masked else torch.ones(prefix, dtype=torch.bool)
    expected = outcomes(net, tokens[:1], kept, seen)
    found = net(tokens, prefix_mask=seen.expand(n, -1) if masked else None)
    distance = torch.stack([(found - logits).square().sum(dim=(1, 2)) for logits in expected.values()])
    assert (distance.min(dim=0).values <= 1e-8).all()
    if not masked:  # where position 1 is hidden, some choices look the same
        drawn = distance.argmin(dim=0).bincount(minlength=len(expected))
        assert (drawn > 0).all(), drawn
        assert drawn.max() <= n / len(expected) + 6 * (n / len(expected)) ** 0.5, drawn


def test_nothing_is_left_out_in_evaluation_or_where_the_share_rounds_to_none() -> None:
    net = model(cross_attn_dropout=0.9)
    tokens = torch.randint(V, (2, 37))
    net.eval()
    assert error(net(tokens), definition(dict(net.named_parameters()), tokens, net.config)) <= 1e-6
    net = model(cross_attn_dropout=0.03)  # 0.75 of 25 positions
    assert error(net(tokens), definition(dict(net.named_parameters()), tokens, net.config)) <= 1e-6


def test_a_cache_holds_the_whole_prefix_in_training_too() -> None:
    """Later latents were given the positions of those that dropout had left out."""
    net = model(cross_attn_dropout=0.5).train()
    cache, tokens = net.new_cache(), torch.randint(V, (2, P + 3))
    with torch.no_grad():
        net(tokens, cache=cache)
        assert cache.length == P + 3
        net.eval()
        found = net(tokens[:, -1:], cache=cache)
        wanted = net(torch.cat([tokens, tokens[:, -1:]], dim=1))[:, -1:]
    assert error(found, wanted) <= 1e-12


def test_gradients_flow_through_a_partial_prefix() -> None:
    net = model(cross_attn_dropout=0.5, perceive_depth=2)
    net(torch.randint(V, (2, 37)), labels=torch.randint(V, (2, 37))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_labels_cover_the_whole_sequence_and_those_of_the_prefix_are_not_used() -> None:
    net = model()
    tokens, labels = torch.randint(V, (2, 2, 37))
    wanted = torch.nn.functional.cross_entropy(net(tokens).flatten(0, 1), labels[:, P:].flatten())
    assert error(net(tokens, labels=labels), wanted) <= 1e-12
    other = labels.clone()
    other[:, :P] = -100
    assert torch.equal(net(tokens, labels=labels), net(tokens, labels=other))


# Bad input


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"cross_attn_seq_len": LONGEST}, ValueError, f"cross_attn_seq_len: .*{LONGEST}"),
        ({"cross_attn_seq_len": LONGEST + 1}, ValueError, f"cross_attn_seq_len: .*{LONGEST + 1}"),
        ({"cross_attn_seq_len": 0}, ValueError, "cross_attn_seq_len: .*0"),
        ({"cross_attn_seq_len": 2.5}, TypeError, r"cross_attn_seq_len: .*2\.5"),
        ({"max_seq_len": 0}, ValueError, "max_seq_len"),
        ({"max_seq_len": 40.5}, TypeError, r"max_seq_len: .*40\.5"),
        ({"max_seq_len": "40"}, TypeError, "max_seq_len: .*'40'"),
        ({"perceive_depth": 0}, ValueError, "perceive_depth: .*0"),
        ({"kv_heads": 4}, ValueError, "kv_heads: .*heads=6.*4"),
        ({"cross_attn_dropout": 1.0}, ValueError, "cross_attn_dropout: .*1.0"),
        ({"cross_attn_dropout": -0.5}, ValueError, "cross_attn_dropout: .*-0.5"),
        ({"dim_head": 15}, ValueError, "dim_head: .*15"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    arguments: dict[str, Any], kind: type[Exception], said: str
) -> None:
    shape = {"num_tokens": V, "dim": DIM, "depth": 1, "heads": HEADS, "dim_head": 16}
    with pytest.raises(kind, match=said):
        PerceiverAR(**{**shape, "max_seq_len": LONGEST, "cross_attn_seq_len": P, **arguments})


def test_every_even_head_can_be_turned_in_part() -> None:
    """Half of 70 dims is odd, and cannot be split in two."""
    tokens = torch.randint(V, (1, 37))
    for dim_head in (66, 70, 74):
        assert model(dim_head=dim_head)(tokens).isfinite().all()


@pytest.mark.parametrize("length", [1, P, LONGEST + 1])
def test_too_short_and_too_long_sequences_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"tokens: .*\b{length}\b"):
        model()(torch.zeros(2, length, dtype=torch.long))


def test_two_masks_of_one_prefix_are_refused() -> None:
    masks = {"prefix_mask": torch.ones(2, P), "key_mask": torch.ones(2, 37)}
    with pytest.raises(ValueError, match=r"prefix_mask: .*key_mask"):
        model()(torch.zeros(2, 37, dtype=torch.long), **{name: mask.bool() for name, mask in masks.items()})


@pytest.mark.parametrize(
    ("mask", "kind", "said"),
    [
        (torch.ones(2, P), TypeError, "prefix_mask: .*float32"),
        (torch.ones(2, P, dtype=torch.long), TypeError, "prefix_mask: .*int64"),
        ([True] * P, TypeError, "prefix_mask: "),
        (torch.ones(2, 37, dtype=torch.bool), ValueError, r"prefix_mask: .*\(2, 25\).*\(2, 37\)"),
        (torch.ones(P, dtype=torch.bool), ValueError, r"prefix_mask: .*\(25,\)"),
        (torch.ones(1, P, dtype=torch.bool), ValueError, r"prefix_mask: .*\(1, 25\)"),
        (
            torch.ones(2, P, dtype=torch.bool, device="meta"),
            ValueError,
            "prefix_mask: .*meta|key_mask: .*meta",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_prefix_masks_are_refused_by_name(mask: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        model()(torch.zeros(2, 37, dtype=torch.long), prefix_mask=mask)
