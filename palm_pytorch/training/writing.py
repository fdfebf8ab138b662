"""Text from a trained model, as it is drawn: what `palm generate` and `palm chat` do."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from palm_pytorch import LaMDA, from_pretrained
from palm_pytorch.checkpoints import Tokenizer, find_tokenizer
from palm_pytorch.data.windows import NUM_TOKENS
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.training.checkpoint import find_checkpoint, load_checkpoint
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.machine import select_device, select_precision
from palm_pytorch.training.options import POSITIVE, SEED, check_options, option
from palm_pytorch.training.run import build_model


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and where.

    Raises:
        TypeError, ValueError: an option has the wrong type or breaks its rule.
    """

    checkpoint: str = option(
        "model",
        "a run's folder, one of its checkpoints, or a folder of `save_pretrained`; 'auto' is the newest run "
        "under runs/",
        default="auto",
    )
    device: str = option("model", "'auto' (a GPU if there is one), or PyTorch's name for it", default="auto")
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "model", "of weights; 'auto' is bfloat16 where the processor is fast at it", default="auto"
    )

    max_new_tokens: int = option("text", "tokens to write, at most", POSITIVE, default=256)
    temperature: float = option("text", "divides the logits; 0 takes the likeliest token", default=1.0)
    top_k: int | None = option("text", "draw from the likeliest so many", default=None)
    seed: int | None = option("text", "of the draws (default: another one each time)", SEED, default=None)

    def __post_init__(self) -> None:
        check_options(type(self), {spec.name: getattr(self, spec.name) for spec in fields(self)})

    def sampling(self, device: torch.device) -> dict[str, Any]:
        """Those of the options that `generate` takes by the same name, and a generator."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        texts = [spec.name for spec in fields(self) if spec.metadata["group"] == "text"]
        given = {name: getattr(self, name) for name in texts if name != "seed"}
        return given | {"generator": generator}


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
    eos_token: int | None = option("text", "token that ends a text (default: none does)", default=None)


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ModelOptions):
    """Options of `palm chat`."""

    top_k: int | None = option("text", "draw from the likeliest so many", default=40)
    num_candidates: int = option("text", "replies to choose the likeliest from", POSITIVE, default=16)


# ------------------------------------------------------------------------------------------------- models


def load_model(options: ModelOptions) -> tuple[LanguageModel, Coding]:
    """The model that the options name, and how its tokens are text.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint, or no text to its tokens.
    """
    device = select_device(options.device)
    dtype = select_precision(options.precision, device)
    folder = Path(options.checkpoint)
    tokenizer = None
    if options.checkpoint != "auto" and any(folder.glob("*.safetensors")):
        model: LanguageModel = from_pretrained(folder, device=device, dtype=dtype)
        tokenizer = find_tokenizer(folder)
    else:
        model = load_run(options.checkpoint).to(device, dtype)
    if tokenizer is None and model.config["num_tokens"] != NUM_TOKENS:
        raise ValueError(
            f"checkpoint is {options.checkpoint}, a model of {model.config['num_tokens']:,} tokens with no "
            f"tokenizer; expected one in the same folder, or a model of {NUM_TOKENS} bytes"
        )
    return model.eval(), ByteCoding() if tokenizer is None else TokenizerCoding(tokenizer)


def load_run(checkpoint: str) -> LanguageModel:
    """The model of a run's newest checkpoint, of the one named, or of the newest run ("auto")."""
    try:
        folder = find_checkpoint(checkpoint, None)
    except FileNotFoundError:
        folder = None
    if folder is None:
        where = "under runs/" if checkpoint == "auto" else "there"
        raise FileNotFoundError(
            f"checkpoint is {checkpoint!r}, but there is neither a complete checkpoint of a run nor a saved "
            f"model {where}"
        )
    saved = load_checkpoint(folder)
    model = build_model(TrainConfig(**saved["config"]))
    model.load_state_dict(saved["model"])
    assert isinstance(model, LanguageModel)
    return model


# --------------------------------------------------------------------------------------------------- text


class Coding(Protocol):
    """Between text and the tokens of a model."""

    def encode(self, text: str) -> list[int]: ...

    def decoder(self) -> Callable[[int | None], str]:
        """What each token adds to a text, whole characters only; None, the end, gives what is left."""


