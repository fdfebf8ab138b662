"""Generation with a cache against the model run anew, token by token; then options, interruption, bad input.

Shapes: b rows; t prompt length; p Perceiver AR's prefix, m its latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from definitions import alibi_bias, error, plain_attention
from small_models import SHAPE, Kind, P, V, build, each_of, variants_of
from torch import Tensor, nn

from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR
from palm_pytorch.generation import decode, packing
from palm_pytorch.layers import RMSNorm
from palm_pytorch.layers.parallel import ParallelBlock
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.ops import AlibiBias, attention

EOS, LONGEST = 5, 40
VARIANTS = variants_of(LONGEST)
LENGTHS = VARIANTS[-2][1]  # Perceiver AR's
variants, models = each_of(VARIANTS), each_of(VARIANTS[::2])


def random_tokens(b: int, n: int) -> Tensor:
    return torch.randint(V, (b, n))


def anew(net: LanguageModel, row: list[int], start: int | None = None) -> Tensor:
    """Logits (v,) after a row of tokens, by the model's plain forward pass: what a cache must not change.

    start: where Perceiver AR's latents begin in the row; by default where they do once the prefix is full.
    """
    p = net.config.get("cross_attn_seq_len", 0)
    if p == 0:
        return net(torch.tensor([row]))[0, -1]
    start = min(p, len(row) - 1) if start is None else start
    prefix = row[max(0, start - p) : start]
    # A prefix that is longer than what there is: padding on its left, masked.
    tokens = torch.tensor([[0] * (p - len(prefix)) + prefix + row[start:]])
    return net(tokens, prefix_mask=(torch.arange(p) >= p - len(prefix))[None])[0, -1]


@torch.no_grad()
def greedy(net: LanguageModel, row: list[int], n: int) -> list[int]:
    start = min(P, len(row) - 1)
    drawn: list[int] = []
    for _ in range(n):
        drawn.append(int(anew(net, row + drawn, start).argmax()))
    return drawn


def left_padded(rows: list[list[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    tokens = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[False] * (longest - len(row)) + [True] * len(row) for row in rows]
    return torch.tensor(tokens), torch.tensor(mask)


# Exactness


@variants
@pytest.mark.parametrize("capacity", [1, 64])
@torch.no_grad()
def test_cached_logits_are_those_of_the_whole(kind: Kind, options: dict[str, Any], capacity: int) -> None:
    """At every split of the sequence, past the cache's first size."""
    net, tokens = build(kind, options), random_tokens(3, 36)
    whole = net(tokens)
    for splits in ([11, 1, 1, 23], [10, 7, 19], [36], [20, *[1] * 16]):
        cache = net.new_cache(capacity)
        pieces = [net(piece, cache=cache) for piece in tokens.split(splits, dim=1)]
        assert error(torch.cat(pieces, dim=1), whole) <= 1e-5
        assert cache.length == 36


@models
@torch.no_grad()
def test_cached_logits_in_half_precision(kind: Kind, options: dict[str, Any]) -> None:
    """As far from the truth as the uncached ones, or nearer."""
    net, tokens = build(kind, options), random_tokens(2, 30)
    exact, net = net.double()(tokens), net.bfloat16()
    cache = net.new_cache()
    pieces = [net(piece, cache=cache) for piece in tokens.split([12, *[1] * 18], dim=1)]
    assert error(torch.cat(pieces, dim=1), exact) <= 2 * error(net(tokens), exact)


@variants
@torch.no_grad()
def test_rows_of_different_length_do_not_know_of_each_other(kind: Kind, options: dict[str, Any]) -> None:
    """Each as if it were alone: logits of prompt and steps, whatever the padding says."""
    net = build(kind, options)
    rows = [random_tokens(1, n)[0].tolist() for n in (1, 7, 10, 19)]
    prompt, mask = left_padded(rows, pad=11)
    more = random_tokens(4, 12)
    context = decode.Context(
        net,
        prompt,
        mask,
        lengths=[len(row) for row in rows],
        room=13,
        window=getattr(net, "max_seq_len", None),
        stride=None,
        use_cache=True,
    )
    found = [context.read(), *(context.extend(column) for column in more.T)]
    for row, tokens in enumerate(rows):
        start = min(P, len(tokens) - 1)
        wanted = [anew(net, tokens + more[row, :n].tolist(), start) for n in range(13)]
        assert error(torch.stack([logits[row] for logits in found]), torch.stack(wanted)) <= 1e-5


