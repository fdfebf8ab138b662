"""The `palm` command. The flags of a subcommand are the fields of the dataclass that holds its options."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from palm_pytorch import __version__
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.loop import train
from palm_pytorch.training.run import prepare


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

    given = vars(parser.parse_args(arguments))
    if isinstance(sys.stdout, io.TextIOWrapper):  # samples are any text, and logs are to be read as they grow
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    command = given.pop("command")
    try:
        return command(**given)
    except KeyboardInterrupt:
        print("palm: stopped", file=sys.stderr)
        return 130
