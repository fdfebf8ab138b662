"""The `palm` command. The flags of a subcommand are the fields of the dataclass that holds its options."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import clear_frames
from typing import Any, Literal, ParamSpec, get_args

import torch

from palm_pytorch import __version__
from palm_pytorch.checkpoints.convert import convert
from palm_pytorch.data.shards import read_manifest, verify
from palm_pytorch.data.tokenizer import ByteTokenizer, InvalidBytes, expect_tokenizer, stored_tokenizer
from palm_pytorch.training.chatting import ChatOptions, chat
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.evaluating import EvaluateOptions, evaluate_model
from palm_pytorch.training.faults import TRAINING_FAILED
from palm_pytorch.training.generating import GenerateOptions, write
from palm_pytorch.training.loop import train
from palm_pytorch.training.machine import keep_to_quota
from palm_pytorch.training.options import add_options, option
from palm_pytorch.training.plot import PlotOptions, plot_runs
from palm_pytorch.training.preparing import PrepareOptions, prepare_folder
from palm_pytorch.training.run import prepare
from palm_pytorch.training.tokenizing import TokenizerOptions, decode, encode, train_on
from palm_pytorch.training.trained import read_any

# Of options, files, what is not installed, and memory, see `fail`.
REFUSALS = (ValueError, TypeError, OSError, ModuleNotFoundError, RuntimeError)

SUBCOMMANDS: dict[str, Any] = {"title": "commands", "required": True, "metavar": "COMMAND"}

P = ParamSpec("P")


def train_command(**given: Any) -> int:
    """Train. The exit status is 0, 2, 3 or 128 plus a signal's number, as `training.faults` has them."""
    try:
        run = prepare(**given)
    except REFUSALS as error:
        return fail(error)
    try:
        outcome = train(run)
    except BaseException as error:
        clear_frames(error.__traceback__)  # which hold the model, see Run.close
        if isinstance(error, FloatingPointError | OSError | RuntimeError):
            return fail(error, TRAINING_FAILED)
        raise
    finally:
        run.close()
    return 128 + outcome.stopped_by if outcome.stopped_by else 0


def refusing(command: Callable[P, None]) -> Callable[P, int]:
    """`command` as a function that returns its exit status: 0, or 2 where it refuses what it was given."""

    def run(*args: P.args, **given: P.kwargs) -> int:
        try:
            command(*args, **given)
        except REFUSALS as error:
            return fail(error)
        return 0

    return run


@refusing
def prepare_data_command(source: str, folder: str, **given: Any) -> None:
    """Make tokens of a corpus."""
    print(f"{folder}: {prepare_folder(source, folder, PrepareOptions(**given))}")


@refusing
def verify_data_command(folder: str) -> None:
    """Check every file of prepared data."""
    manifest = read_manifest(Path(folder))
    verify(Path(folder), manifest)
    expect_tokenizer(stored_tokenizer(folder) or ByteTokenizer(), manifest.tokenizer, folder)
    print(f"{folder}: {manifest}; all files are whole")


@dataclass(kw_only=True)
class ConvertOptions:
    """What `palm convert` makes, and what some files do not tell of their model (see `load_reference`)."""

    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "result", "of the weights (default: as they are)"
    )
    tokenizer: str | None = option(
        "result", "to store beside them: a file, or a hub id that has one", default=None
    )
    gain: Literal["gamma", "gamma+1"] = option(
        "model", "of norms: PaLM-rlhf-pytorch up to 0.2.3, or from 0.2.4 on"
    )
    cross_attn_seq_len: int = option("model", "prefix of a Perceiver AR")
    heads: int = option("model", "heads of attention")
    dim_head: int = option("model", "width of a head")
    xpos: bool = option("model", "whether there is xPos")
    xpos_scale_base: int = option("model", "scale base of xPos (default: 512)")
    qk_scale: float = option(
        "model", "scale of normed queries and keys: 8 for PaLM-rlhf-pytorch 0.0.63 to 0.0.68"
    )
    final_norm: bool = option("model", "whether logits are read off a normed stream")


@refusing
def convert_command(source: str, folder: str, **given: Any) -> None:
    """Write weights of another format into a folder of this library's."""
    if "dtype" in given:
        given["dtype"] = getattr(torch, given["dtype"])
    model = convert(source, folder, read=read_any, **given)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: a {type(model).__name__} of {parameters:,} parameters")


@refusing
def generate_command(**given: Any) -> None:
    """Write text."""
    write(GenerateOptions(**given))


@refusing
def chat_command(**given: Any) -> None:
    """Talk until the input ends."""
    chat(ChatOptions(**given))


@refusing
def train_tokenizer_command(sources: list[str], **given: Any) -> None:
    """Train a tokenizer."""
    options = TokenizerOptions(**given)
    print(f"{options.out}: {train_on(sources, options)}")