class ByteCoding:
    """A token is a byte of UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="surrogateescape"))

    def decoder(self) -> Callable[[int | None], str]:
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        return lambda token: decode(b"", final=True) if token is None else decode(bytes([token]))


class TokenizerCoding:
    """Tokens as a tokenizer's file has them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decoder(self) -> Callable[[int | None], str]:
        # What a token looks like depends on those before it, so a few of these are decoded with it.
        tokens: list[int] = []
        shown = 0

        def decode(token: int | None) -> str:
            nonlocal shown
            if token is not None:
                tokens.append(token)
            before, text = (self.tokenizer.decode(part) for part in (tokens[:shown], tokens))
            if token is not None and text.endswith("\N{REPLACEMENT CHARACTER}"):
                return ""  # half a character
            del tokens[: max(0, shown - 4)]
            shown = len(tokens)
            return text[len(before) :]

        return decode


def visible(text: str) -> str:
    """Text without control characters, which a terminal would obey, but for new lines and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def prompts(options: GenerateOptions) -> Iterator[str]:
    """Those of the options: one, or one for each line that is not empty.

    Raises:
        ValueError: both ways of giving them are used, or a prompt is empty.
    """
    if options.prompt is not None and options.prompt_file is not None:
        raise ValueError(f"prompt_file is {options.prompt_file!r}; expected none beside prompt")
    if options.prompt_file is None:
        text = sys.stdin.read() if options.prompt is None else options.prompt
        if not text:
            raise ValueError("prompt is empty; expected some text to go on from")
        yield text
    elif options.prompt_file == "-":
        yield from (line for line in map(str.rstrip, sys.stdin) if line)
    else:
        with open(options.prompt_file, encoding="utf-8", errors="surrogateescape") as file:
            yield from (line for line in map(str.rstrip, file) if line)


def write(options: GenerateOptions) -> None:
    """Print each prompt and how the model goes on, as it is drawn; then, on stderr, how fast that was."""
    model, coding = load_model(options)
    device = model.token_emb.weight.device
    sampling = options.sampling(device)
    tokens, seconds = 0, 0.0
    for text in prompts(options):
        stream = model.stream(torch.tensor([coding.encode(text)], device=device), pad_token=-1, **sampling)
        started = time.perf_counter()
        if options.num_samples == 1:
            print(visible(text), end="", flush=True)
            tokens += show((int(each) for each in stream), coding)
        else:
            for sample in zip(*(each.tolist() for each in stream), strict=True):
                print(visible(text), end="")
                tokens += show((token for token in sample if token != -1), coding)
        seconds += time.perf_counter() - started
    rate = tokens / seconds if seconds else 0
    print(f"{tokens:,} tokens in {seconds:,.1f} s: {rate:,.0f} tokens/s", file=sys.stderr)


def show(tokens: Iterable[int], coding: Coding) -> int:
    """Print tokens as text while they come; how many there were."""
    decode, shown = coding.decoder(), 0
    try:
        for token in tokens:
            print(visible(decode(token)), end="", flush=True)
            shown += 1
    finally:  # after Ctrl-C too
        print(visible(decode(None)), flush=True)
    return shown


def chat(options: ChatOptions) -> None:
    """Answer each line of standard input with the likeliest of several one-line replies, until it ends.

    Raises:
        ValueError: the model is no LaMDA.
    """
    model, coding = load_model(options)
    if not isinstance(model, LaMDA):
        raise ValueError(f"checkpoint is {options.checkpoint}, a {type(model).__name__}; expected a LaMDA")
    device = model.token_emb.weight.device
    sampling = options.sampling(device)
    newline = coding.encode("\n")[-1]
    tokens: list[int] = []
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        tokens += coding.encode(line.rstrip("\n") + "\n")
        prompt = torch.tensor([tokens], device=device)
        ranked = model.sample_and_rank(prompt, eos_token=newline, **sampling)
        best = ranked.tokens[0, 0].tolist()
        reply = best[: best.index(newline)] if newline in best else best
        show(reply, coding)
        tokens += [*reply, newline]