@variants
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_the_loop_written_out(kind: Kind, options: dict[str, Any], use_cache: bool) -> None:
    net = build(kind, options)
    rows = [random_tokens(1, n)[0].tolist() for n in (3, 12, 14)]
    prompt, mask = left_padded(rows)
    found = net.generate(prompt, 15, temperature=0, prompt_mask=mask, use_cache=use_cache)
    assert found.dtype == torch.long and found.tolist() == [greedy(net, row, 15) for row in rows]


@models
@pytest.mark.parametrize("chunk", [1, 4, 16])
@torch.no_grad()
def test_a_long_prompt_goes_in_chunks(
    kind: Kind, options: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PREFILL_CHUNK", chunk)
    net, prompt = build(kind, options), random_tokens(2, 33)
    mask = torch.arange(33) >= torch.tensor([[0], [20]])
    logits = decode.prefill(net, prompt, cache := net.new_cache(), mask if kind is not PerceiverAR else None)
    assert logits.shape == (2, V) and cache.length == 33
    assert error(logits[0], anew(net, prompt[0].tolist())) <= 1e-5
    if kind is not PerceiverAR:
        assert error(logits[1], anew(net, prompt[1, 20:].tolist())) <= 1e-5


FAR = 150_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_of(VARIANTS[:6])
@torch.no_grad()
def test_positions_past_100k(kind: Kind, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Positions are relative, so tokens behind a long masked text are as at the start of one."""
    net, tokens = build(kind, options), random_tokens(1, 30)
    exact, net = net.double()(tokens), net.to(dtype)
    cache, width = net.new_cache(FAR + 40), net.config["dim_head"]
    cache.begin(torch.zeros(1, FAR, dtype=torch.bool), 1, FAR)
    for layer in cache:
        # What is masked is not read, be it huge.
        heads = net.config.get("kv_heads", 1)
        layer.append(*torch.full((1 if kind is PaLMLite else 2, 1, heads, FAR, width), 99.0, dtype=dtype))
    cache.advance()
    pieces = [net(piece, cache=cache) for piece in tokens.split([20, *[1] * 10], dim=1)]
    allowed = 1e-5 if dtype == torch.float32 else 2 * error(net(tokens), exact)
    assert error(torch.cat(pieces, dim=1), exact) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_keys_100k_tokens_ago_are_where_they_were(dtype: torch.dtype) -> None:
    """ALiBi so flat that the far end counts: one query by the definition in float64."""
    slopes = torch.tensor([1e-5, 3e-5, 1e-4])
    q, k, v = (torch.randn(1, heads, n, 16).to(dtype) for heads, n in ((3, 1), (1, FAR), (1, FAR)))
    wanted = plain_attention(q.double(), k.double(), v.double(), bias=alibi_bias(slopes.double(), 1, FAR))
    found = attention(q, k, v, bias=AlibiBias(slopes))
    assert error(found, wanted) <= (2e-5 if dtype == torch.float32 else 1e-2)


# Perceiver AR's window


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("stride", [None, 1, 4, LONGEST - P])
def test_a_full_window_moves_on_by_the_stride(stride: int | None, use_cache: bool) -> None:
    net, row = build(PerceiverAR, LENGTHS), random_tokens(1, 35)[0].tolist()
    most, drawn, latents = LONGEST - P, [], 35 - P
    with torch.no_grad():
        for _ in range(45):
            whole = row + drawn
            drawn.append(int(anew(net, whole, len(whole) - latents).argmax()))
            latents = latents + 1 if latents < most else most + 1 - (stride or most // 2)
    found = net.generate(torch.tensor([row]), 45, temperature=0, stride=stride, use_cache=use_cache)
    assert found[0].tolist() == drawn


def test_windows_of_rows_move_on_apart() -> None:
    """A row's window is full when its own latents are, whoever stands beside it."""
    net = build(PerceiverAR, LENGTHS)
    rows = [random_tokens(1, n)[0].tolist() for n in (2, 20, 40)]
    prompt, mask = left_padded(rows)
    together = net.generate(prompt, 60, temperature=0, prompt_mask=mask)
    alone = [net.generate(torch.tensor([row]), 60, temperature=0)[0].tolist() for row in rows]
    assert together.tolist() == alone
    twice = net.generate(prompt, 60, temperature=0, prompt_mask=mask, num_samples=2)
    assert twice.tolist() == [row for row in alone for _ in range(2)]


@torch.no_grad()
def test_the_prefix_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = build(PerceiverAR, LENGTHS), []
    hidden = net.hidden
    monkeypatch.setattr(
        net, "hidden", lambda tokens, **inputs: seen.append(tokens.shape[1]) or hidden(tokens, **inputs)
    )
    net.generate(random_tokens(1, 20), 35)
    # 11 latents, 31 at most: the 32nd moves the window on by 15, which leaves 17.
    assert seen == [20, *[1] * 20, P + 17, *[1] * 13]


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_bytes_of_the_cache_are_exact(dtype: torch.dtype) -> None:
    for kind, options, heads in ((PaLM, {}, 1), (PaLMLite, {}, 0.5), (LaMDA, {"kv_heads": 3}, 3)):
        net = build(kind, options).to(dtype)
        cache = net.new_cache(50)
        net(random_tokens(4, 50), cache=cache)
        assert cache.nbytes == 2 * 2 * 4 * 50 * heads * 16 * dtype.itemsize
    net = build(PerceiverAR, LENGTHS).to(dtype)
    net(random_tokens(4, LONGEST), cache=(cache := net.new_cache(LONGEST)))
    positions = LONGEST + 2 * (LONGEST - P)
    assert cache.nbytes == 2 * 4 * positions * 6 * 16 * dtype.itemsize


@pytest.mark.parametrize("length", [5, 30])
def test_generation_makes_the_cache_once_and_no_larger_than_needed(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    new_cache = PaLM.new_cache
    monkeypatch.setattr(PaLM, "new_cache", lambda net, n: made.append(new_cache(net, n)) or made[-1])
    build(PaLM, {}).generate(random_tokens(2, length), 12)
    assert [cache.nbytes for cache in made] == [2 * 2 * 2 * (length + 12) * 16 * 4]


def test_no_logits_of_the_prompt_but_the_last() -> None:
    net, shapes = build(PaLM, {}), []
    net.register_forward_hook(lambda module, inputs, logits: shapes.append(tuple(logits.shape)))
    net.generate(random_tokens(1, 30), 2)
    assert shapes == [(1, 1, V)] * 2


# Options


@models
def test_samples_of_a_prompt_share_its_reading(kind: Kind, options: dict[str, Any]) -> None:
    net = build(kind, options)
    rows = [random_tokens(1, n)[0].tolist() for n in (4, 13)]
    prompt, mask = left_padded(rows)
    calls = []
    net.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape)))
    found = net.generate(prompt, 6, num_samples=3, prompt_mask=mask, temperature=0)
    assert found.tolist() == [greedy(net, row, 6) for row in rows for _ in range(3)]
    assert calls[0][0] == 2 and calls[1:6] == [(6, 1)] * 5
    drawn = net.generate(prompt, 20, num_samples=3, prompt_mask=mask, temperature=5.0)
    assert len({tuple(row) for row in drawn.tolist()}) == 6


