"""What a command's options are made of: fields of a dataclass, each with its type, help text and rule."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class Rule(NamedTuple):
    """What an option's value must satisfy, in words and as a test."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("a finite number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Rule("a finite number, 0 or more", lambda value: 0 <= value < math.inf)
SEED = Rule("a number from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)
FRACTION = Rule("a number from 0 up to, but not including, 1", lambda value: 0 <= value < 1)
SHARE = Rule("a number from 0 to 1", lambda value: 0 <= value <= 1)


def option(group: str, help: str, rule: Rule | None = None, **details: Any) -> Any:
    """A field of an options dataclass.

    `details` are `default`, or `cpu` and `gpu`, the defaults there; and `bare`, what the flag means alone.
    A field with no default is worked out from the others, as its help text says.
    """
    metadata = {"group": group, "help": help, "rule": rule, **details}
    return field(default=details.get("default", MISSING), metadata=metadata)


def check_options(options: type, values: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError unless each of `values` is an option, has its type and keeps its rule."""
    hints, specs = get_type_hints(options), {spec.name: spec for spec in fields(options)}
    for name, value in values.items():
        if name not in specs:
            raise TypeError(f"{name} is not an option; there are {', '.join(specs)}")
        hint, rule = hints[name], specs[name].metadata["rule"]
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(get_args(hint))}")
            continue
        kinds = get_args(hint) or (hint,)
        accepted = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; expected {wanted}")
        if rule is not None and value is not None and not rule.holds(value):
            raise ValueError(f"{name} is {value!r}; expected {rule.text}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the options of a command.

    Raises:
        TypeError, ValueError: an option has the wrong type or breaks its rule.
    """

    def __post_init__(self) -> None:
        check_options(type(self), vars(self))


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
