"""How an older project names its tensors, and how they become those of a model of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palm_pytorch.checkpoints.native import refuse_names
from palm_pytorch.models.language_model import LanguageModel

Tensors = dict[str, Tensor]
SOURCE = "path_or_state_dict"


class Line(NamedTuple):
    """Our name of a tensor, theirs, and what is made of it where it does not serve as it is.

    `{i}` is the number of a block, `{n}` the one after it; outside of blocks `{n}` is one more than there are
    blocks and `{m}` two more.
    """

    ours: str
    theirs: str
    change: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Layout:
    """The files of one older project.

    mark: pattern of a name that is in each of its files, and in no other project's.
    weights: what our model is made of.
    buffers: what else its files may hold, which follows from the weights; ours are the names that `config`
    knows them by.
    config: from our weights, the buffers and what the user gave, the arguments of our model. It may change
    the weights, and refuses buffers that do not follow.
    answers: what the user may give to `config` that is no argument of our model.
    """

    project: str
    mark: str
    model: type[LanguageModel]
    weights: tuple[Line, ...]
    config: Callable[[Tensors, Tensors, Mapping[str, Any]], dict[str, Any]]
    buffers: tuple[Line, ...] = ()
    answers: tuple[str, ...] = ()

    def fits(self, names: Iterable[str]) -> bool:
        return any(re.fullmatch(self.mark, name) for name in names)

    def read(self, older: Tensors, given: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors]:
        """Arguments and weights of our model; every older tensor is used.

        given: what the user says of the model.

        Raises:
            ValueError: a tensor is missing, unknown or not what it should be; what only the user knows was
                not given, or what was given is not so.
        """
        depths = count_blocks(self.weights, older)
        weights, buffers = ([*expand(lines, depths)] for lines in (self.weights, self.buffers))
        missing = dict.fromkeys(line.theirs for line in weights if line.theirs not in older)
        refuse_names(SOURCE, f"lacks tensors of {self.project}", [*missing])
        unknown = [*{*older} - {line.theirs for line in weights + buffers}]
        refuse_names(SOURCE, f"holds tensors that {self.project} does not have", sorted(unknown))
        for line in weights:
            if not older[line.theirs].is_floating_point():
                dtype = older[line.theirs].dtype
                raise ValueError(f"{SOURCE}: expected a floating-point dtype of {line.theirs}, got {dtype}")

        converted = self.convert(older)
        found = {line.ours: older[line.theirs] for line in buffers if line.theirs in older}
        with torch.device("cpu"):  # what buffers should be, whatever the default device
            config = self.config(converted, found, given)
        for name, value in given.items():
            if name not in self.answers and config.setdefault(name, value) != value:
                expected = f"expected {config[name]!r}, as these weights have it"
                raise ValueError(f"{name}: {expected}, got {value!r}")
        return config, converted

    def convert(self, older: Tensors) -> Tensors:
        """The older weights, or gradients of them, under our names."""
        lines = expand(self.weights, count_blocks(self.weights, older))
        return {
            line.ours: line.change(older[line.theirs]) if line.change else older[line.theirs]
            for line in lines
        }


def count_blocks(lines: Iterable[Line], names: Collection[str]) -> dict[str, int]:
    """How many blocks `names` speak of, for each list of blocks of ours; at least one, and no more than could
    have names.
    """
    depths: dict[str, int] = {}
    for line in lines:
        if "{i}" in line.ours:
            pattern = re.escape(line.theirs).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{n\}", r"(?P<n>\d+)")
            found = [match.groupdict() for name in names if (match := re.fullmatch(pattern, name))]
            last = max((int(b["n"]) if "n" in b else int(b["i"]) + 1 for b in found), default=1)
            blocks = line.ours.split(".")[0]
            depths[blocks] = max(depths.get(blocks, 1), min(last, len(names)))
    return depths


def expand(lines: Iterable[Line], depths: Mapping[str, int]) -> Iterator[Line]:
    """The lines with numbers, those of a block once for each block."""
    for line in lines:
        if "{i}" in line.ours:
            for i in range(depths[line.ours.split(".")[0]]):
                yield Line(line.ours.format(i=i), line.theirs.format(i=i, n=i + 1), line.change)
        else:
            depth = depths["layers"]
            yield Line(line.ours, line.theirs.format(n=depth + 1, m=depth + 2), line.change)


# ----------------------------------------------------------------------------- what several projects share


def matrix(weights: Tensors, name: str) -> tuple[int, int]:
    """Rows and columns of a weight by our name.

    Raises:
        ValueError: it has more or fewer dimensions.
    """
    shape = tuple(weights[name].shape)
    if len(shape) != 2:
        raise ValueError(f"{name}: expected a matrix, got shape {shape}")
    return shape


def ratio(name: str, whole: int, part: int, what: str) -> int:
    """`whole / part` as the argument `name`.

    Raises:
        ValueError: it is no positive integer.
    """
    if whole < 1 or whole % part:
        raise ValueError(f"{SOURCE}: {what}, {whole}, is no multiple of {part}, so there is no {name}")
    return whole // part


def needed(name: str, given: Mapping[str, Any], why: str) -> Any:
    """What the user gave as `name`.

    Raises:
        ValueError: nothing; these tensors do not tell it.
    """
    if given.get(name) is None:
        raise ValueError(f"{name}: expected it to be given: {why}")
    return given[name]


def check_buffer(name: str, buffer: Tensor, expected: Tensor) -> None:
    """Refuse a buffer whose values would have the older model compute something else.

    Half precision is close enough: that it rounds angles is an error of the older code.
    """
    if buffer.is_meta:
        return
    same = buffer.shape == expected.shape
    if not same or not torch.allclose(buffer.double().cpu(), expected.double(), rtol=1e-2, atol=1e-6):
        raise ValueError(f"{SOURCE}: the buffer {name} is not what the shapes of the weights make it")