def test_log_probabilities_are_those_of_the_model() -> None:
    net, prompt = build(PaLM, {}), random_tokens(2, 6)
    tokens, scores = net.generate(prompt, 8, temperature=3.0, top_k=5, repetition_penalty=1.3, log_probs=True)
    with torch.no_grad():
        logits = net(torch.cat([prompt, tokens], dim=1))[:, 5:-1]
    wanted = logits.log_softmax(dim=-1).gather(2, tokens[..., None])[..., 0]
    assert scores.shape == (2, 8) and error(scores, wanted) <= 1e-5
    rough = net.bfloat16().generate(prompt, 8, log_probs=True)[1]
    assert rough.dtype == torch.float32 and (rough != rough.bfloat16()).any()
    empty = net.generate(prompt, 0, log_probs=True)
    assert empty[0].shape == empty[1].shape == (2, 0) and empty[1].is_floating_point()


class Scripted(PaLM):
    """A PaLM whose next token is always the last one plus one."""

    def hidden(self, tokens: Tensor, **inputs: Any) -> Tensor:
        super().hidden(tokens, **inputs)
        return nn.functional.one_hot((tokens + 1) % V, V).float() * 100

    @property
    def head_weight(self) -> Tensor:
        return torch.eye(V)


def scripted() -> Scripted:
    return Scripted(**SHAPE)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pad_token", [0, EOS, -1])
