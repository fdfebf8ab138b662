"""What a run's options come to: anew, from weights that are there, or on from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from palm_pytorch.data.tokenizer import Tokenizer, load_tokenizer, stored_tokenizer
from palm_pytorch.training.checkpoint import Source, check_same_model, read_about
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.initial_weights import InitialWeights
from palm_pytorch.training.manifest import DamagedError
from palm_pytorch.training.rendezvous import restarted

OF_ONE_START = ("parallel", "tensor_parallel")  # options that describe its machines, not the run


class Plan(NamedTuple):
    """What options come to, before anything is built.

    source: the run to go on with, or None to start.
    weights: to start from, or None for new ones.
    tokenizer: that of the options, or else of what the run goes on from; None leaves it to the data.
    restart: there was nothing yet to go on with.
    """

    config: TrainConfig
    source: Source | None
    weights: InitialWeights | None
    tokenizer: Tokenizer | None
    restart: bool

    @staticmethod
    def of(given: dict[str, Any]) -> Plan:
        """That of the `given` options; raises as `prepare`."""
        if given.get("init") and given.get("resume") and not (given["resume"] == "auto" and given.get("out")):
            raise ValueError(
                f"init is {given['init']!r} and resume {given['resume']!r}; expected one of them, or resume "
                "'auto' and out, to start from init where out has no checkpoint yet"
            )
        given = restarted(given)
        named = given.get("tokenizer")
        source = Source.find(given["resume"], given.get("out")) if given.get("resume") else None
        restart = bool(given.get("resume")) and source is None
        weights, tokenizer = None, None
        if source is not None:
            saved = read_config(source)
            check_same_model(saved, given)
            tokenizer = stored_tokenizer(source.run)
            kept = {name: value for name, value in saved.items() if name not in OF_ONE_START}
            if "lr" in given and kept.get("min_lr") == kept["lr"] / 10:  # which was worked out, and is anew
                del kept["min_lr"]
            given = {**kept, "out": str(source.run), **keep_precision(given, saved)}
        else:
            if restart:
                given = keep_precision(given, stored_config(Path(given["out"])))
            if given.get("init"):
                weights = InitialWeights.read(given["init"], given)
                given, tokenizer = {**given, **weights.options}, weights.tokenizer
        config = TrainConfig.for_machine(**given)
        if named is not None:
            tokenizer = load_tokenizer(named)
        return Plan(config, source, weights, tokenizer, restart)


def keep_precision(given: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with the precision that "auto" was when the run began: measured anew it might be another."""
    if "precision" in saved and given.get("precision", "auto") == "auto":
        return {**given, "precision": saved["precision"]}
    return given


def stored_config(run: Path) -> dict[str, Any]:
    """The options that the run in a folder was last started with; none where the folder does not tell."""
    try:
        options = dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    return options if "model" in options else {}


def read_config(source: Source) -> dict[str, Any]:
    """The options of the run that is resumed: those that it was last started with, or a checkpoint's.

    Raises:
        DamagedError: neither the run's folder nor one of its checkpoints tells them.
    """
    if saved := stored_config(source.run):
        return saved
    damaged: list[DamagedError] = []
    for folder in reversed(source.candidates):
        try:
            return dict(read_about(folder)["config"])
        except DamagedError as error:
            damaged.append(error)
    raise DamagedError("; ".join(map(str, damaged)))
