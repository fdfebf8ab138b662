"""Drawing tokens one after the other: the prompt once through the model, then each token as it comes.

Shapes: b rows of the batch; t prompt length; n tokens shown to the model; p prefix length (Perceiver AR's,
else 0); v num_tokens.

A row that is shorter than others is padded on the left, masked, and none the wiser: relative positions do not
change, and Perceiver AR, whose positions are absolute, counts each row's by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from palm_pytorch.generation.packing import LEAST_STEPS, has_hooks, packed
from palm_pytorch.generation.recording import RecordedSteps
from palm_pytorch.generation.sampling import Sampling
from palm_pytorch.layers.kv_cache import KVCache
from palm_pytorch.models.inputs import check_tokens
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.ops.arguments import expect_integer, expect_mask

# Tokens of a prompt that go through the model at once: enough for large matrix products, and few enough that
# their activations do not count beside the cache.
PREFILL_CHUNK = 1024


def prefill(model: LanguageModel, tokens: Tensor, cache: KVCache, key_mask: Tensor | None = None) -> Tensor:
    """Logits (b, v) after tokens (b, n), which are added to the cache, chunk by chunk."""
    first = PREFILL_CHUNK + prefix_length(model)
    edges = [0, *range(first, tokens.shape[1], PREFILL_CHUNK), tokens.shape[1]]
    for start, stop in pairwise(edges):
        mask = None if key_mask is None else key_mask[:, start:stop]
        logits = model(tokens[:, start:stop], key_mask=mask, cache=cache, last_only=True)
    return logits[:, -1]


def step(model: LanguageModel, tokens: Tensor, cache: KVCache) -> Tensor:
    """Logits (b, v) after one more token (b,) in each row."""
    return model(tokens[:, None], cache=cache, last_only=True)[:, -1]


_compiled: WeakKeyDictionary[nn.Module, Callable[..., Tensor]] = WeakKeyDictionary()


def compiled_step(model: nn.Module) -> Callable[..., Tensor]:
    """`step` for one token in each row of a static cache of this model, of any room, with its small
    operations fused: on a GPU, into the products of a single row too, which torch then compiles itself."""
    if model not in _compiled:
        # Torch counts how often it compiles the same code, for other shapes or models, and then gives up.
        own = FunctionType(step.__code__.replace(), step.__globals__)
        options: dict[str, Any] = {"coordinate_descent_tuning": True}
        _compiled[model] = torch.compile(own, fullgraph=True, dynamic=True, options=options)
    return _compiled[model]


def prefix_length(model: nn.Module) -> int:
    """How many of the first tokens shown to the model predict nothing."""
    return getattr(model, "prefix_len", 0)


class Context:
    """The tokens of each row, those of them that the model is shown, and the cache of these.

    A row is shown its last `latents` tokens and, to Perceiver AR, up to p before them as prefix. They become
    more with every token up to `most`; the next one moves the row's window on by `stride`, and all is read
    anew.

    mask: (b, t) bool, the tokens of the prompt that may be attended to.  lengths: of the rows, where they
    differ.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: Tensor,
        mask: Tensor | None,
        *,
        lengths: list[int] | None = None,
        room: int,
        window: int | None,
        stride: int | None,
        use_cache: bool,
        compile: bool = False,
        **inputs: Any,
    ) -> None:
        b, t = prompt.shape
        self.model, self.inputs = model, inputs
        # What torch.compile made of one of ours takes what that takes, but would be compiled for each length
        # of a cache.
        self.takes_mask = isinstance(getattr(model, "_orig_mod", model), LanguageModel)
        self.use_cache = use_cache and isinstance(model, LanguageModel)
        self.modules = list(model.modules())
        self.prefix = prefix_length(model)
        self.tokens = torch.cat([prompt, prompt.new_zeros(b, room)], dim=1)
        # Where there is no mask, and nothing to pad, the model needs none.
        self.mask = None if mask is None else torch.cat([mask, mask.new_ones(b, room)], dim=1)
        self.length = t
        self.most = t + room if window is None else window - self.prefix
        self.stride = max(1, self.most // 2) if stride is None else stride
        self.latents = [min(max(length - self.prefix, 1), self.most) for length in lengths or [t] * b]
        self.cache: KVCache | None = None
        self.packed: LanguageModel | None = None
        self.step = compiled_step(model) if compile else step
        self.recorded: RecordedSteps | None = None
        self.recordable = False
        if self.use_cache and room >= LEAST_STEPS:
            assert isinstance(model, LanguageModel)
            if prompt.device.type == "cpu":
                self.packed = packed(model)
            # A hook would be heard at the recording alone.
            self.recordable = prompt.device.type == "cuda" and not has_hooks(model)

    def read(self) -> Tensor:
        """Logits (b, v) after all tokens that are shown, from the start."""
        tokens, mask = self.shown()
        with self.evaluating():
            if not self.takes_mask:
                return self.model(tokens, **self.inputs)[:, -1]
            if not self.use_cache:
                return self.model(tokens, key_mask=mask, last_only=True, **self.inputs)[:, -1]
            assert isinstance(self.model, LanguageModel)
            if self.cache is None:
                room = self.tokens.shape[1] - self.length
                self.cache = self.model.new_cache(self.prefix + min(self.most, max(self.latents) + room))
            self.cache.clear()
            logits = prefill(self.model, tokens, self.cache, mask)
            if self.recorded is not None:
                self.recorded.catch_up()
            return logits

    def shown(self) -> tuple[Tensor, Tensor | None]:
        """What the model is to see, (b, n), and which of it are a row's tokens, or None where all are."""
        device, latents = self.tokens.device, torch.tensor(self.latents, device=self.tokens.device)
        most = max(self.latents)
        at = torch.arange(self.length - most, self.length, device=device).expand(len(latents), -1)
        prefix = torch.arange(-self.prefix, 0, device=device) + self.length - latents[:, None]
        seen = at >= self.length - latents[:, None]
        at, seen = torch.cat([prefix, at], dim=1), torch.cat([prefix >= 0, seen], dim=1)
        at = at.clamp(min=0)
        if self.mask is not None:
            seen = seen & self.mask.gather(1, at)
        return self.tokens.gather(1, at), None if seen.all() else seen

    def extend(self, drawn: Tensor) -> Tensor:
        """Logits (b, v) after one more token (b,) in each row."""
        with torch.inference_mode():  # in which they may have been made
            self.tokens[:, self.length] = drawn
        self.length += 1
        full = max(self.latents) == self.most
        self.latents = [n + 1 if n < self.most else self.most + 1 - self.stride for n in self.latents]
        if full or self.cache is None:
            return self.read()
        if self.packed is not None:
            with torch.inference_mode():
                return self._step(self.packed, drawn, self.cache)
        assert isinstance(self.model, LanguageModel)
        with self.evaluating():
            return self._step(self.model, drawn, self.cache)

    def _step(self, model: LanguageModel, drawn: Tensor, cache: KVCache) -> Tensor:
        if self.recordable:
            if self.recorded is None:
                self.recorded = RecordedSteps(partial(self.step, model), cache)
            try:
                return self.recorded(drawn)
            except (RuntimeError, ValueError) as error:
                warnings.warn(f"steps are not recorded as a CUDA graph, and slower: {error}", stacklevel=2)
                self.recorded, self.recordable = None, False
        return step(model, drawn, cache)

    def repeat(self, times: int) -> None:
        """Every row `times` times, each beside its copies."""
        self.tokens = self.tokens.repeat_interleave(times, dim=0)
        if self.mask is not None:
            self.mask = self.mask.repeat_interleave(times, dim=0)
        self.latents = [n for n in self.latents for _ in range(times)]
        if self.cache is not None:
            self.cache.repeat(times)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, for the length of one call of the model: between tokens, and
        however generation ends, the model is as its owner left it."""
        training = [module for module in self.modules if module.training]
        try:
            # Past nn.Module, which takes half a millisecond to set a hundred of these.
            for module in training:
                vars(module)["training"] = False
            with torch.inference_mode():
                yield
        finally:
            for module in training:
                vars(module)["training"] = True


class Drawn(NamedTuple):
    """A token for each row, (b,), and its log-probability under the model, of the logits as they come."""

    tokens: Tensor
    log_probs: Tensor | None


def draw_tokens(
    context: Context,
    draw: Callable[..., Tensor],
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    eos_token: int | None = None,
    pad_token: int = 0,
    remember: bool = False,
    log_probs: bool = False,
) -> Iterator[Drawn]:
    """Up to `max_new_tokens` tokens for each row of the context, as they are drawn.

    draw: logits (b, v) -> tokens (b,).  remember: draw is also told, as `seen`, which tokens were there
    already. The others as in `generate`.
    """
    if max_new_tokens == 0:
        return
    logits = context.read()
    if num_samples > 1:
        context.repeat(num_samples)
        logits = logits.repeat_interleave(num_samples, dim=0)
    rows = len(context.tokens)
    ended = torch.zeros(rows, dtype=torch.bool, device=context.tokens.device)
    seen = _seen(context, logits.shape[-1]) if remember else None
    for left in range(max_new_tokens, 0, -1):
        with torch.inference_mode():
            drawn = draw(logits) if seen is None else draw(logits, seen=seen)
            if seen is not None:
                seen = seen.scatter(1, drawn[:, None], True)
            scores = None
            if log_probs:
                wide = torch.promote_types(logits.dtype, torch.float32)
                scores = logits.to(wide).log_softmax(dim=-1).gather(1, drawn[:, None])[:, 0]
                scores = scores.masked_fill(ended, 0.0)
            written = drawn.to(context.tokens.dtype).masked_fill(ended, pad_token)
        # Copies, that know of no inference mode.
        yield Drawn(written.clone(), None if scores is None else scores.clone())
        if eos_token is not None:
            ended = ended | (drawn == eos_token)
            if ended.all():
                return
        if left > 1:
            # The model goes on seeing what was drawn in rows that have ended: a pad need not be a token.
            logits = context.extend(drawn)


def _seen(context: Context, num_tokens: int) -> Tensor:
    """Which tokens each row has so far, (b, v) bool."""
    there = torch.zeros(len(context.tokens), num_tokens, dtype=torch.int8, device=context.tokens.device)
    tokens = context.tokens[:, : context.length].long()
    mask = torch.ones_like(tokens, dtype=torch.bool) if context.mask is None else context.mask
    return there.scatter_reduce(1, tokens, mask[:, : context.length].to(there.dtype), "amax").bool()


def _prepare(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    num_samples: int = 1,
    eos_token: int | None = None,
    pad_token: int = 0,
    prompt_mask: Tensor | None = None,
    use_cache: bool = True,
    compile: bool = False,
    stride: int | None = None,
    log_probs: bool = False,
    generator: torch.Generator | None = None,
) -> Iterator[Drawn]:
    """What `generate` and `stream` share: everything is checked before the first token is asked for."""
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    num_tokens, device = model.config["num_tokens"], model.token_emb.weight.device
    check_tokens(prompt, num_tokens, device, "prompt")
    expect_integer("max_new_tokens", max_new_tokens, least=0)
    expect_integer("num_samples", num_samples)
    info = torch.iinfo(prompt.dtype)
    expect_integer("pad_token", pad_token, least=info.min)
    if pad_token > info.max:
        raise ValueError(f"pad_token: expected a number of the prompt's {prompt.dtype}, got {pad_token}")
    check_eos_token(eos_token, num_tokens)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator: expected one on {device.type}, got one on {generator.device.type}")
    window = getattr(model, "max_seq_len", None)
    if window is not None and prompt.shape[1] > window:
        raise ValueError(f"prompt: expected at most max_seq_len={window} tokens, got {prompt.shape[1]}")
    if stride is not None:
        if window is None:
            raise ValueError(f"stride: expected None for a model without a longest sequence, got {stride}")
        expect_integer("stride", stride)
        if stride > window - prefix_length(model):
            latents = window - prefix_length(model)
            raise ValueError(f"stride: expected at most the {latents} latents of the window, got {stride}")
    if compile and device.type != "cuda":
        raise ValueError(f"compile: expected a model on a GPU, got one on {device}")
    lengths = None
    if prompt_mask is not None:
        _check_prompt_mask(prompt_mask, prompt)
        lengths = prompt_mask.sum(dim=1).tolist()
    context = Context(
        model,
        prompt,
        prompt_mask,
        lengths=lengths,
        room=max_new_tokens,
        window=window,
        stride=stride,
        use_cache=use_cache,
        compile=compile,
    )

    return draw_tokens(
        context,
        partial(sampling.draw, generator=generator),
        max_new_tokens,
        num_samples=num_samples,
        eos_token=eos_token,
        pad_token=pad_token,
        remember=repetition_penalty != 1,
        log_probs=log_probs,
    )


def check_eos_token(eos_token: int | None, num_tokens: int) -> None:
    """Refuses what no model of so many tokens ends a row with."""
    if eos_token is None:
        return
    expect_integer("eos_token", eos_token, least=0)
    if eos_token >= num_tokens:
        raise ValueError(f"eos_token: expected a token below num_tokens={num_tokens}, got {eos_token}")


def _check_prompt_mask(mask: Tensor, prompt: Tensor) -> None:
    expect_mask("prompt_mask", mask, tuple(prompt.shape))
    if mask.device != prompt.device:
        raise ValueError(f"prompt_mask: expected the prompt's device {prompt.device}, got {mask.device}")
    empty = (~mask.any(dim=1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"prompt_mask: expected a token in every row, got none in rows {empty}")
    if (mask[:, 1:] < mask[:, :-1]).any():
        raise ValueError("prompt_mask: expected padding on the left only, got a False after a True")


def generate(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    num_samples: int = 1,
    eos_token: int | None = None,
    pad_token: int = 0,
    prompt_mask: Tensor | None = None,
    use_cache: bool = True,
    compile: bool = False,
    stride: int | None = None,
    log_probs: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draws up to `max_new_tokens` tokens after prompt (b, t); returns the new ones, (b, <= max_new_tokens).

    temperature, top_k, top_p, min_p, repetition_penalty: as in `palm_pytorch.generation.Sampling`;
    temperature 0 takes the most likely token.
    num_samples: tokens are drawn so many times for each prompt, which is read once: (b * num_samples, ..),
    the samples of a prompt next to each other.
    eos_token: a row ends with the first one that it draws (those of the prompt do not count) and is then
    filled with `pad_token`; when all rows have ended, generation stops.
    prompt_mask: (b, t) bool, False where a row is padded on its left, True where it has begun.
    use_cache: False reads everything anew for every token, for the same result.
    compile: on a GPU, has `torch.compile` fuse the operations of a step: that takes tens of seconds and more
    at the first call for a model, and makes every token faster from then on. Of fewer than 64 tokens, without
    the cache, or with hooks on the model, steps go as they are; elsewhere than on a GPU it is refused.
    stride: Perceiver AR only, by how many tokens a full window moves on; what it then holds is read anew.
    None is half of its latents; 1 shows every token all that the window can hold.
    log_probs: returns also the log-probability of each token, under the model as it is (without temperature,
    filters or penalty), 0 where a row has ended.
    generator: of the draws, on the model's device.

    The model is evaluated, and has its mode back between tokens and however generation ends. One that is in
    training mode is therefore not for two threads at once; in evaluation mode any number may share it.
    Raises ValueError or TypeError naming the argument that does not fit.
    """
    arguments = dict(locals())
    drawn = list(_prepare(**arguments))
    rows = len(prompt) * num_samples
    tokens = stacked([each.tokens for each in drawn], rows, prompt)
    if not log_probs:
        return tokens
    scores = [each.log_probs for each in drawn if each.log_probs is not None]
    return tokens, stacked(scores, rows, torch.empty(0, device=prompt.device))


def stacked(columns: list[Tensor], rows: int, like: Tensor) -> Tensor:
    """Columns (b,) side by side, (b, n), also where there are none."""
    return torch.stack(columns, dim=1) if columns else like.new_empty(rows, 0)


def stream(
    model: LanguageModel, prompt: Tensor, max_new_tokens: int, *, num_samples: int = 1, **options: Any
) -> Iterator[Tensor]:
    """Yields each new token of every row, (b * num_samples,), as it is drawn; the arguments are those of
    `generate`, but for log_probs.

    It may be left at any time. The weights must not change meanwhile.
    """
    if "log_probs" in options:
        raise TypeError("log_probs: stream yields tokens alone; generate gives both")
    drawn = _prepare(model, prompt, max_new_tokens, num_samples=num_samples, **options)
    return (each.tokens for each in drawn)