def test_rows_end_at_their_own_end_token_and_are_padded(pad_token: int, use_cache: bool) -> None:
    options = {"eos_token": EOS, "pad_token": pad_token, "temperature": 0, "use_cache": use_cache}
    prompt = torch.tensor([[1, 3], [1, 1], [EOS, 20]])
    found, scores = scripted().generate(prompt, 6, log_probs=True, **options)
    x = pad_token
    assert found.tolist() == [[4, EOS, x, x, x, x], [2, 3, 4, EOS, x, x], [21, 22, 23, 24, 25, 26]]
    assert (scores[0, 2:] == 0).all() and (scores[1, 4:] == 0).all()
    # All have ended, so nothing more is drawn.
    assert scripted().generate(prompt[:2], 100, **options).tolist() == [[4, EOS, x, x], [2, 3, 4, EOS]]


def test_repetition_is_penalised_in_prompt_and_text() -> None:
    """So much that what was there never comes again, while there is something else."""
    net = build(PaLM, {})
    prompt, mask = left_padded([[1, 2, 3], [4]], pad=30)
    found = net.generate(prompt, 25, temperature=0, prompt_mask=mask, repetition_penalty=1e4)
    # A negative logit is pushed down; tokens with positive ones come first, each once.
    for row, start in zip(found.tolist(), ([1, 2, 3], [4]), strict=True):
        fresh = row[: next((n for n in range(25) if row[n] in start + row[:n]), 25)]
        assert len(fresh) >= 5


@models
def test_a_generator_makes_it_reproducible(kind: Kind, options: dict[str, Any]) -> None:
    net, prompt = build(kind, options), random_tokens(2, 12)

    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(99)
        generator = torch.Generator().manual_seed(seed)
        before = torch.get_rng_state()
        found = net.generate(prompt, 20, temperature=2.0, generator=generator).tolist()
        assert torch.equal(before, torch.get_rng_state())
        return found

    assert drawn(0) == drawn(0) != drawn(1)


def test_filters_reach_the_draw() -> None:
    net, prompt = build(PaLM, {}), random_tokens(3, 5)
    best = net.generate(prompt, 9, temperature=0)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-9}):
        assert torch.equal(net.generate(prompt, 9, **options), best)


@pytest.mark.parametrize("dtype", [torch.long, torch.int], ids=str)
def test_tokens_are_ordinary_ones(dtype: torch.dtype) -> None:
    """No inference tensors, which a training step could not take."""
    net, prompt = build(PaLM, {}), random_tokens(2, 5).to(dtype)
    before = prompt.clone()
    found = net.generate(prompt, 4)
    assert found.dtype == dtype and not found.is_inference() and torch.equal(prompt, before)
    assert not any(token.is_inference() for token in net.stream(prompt, 2))
    net(found, labels=found).backward()
    assert net.generate(prompt, 0).shape == (2, 0) and net.generate(prompt, 0).dtype == dtype


# Streams


@models
def test_a_stream_yields_what_generate_gives(kind: Kind, options: dict[str, Any]) -> None:
    net, prompt = build(kind, options), random_tokens(2, 12)
    found = list(net.stream(prompt, 9, temperature=0, num_samples=2))
    assert torch.equal(torch.stack(found, dim=1), net.generate(prompt, 9, temperature=0, num_samples=2))


def started(net: LanguageModel, n: int = 100) -> Iterator[Tensor]:
    stream = net.stream(random_tokens(2, 12), n, temperature=0)
    next(stream), next(stream)
    return stream


def as_before(net: LanguageModel) -> bool:
    """Every module trains but the one that was frozen; nothing is hooked; gradients flow."""
    frozen = next(iter(net.modules())).token_emb
    tokens = random_tokens(2, 20)
    loss = net(tokens, labels=tokens)
    loss.backward()
    return (
        all(module.training != (module is frozen) for module in net.modules())
        and not any("forward" in vars(module) or module._forward_hooks for module in net.modules())
        and all(weight.grad is not None for weight in net.parameters())
        and torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
    )