@refusing
def evaluate_command(source: str, **given: Any) -> None:
    """Score a model on a whole split."""
    evaluate_model(source, EvaluateOptions(**given))


@refusing
def plot_command(runs: list[str], **given: Any) -> None:
    """Draw the metrics of runs into one picture."""
    print(plot_runs(runs, PlotOptions(**given)))


def fail(error: Exception, status: int = 2) -> int:
    """Say what is wrong, without a traceback unless Python runs in development mode (-X dev); raises what
    torch does for another reason than memory.

    Of several processes each says it, although most often it is common to all: torchrun ends the others when
    the first one fails, and that one may be any.
    """
    if isinstance(error, RuntimeError):
        error = memory_error(error)
    if sys.flags.dev_mode:
        raise error
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    rank = f"rank {os.environ.get('RANK', '?')}: " if several else ""
    print(f"{rank}palm: error: {error}", file=sys.stderr)
    return status


def memory_error(error: RuntimeError) -> MemoryError:
    """What torch raises where memory ran out, in words; raises what it raises for other reasons."""
    reason = str(error).partition("\n")[0]
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in reason:
        raise error
    return MemoryError(f"{reason}: expected a smaller model, batch_size or seq_len")


def add_command(
    commands: Any, name: str, help: str, command: Callable[..., int], options: type | None = None
) -> argparse.ArgumentParser:
    """A subcommand that calls `command` with its arguments, flags for the fields of `options` among them."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, allow_abbrev=False)
    parser.set_defaults(command=command)
    if options is not None:
        add_options(parser, options)
    return parser


def add_data_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="make corpora ready to train on", allow_abbrev=False)
    verbs = data.add_subparsers(**SUBCOMMANDS)
    preparer = add_command(
        verbs, "prepare", "make tokens of a corpus, once", prepare_data_command, PrepareOptions
    )
    preparer.add_argument("source", help="as --data of palm train has it")
    preparer.add_argument("folder", help="where to; new, or left by a preparation that was stopped")
    verifier = add_command(verbs, "verify", "check all files of prepared data", verify_data_command)
    verifier.add_argument("folder", help="of palm data prepare")


def add_tokenizer_commands(commands: Any) -> None:
    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer, or look at one", allow_abbrev=False)
    verbs = tokenizer.add_subparsers(**SUBCOMMANDS)
    maker = add_command(
        verbs, "train", "make a SentencePiece tokenizer of a text", train_tokenizer_command, TokenizerOptions
    )
    maker.add_argument("sources", nargs="+", metavar="SOURCE", help="as --data of palm train has it")
    encoder = add_command(verbs, "encode", "print the tokens of standard input", refusing(encode))
    encoder.add_argument("--invalid-bytes", choices=get_args(InvalidBytes), default="keep")
    decoder = add_command(verbs, "decode", "write the text of tokens, as bytes", refusing(decode))
    for verb in (encoder, decoder):
        verb.add_argument("tokenizer", help="'bytes', or its file")


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; `arguments` are those of the command line if not given. Returns the exit status."""
    parser = argparse.ArgumentParser("palm", description="PaLM, PaLM-lite, LaMDA and Perceiver AR.")
    parser.add_argument("--version", action="version", version=f"palm_pytorch {__version__}")
    commands = parser.add_subparsers(**SUBCOMMANDS)
    add_command(commands, "train", "train a model on text", train_command, TrainConfig)
    add_command(commands, "generate", "write text with a trained model", generate_command, GenerateOptions)
    add_command(commands, "chat", "talk with a trained model", chat_command, ChatOptions)
    scorer = add_command(
        commands, "evaluate", "score a model on a whole split", evaluate_command, EvaluateOptions
    )
    scorer.add_argument(
        "source",
        metavar="MODEL",
        nargs="?",
        default="auto",
        help="a run's folder (its newest checkpoint), RUN/best, one of its checkpoints, 'auto' (the newest "
        "run), or what `palm convert` takes",
    )
    plotter = add_command(commands, "plot", "compare runs in one picture", plot_command, PlotOptions)
    plotter.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    add_data_commands(commands)
    add_tokenizer_commands(commands)
    converter = add_command(
        commands, "convert", "bring weights over from elsewhere", convert_command, ConvertOptions
    )
    converter.add_argument("source", help="an older project's file, a saved model, a hub id, or a run")
    converter.add_argument("folder", help="where to; new or empty")

    given = vars(parser.parse_args(arguments))
    warnings.formatwarning = lambda message, *where: f"palm: warning: {message}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):  # samples are any text, and logs are to be read as they grow
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    keep_to_quota()
    command = given.pop("command")
    try:
        return command(**given)
    except KeyboardInterrupt:
        print("palm: stopped", file=sys.stderr)
        return 130
