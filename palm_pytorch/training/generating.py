"""Text from a trained model, as it is drawn: what `palm generate` does."""

from __future__ import annotations

import fileinput
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palm_pytorch.data.tokenizer import IntegerTokenizer, Tokenizer
from palm_pytorch.training.options import POSITIVE, option
from palm_pytorch.training.trained import ModelOptions, Trained, load_trained

PAD = -1  # no token


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions):
    """Options of `palm generate`."""

    prompt: str | None = option("prompt", "text to go on from (default: standard input)", default=None)
    prompt_file: str | None = option(
        "prompt", "a file with a prompt in each line; '-' is standard input", default=None
    )
    top_p: float | None = option("text", "draw from the likeliest with this share of all", default=None)
    min_p: float | None = option(
        "text", "draw from those at least this likely beside the likeliest", default=None
    )
    repetition_penalty: float = option(
        "text", "above 1 makes tokens that were there less likely", default=1.0
    )
    num_samples: int = option(
        "text", "texts for each prompt; several are shown when all are done", POSITIVE, default=1
    )
    eos_token: int | None = option(
        "text", "token that ends a text (default: the tokenizer's end token)", default=None
    )
    json: bool = option(
        "result",
        "print each text, when it is done, as a line of JSON: prompt, text, its tokens, and in nats the "
        "log-probability of each",
        default=False,
    )


def visible(text: str) -> str:
    """Text without control characters, which a terminal would obey, but for new lines and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def prompts(options: GenerateOptions) -> Iterator[str]:
    """Those of the options: one, or one for each line that is not empty.

    Raises:
        ValueError: both ways of giving them are used, or there is no text in them.
    """
    if options.prompt is not None and options.prompt_file is not None:
        raise ValueError(f"prompt_file is {options.prompt_file!r}; expected none beside prompt")
    if options.prompt_file is None:
        text = sys.stdin.read() if options.prompt is None else options.prompt
        if not text:
            raise ValueError("prompt is empty; expected some text to go on from")
        yield text
        return
    found = False
    with fileinput.FileInput(options.prompt_file, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if line.strip():
                found = True
                yield line.rstrip("\r\n")
    if not found:
        raise ValueError(f"prompt_file is {options.prompt_file!r}, without text; expected prompts in lines")


def write(options: GenerateOptions) -> None:
    """Print each prompt and how the model goes on; then, on stderr, how fast that was."""
    trained = load_trained(options)
    tokenizer, sampling = trained.tokenizer, options.sampling(trained.device)
    if options.eos_token is None:
        sampling["eos_token"] = tokenizer.eos_token
    go_on = print_json if options.json else print_text
    tokens, seconds = 0, 0.0
    for text in prompts(options):
        prompt = torch.tensor([tokenizer.encode(text).tolist()], dtype=torch.long, device=trained.device)
        if prompt.numel() == 0:
            raise ValueError(f"prompt is {text!r}, in which {tokenizer} finds no token; expected some text")
        started = time.perf_counter()
        tokens += go_on(trained, text, prompt, **sampling)
        seconds += time.perf_counter() - started
    rate = tokens / seconds if seconds else 0
    print(f"{tokens:,} tokens in {seconds:,.1f} s: {rate:,.0f} tokens/s", file=sys.stderr)


def print_json(trained: Trained, text: str, prompt: Tensor, **sampling: Any) -> int:
    """Print a line of JSON for each text, all of a prompt at once; returns how many tokens they have."""
    tokenizer = trained.tokenizer
    drawn = trained.model.generate(prompt, pad_token=PAD, log_probs=True, **sampling)
    shown = 0
    for tokens, log_probs in zip(*(each.tolist() for each in drawn), strict=True):
        tokens = [token for token in tokens if token != PAD]
        new = tokenizer.decode([token for token in tokens if token != tokenizer.eos_token])
        line = {"prompt": text, "text": new, "tokens": tokens, "log_probs": log_probs[: len(tokens)]}
        print(json.dumps(line))
        shown += len(tokens)
    return shown


def print_text(trained: Trained, text: str, prompt: Tensor, *, num_samples: int, **sampling: Any) -> int:
    """Print the text as it is drawn, or several when all are done; returns how many tokens they have."""
    tokenizer = trained.tokenizer
    if isinstance(tokenizer, IntegerTokenizer):  # whose numbers go on after a space
        text = f"{text.rstrip()} "
    stream = trained.model.stream(prompt, pad_token=PAD, num_samples=num_samples, **sampling)
    if num_samples == 1:
        print(visible(text), end="", flush=True)
        return show((int(each) for each in stream), tokenizer)
    tokens = 0
    for number, sample in enumerate(zip(*(each.tolist() for each in stream), strict=True), 1):
        print(f"sample {number} of {num_samples}:", file=sys.stderr, flush=True)
        print(visible(text), end="", flush=True)
        tokens += show((token for token in sample if token != PAD), tokenizer)
    return tokens


def show(tokens: Iterable[int], tokenizer: Tokenizer) -> int:
    """Print tokens as text while they come; how many there were."""
    decode, shown = tokenizer.decoder(), 0
    try:
        for token in tokens:
            if token != tokenizer.eos_token:
                print(visible(decode(token)), end="", flush=True)
            shown += 1
    finally:  # after Ctrl-C too
        print(visible(decode(None)), flush=True)
    return shown