@models
def test_a_stream_may_be_left_at_any_time(kind: Kind, options: dict[str, Any]) -> None:
    net = build(kind, options).train()
    net.token_emb.eval()
    stream = started(net)
    assert as_before(net)  # between two tokens already
    next(stream)
    stream.close()
    assert as_before(net)
    del stream
    wanted = net.eval().generate(prompt := random_tokens(2, 12), 5, temperature=0)
    assert torch.equal(net.generate(prompt, 5, temperature=0), wanted)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError])
@models
def test_an_exception_inside_the_model_leaves_it_usable(
    kind: Kind, options: dict[str, Any], raised: type[BaseException]
) -> None:
    net = build(kind, options).train()
    net.token_emb.eval()
    stream = started(net)

    def interrupt(module: nn.Module, _: Any) -> None:
        assert not module.training
        raise raised

    hook = net.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(raised):
        next(stream)
    hook.remove()
    assert as_before(net)


def test_a_stream_may_be_made_in_inference_mode_and_read_outside() -> None:
    net, prompt = build(PaLM, {}), random_tokens(2, 12)
    with torch.inference_mode():
        stream = net.stream(prompt, 70, temperature=0)
    found = torch.stack([*stream], dim=1)
    assert torch.equal(found, net.generate(prompt, 70, temperature=0))


def test_two_streams_of_a_model_do_not_meet() -> None:
    net = build(PaLM, {}).train()
    prompts = [random_tokens(2, 12) for _ in range(2)]
    streams = [net.stream(prompt, 80, temperature=0) for prompt in prompts]
    found: list[list[Tensor]] = [[], []]
    for _ in range(80):
        for tokens, stream in zip(found, streams, strict=True):
            tokens.append(next(stream))
    for tokens, prompt in zip(found, prompts, strict=True):
        assert torch.equal(torch.stack(tokens, dim=1), net.generate(prompt, 80, temperature=0))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_multiply_as_plain_ones(dtype: torch.dtype) -> None:
    net, x = build(LaMDA, {"bias": True}).to(dtype), torch.randn(3, 1, 24, dtype=dtype)
    parallel, ways = build(PaLM, {}).to(dtype), [torch.randn(3, 1, n, dtype=dtype) for n in (96, 48)]

    def products(model: LanguageModel, parallel: LanguageModel) -> Iterator[Tensor]:
        modules, block = dict(model.named_modules()), dict(parallel.named_modules())["layers.1"]
        for kind in (dtype, torch.float32):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind != dtype):
                for part in (model.logits, modules["layers.0.ff.0"], modules["layers.0.attn"].to_q):
                    yield part(x.to(kind))
                yield block.out(*(way.to(kind) for way in ways))

    twins = packing.packed(net), packing.packed(parallel)
    for one, other in zip(products(net, parallel), products(*twins), strict=True):
        assert one.dtype == other.dtype
        assert error(other, one) <= (1e-6 if one.dtype == torch.float32 else 1e-2)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Capped(PaLM):
    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden).tanh()


