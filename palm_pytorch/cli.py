"""The `palm` command. The flags of a subcommand are the fields of the dataclass that holds its options."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from palm_pytorch import __version__
from palm_pytorch.checkpoints.convert import convert
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.loop import train
from palm_pytorch.training.options import option
from palm_pytorch.training.run import prepare
from palm_pytorch.training.writing import ChatOptions, GenerateOptions, chat, write


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Give `parser` a flag for each field of the dataclass `options`, whose fields are made by `option`.

    A flag that is not given leaves nothing in what is parsed: defaults are the dataclass's affair.
    """
    hints = get_type_hints(options)
    groups: dict[str, Any] = {}
    for spec in fields(options):
        name = spec.metadata["group"]
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        group.add_argument(
            "--" + spec.name.replace("_", "-"),
            help=spec.metadata["help"] + default_text(spec),
            default=argparse.SUPPRESS,
            **flag_details(hints[spec.name], spec.metadata.get("bare")),
        )


def flag_details(hint: Any, bare: str | None) -> dict[str, Any]:
    """How a flag of type `hint` is parsed; `bare` is its value when given without one."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    kind = next((part for part in get_args(hint) if part is not type(None)), hint)
    details = {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}
    return details if bare is None else {**details, "nargs": "?", "const": bare, "metavar": f"{bare}|TEXT"}


def default_text(spec: Field[Any]) -> str:
    """The default of an option in words; nothing where its help text tells it."""
    if "cpu" in spec.metadata:
        return f" (default: {spec.metadata['cpu']}, on a GPU {spec.metadata['gpu']})"
    return "" if spec.default in (MISSING, None) else f" (default: {spec.default})"


def train_command(**given: Any) -> int:
    """Train. The exit status is 0, or 128 plus the number of the signal that stopped the run."""
    try:
        run = prepare(**given)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        return fail(error)
    try:
        outcome = train(run)
    except FloatingPointError as error:
        return fail(error)
    return 128 + outcome.stopped_by if outcome.stopped_by else 0


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


def convert_command(source: str, folder: str, **given: Any) -> int:
    """Write weights of another format into a folder of this library's. The exit status is 0."""
    if "dtype" in given:
        given["dtype"] = getattr(torch, given["dtype"])
    try:
        model = convert(source, folder, **given)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        return fail(error)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: a {type(model).__name__} of {parameters:,} parameters")
    return 0


def generate_command(**given: Any) -> int:
    """Write text. The exit status is 0."""
    try:
        write(GenerateOptions(**given))
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        return fail(error)
    return 0


def chat_command(**given: Any) -> int:
    """Talk until the input ends. The exit status is 0."""
    try:
        chat(ChatOptions(**given))
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        return fail(error)
    return 0


def fail(error: Exception) -> int:
    """Say what is wrong, without a traceback unless Python runs in development mode (-X dev)."""
    if sys.flags.dev_mode:
        raise error
    print(f"palm: error: {error}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; `arguments` are those of the command line if not given. Returns the exit status."""
    parser = argparse.ArgumentParser("palm", description="PaLM, PaLM-lite, LaMDA and Perceiver AR.")
    parser.add_argument("--version", action="version", version=f"palm_pytorch {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    trainer = commands.add_parser("train", help="train a model on text", allow_abbrev=False)
    trainer.set_defaults(command=train_command)
    add_options(trainer, TrainConfig)
    writer = commands.add_parser("generate", help="write text with a trained model", allow_abbrev=False)
    writer.set_defaults(command=generate_command)
    add_options(writer, GenerateOptions)
    talker = commands.add_parser("chat", help="talk with a trained LaMDA", allow_abbrev=False)
    talker.set_defaults(command=chat_command)
    add_options(talker, ChatOptions)
    converter = commands.add_parser("convert", help="bring weights over from elsewhere", allow_abbrev=False)
    converter.set_defaults(command=convert_command)
    converter.add_argument("source", help="a file of an older project, a saved model's folder, or a hub id")
    converter.add_argument("folder", help="where to; new or empty")
    add_options(converter, ConvertOptions)

    given = vars(parser.parse_args(arguments))
    if isinstance(sys.stdout, io.TextIOWrapper):  # samples are any text, and logs are to be read as they grow
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    command = given.pop("command")
    try:
        return command(**given)
    except KeyboardInterrupt:
        print("palm: stopped", file=sys.stderr)
        return 130
