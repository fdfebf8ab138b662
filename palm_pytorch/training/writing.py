"""Text from a trained model, as it is drawn: what `palm generate` does."""

from __future__ import annotations

import fileinput
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from palm_pytorch.data.tokenizer import IntegerTokenizer, Tokenizer
from palm_pytorch.training.options import POSITIVE, option
from palm_pytorch.training.trained import ModelOptions, load_trained


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
    """Print each prompt and how the model goes on, as it is drawn; then, on stderr, how fast that was."""
    trained = load_trained(options)
    tokenizer, sampling = trained.tokenizer, options.sampling(trained.device)
    if options.eos_token is None:
        sampling["eos_token"] = tokenizer.eos_token
    tokens, seconds = 0, 0.0
    for text in prompts(options):
        prompt = torch.tensor([tokenizer.encode(text).tolist()], dtype=torch.long, device=trained.device)
        if prompt.numel() == 0:
            raise ValueError(f"prompt is {text!r}, in which {tokenizer} finds no token; expected some text")
        if isinstance(tokenizer, IntegerTokenizer):  # whose numbers go on after a space
            text = f"{text.rstrip()} "
        stream = trained.model.stream(prompt, pad_token=-1, **sampling)
        started = time.perf_counter()
        if options.num_samples == 1:
            print(visible(text), end="", flush=True)
            tokens += show((int(each) for each in stream), tokenizer)
        else:
            samples = zip(*(each.tolist() for each in stream), strict=True)
            for number, sample in enumerate(samples, 1):
                print(f"sample {number} of {options.num_samples}:", file=sys.stderr, flush=True)
                print(visible(text), end="", flush=True)
                tokens += show((token for token in sample if token != -1), tokenizer)
        seconds += time.perf_counter() - started
    rate = tokens / seconds if seconds else 0
    print(f"{tokens:,} tokens in {seconds:,.1f} s: {rate:,.0f} tokens/s", file=sys.stderr)


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