class Halved(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def _biased(net: PaLM) -> None:
    net.layers[0].ff_out.bias = nn.Parameter(torch.randn(24))


def _with_own_forward(net: PaLM) -> None:
    proj = net.layers[1].fused_proj
    proj.forward = lambda x: nn.Linear.forward(proj, x).sin()


CHANGES: dict[str, Callable[[PaLM], Any]] = {
    "bias": _biased,
    "subclass": lambda net: setattr(net.layers[1], "attn_out", Scaled(6 * 16, 24, bias=False)),
    "wrapper": lambda net: setattr(net.layers[0], "ff_out", nn.Sequential(net.layers[0].ff_out, nn.Tanh())),
    "own forward": _with_own_forward,
    "own logits": lambda net: setattr(net, "logits", lambda hidden: PaLM.logits(net, hidden).tanh()),
    "model's class": lambda net: setattr(net, "__class__", Capped),
    "instead of dropout": lambda net: setattr(net.layers[0], "ff_dropout", nn.Tanh()),
    "another dropout": lambda net: setattr(net.layers[0], "ff_dropout", Halved()),
    "parametrization": lambda net: nn.utils.parametrizations.spectral_norm(net.layers[0].attn_out),
    "hook": lambda net: net.layers[0].attn_out.register_forward_hook(lambda module, inputs, out: out + 1),
}


@pytest.mark.parametrize(
    ("kind", "method"), [(RMSNorm, "forward"), (nn.Linear, "forward"), (LanguageModel, "logits")]
)
@torch.no_grad()
def test_what_is_changed_in_a_class_counts(
    kind: type[nn.Module], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, prompt, plain = build(PaLM, {}), random_tokens(2, 12), getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda module, x: plain(module, x).tanh())
    found, wanted = (
        torch.stack([*net.generate(prompt, 70, temperature=0, log_probs=True, use_cache=cached)])
        for cached in (True, False)
    )
    assert error(found, wanted) <= 1e-5


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_changed_in_a_model_counts(change: str) -> None:
    """However many tokens are drawn, with a cache as without."""
    net, prompt = build(PaLM, {}), random_tokens(2, 12)

    def logits(use_cache: bool) -> Tensor:
        return torch.stack([*net.generate(prompt, 70, temperature=0, log_probs=True, use_cache=use_cache)])

    before = logits(True)
    CHANGES[change](net)
    found = logits(True)
    assert error(found, logits(False)) <= 1e-5 and error(found, before) > 1e-2


@torch.no_grad()
def test_hooks_for_all_modules_count() -> None:
    net, prompt = build(PaLM, {}), random_tokens(2, 12)
    seen: set[int] = set()
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(id(module)))
    net.generate(prompt, 70)
    hook.remove()
    assert {id(module) for module in net.modules() if module is not net.layers} <= seen


def test_weights_that_are_too_many_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    net = build(PaLM, {})
    assert "_head" in vars(packing.packed(net)) or not torch.backends.mkldnn.is_available()
    monkeypatch.setattr(packing, "MOST_BYTES", 100)
    twin = packing.packed(net)
    products = [twin, *(m for m in twin.modules() if isinstance(m, (nn.Linear, ParallelBlock)))]
    assert not any({"logits", "forward", "out"} & set(vars(module)) for module in products)


def test_a_twin_leaves_its_model_alone() -> None:
    """Modes, children and names; weights are the same ones, also of a part that is there twice. A container
    with nothing in it, which is false, is copied as others are."""
    net = build(LaMDA, {}).train()
    net.layers[1].ff_norm = net.layers[1].attn_norm
    net.layers[0].nothing = nn.Sequential()
    before = {module: dict(vars(module)) for module in net.modules()}
    twin = packing.packed(net)
    assert {module: vars(module) for module in net.modules()} == before
    assert not {*net.modules()} & {*twin.modules()} and not any(m.training for m in twin.modules())
    assert [*map(id, twin.parameters())] == [*map(id, net.parameters())]


@models
@torch.inference_mode()
def test_the_cache_of_a_model_with_other_layers_is_refused(kind: Kind, options: dict[str, Any]) -> None:
    """It would do for so many layers as it has, and the rest would go unheard."""
    net = build(kind, options)
    cache = build(kind, {**options, "depth": 1}).new_cache(40)
    with pytest.raises(ValueError, match=r"cache: .* layers, got one for"):
        net(random_tokens(2, 12), cache=cache)
    assert cache.length == 0


@models
@torch.inference_mode()
def test_a_step_compiles_once_for_all_lengths(kind: Kind, options: dict[str, Any]) -> None:
    """A first time for the length that it meets, a second one for any; nothing breaks the graph up."""
    torch.compiler.reset()
    net, prompt, tokens = build(kind, options), random_tokens(2, 12), random_tokens(2, 9)
    compiled = torch.compile(decode.step, backend="eager", fullgraph=True)
    caches = [net.new_cache(40) for _ in range(2)]
    for cache in caches:
        decode.prefill(net, prompt, cache)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for column in tokens.T:
        found, wanted = (
            step(net, column, c) for step, c in zip((compiled, decode.step), caches, strict=True)
        )
        assert error(found, wanted) <= 1e-5
    assert counters["stats"]["unique_graphs"] <= 2
    torch.compiler.reset()


def test_help_tells_the_arguments() -> None:
    assert "prompt_mask" in (PaLM.generate.__doc__ or "") and PerceiverAR.generate is LaMDA.generate
    assert PaLM.stream.__doc__ and LaMDA.sample_and_rank.__doc__ and not hasattr(PaLM, "sample_and_rank")


