"""A run that does not start from drawn weights, but from any that the library reads (`--init`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from palm_pytorch.data.batch import Dataset
from palm_pytorch.data.tokenizer import ByteTokenizer, Tokenizer
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.training.architecture import options_of, read_architecture, write_architecture
from palm_pytorch.training.resharding import fill
from palm_pytorch.training.trained import read_any

# What the file of an older project may not tell, see `load_reference`.
HINTS = ("cross_attn_seq_len", "dim_head", "heads")


@dataclass(frozen=True)
class InitialWeights:
    """What `--init` names: a model on the CPU, and its tokenizer if that is known.

    options: what a run with these weights has for the options of the group "model".
    """

    source: str
    model: LanguageModel
    tokenizer: Tokenizer | None
    options: dict[str, Any]

    @classmethod
    def read(cls, source: str, given: Mapping[str, Any]) -> InitialWeights:
        """The weights of `source`, if the `given` options do not ask for another model.

        Raises:
            ValueError: they do; it names each.
            And as `read_any`, where there is nothing to read.
        """
        told = HINTS if Path(source).is_file() else ()
        model, tokenizer = read_any(source, **{name: given[name] for name in told if name in given})
        options = options_of(model)
        asked = dict(given)
        if "architecture" in asked:  # in any order
            asked["architecture"] = write_architecture(read_architecture(asked["architecture"]))
        differing = [
            f"{name} is {asked[name]!r}, in the weights {found!r}"
            for name, found in options.items()
            if name in asked and asked[name] != found
        ]
        if differing:
            raise ValueError(f"init is {source}, another model: {'; '.join(differing)}")
        return cls(source, model, tokenizer, options)

    def check_tokens(self, data: Dataset) -> None:
        """Raise a ValueError unless the data have the tokens of the model."""
        num_tokens, theirs = self.model.config["num_tokens"], data.tokenizer
        own = self.tokenizer
        if own is None and num_tokens == ByteTokenizer.num_tokens:
            own = ByteTokenizer()
        if own is None and num_tokens != data.num_tokens:
            raise ValueError(
                f"init is {self.source}, a model of {num_tokens:,} tokens; expected as many of the data, "
                f"which have {data.num_tokens:,} ({theirs})"
            )
        if own is not None and own.fingerprint != theirs.fingerprint:
            raise ValueError(
                f"init is {self.source}, whose tokenizer is {own}; expected that of the data too, which is "
                f"{theirs}: see --tokenizer"
            )

    def put_into(self, model: nn.Module) -> None:
        """Fill the parameters of the run's model, however they are shared out over processes."""
        weights = dict(self.model.named_parameters())
        for name, parameter in model.named_parameters():
            fill(parameter, parameter.detach(), weights[name].detach().to(parameter.dtype))