# Bad input


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"prompt": torch.zeros(2, 0, dtype=torch.long)}, ValueError, r"prompt: .*\(2, 0\)"),
        ({"prompt": torch.zeros(0, 2, dtype=torch.long)}, ValueError, r"prompt: .*\(0, 2\)"),
        ({"prompt": torch.zeros(5, dtype=torch.long)}, ValueError, r"prompt: .*\(5,\)"),
        ({"prompt": [[1, 2]]}, TypeError, "prompt: .*list"),
        ({"prompt": torch.zeros(2, 3)}, TypeError, "prompt: .*float32"),
        ({"prompt": torch.full((2, 3), V)}, ValueError, "prompt: .*37"),
        ({"prompt": torch.zeros(2, 3, dtype=torch.long, device="meta")}, ValueError, "prompt: .*cpu.*meta"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: .*-1"),
        ({"max_new_tokens": 2.5}, TypeError, r"max_new_tokens: .*2\.5"),
        ({"temperature": -0.5}, ValueError, "temperature: .*-0.5"),
        ({"top_k": 0}, ValueError, "top_k: .*0"),
        ({"top_k": 1.5}, TypeError, "top_k: .*1.5"),
        ({"top_p": 0.0}, ValueError, "top_p: .*0.0"),
        ({"top_p": 1.1}, ValueError, "top_p: .*1.1"),
        ({"min_p": -0.1}, ValueError, "min_p: .*-0.1"),
        ({"min_p": 1.1}, ValueError, "min_p: .*1.1"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty: .*0"),
        ({"num_samples": 0}, ValueError, "num_samples: .*0"),
        ({"eos_token": V}, ValueError, "eos_token: .*37"),
        ({"eos_token": -1}, ValueError, "eos_token: .*-1"),
        ({"pad_token": None}, TypeError, "pad_token: .*None"),
        ({"pad_token": 2**63}, ValueError, "pad_token: .*int64.*9223372036854775808"),
        ({"generator": 5}, TypeError, "generator: .*int"),
        ({"prompt_mask": torch.ones(2, 3)}, TypeError, "prompt_mask: .*float32"),
        ({"prompt_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"prompt_mask: .*\(2, 4\)"),
        ({"prompt_mask": torch.tensor([[0, 0, 1], [0, 0, 0]]).bool()}, ValueError, r"prompt_mask: .*\[1\]"),
        ({"prompt_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()}, ValueError, "prompt_mask: .*left"),
        ({"stride": 2}, ValueError, "stride: .*2"),
        ({"surprise": 1}, TypeError, "surprise"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_bad_input_is_refused_at_the_call(
    method: str, changes: dict[str, Any], kind: type[Exception], said: str
) -> None:
    """A stream too refuses before anything is asked of it."""
    net = build(PaLM, {})
    arguments = {"prompt": random_tokens(2, 3), "max_new_tokens": 2, **changes}
    with pytest.raises(kind, match=said):
        getattr(net, method)(**arguments)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": torch.zeros(1, LONGEST + 1, dtype=torch.long)}, "prompt: .*40.*41"),
        ({"stride": LONGEST - P + 1}, "stride: .*31.*32"),
        ({"stride": 0}, "stride: .*0"),
    ],
)
def test_what_does_not_fit_perceiver_ar_is_refused(changes: dict[str, Any], said: str) -> None:
    net = build(PerceiverAR, LENGTHS)
    with pytest.raises(ValueError, match=said):
        net.stream(**{"prompt": random_tokens(1, 20), "max_new_tokens": 2, **changes})


@torch.no_grad()
def test_a_cache_is_refused_what_does_not_fit() -> None:
    net = build(PerceiverAR, LENGTHS)
    net(random_tokens(2, 20), cache=(cache := net.new_cache()))
    with pytest.raises(ValueError, match=r"tokens: .*40.*41"):
        net(random_tokens(2, 21), cache=cache)
    with pytest.raises(ValueError, match=r"prefix_mask: .*holds"):
        net(random_tokens(2, 1), cache=cache, prefix_mask=torch.ones(2, P, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"cache: .*2 rows.*3"):
        net(random_tokens(3, 1), cache=cache)
    assert cache.length == 20


def test_a_stream_gives_no_log_probabilities() -> None:
    with pytest.raises(TypeError, match="log_probs: "):
        build(PaLM, {}).stream(random_tokens(1, 3), 2, log_probs=True)
