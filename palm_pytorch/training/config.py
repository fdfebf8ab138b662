"""Every option of a training run, once: its type, help text, rule, and default on this kind of machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch


class Rule(NamedTuple):
    """What an option's value must satisfy, in words and as a test."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("a finite number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Rule("a finite number, 0 or more", lambda value: 0 <= value < math.inf)
SEED = Rule("a number from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)
FRACTION = Rule("a number from 0 up to, but not including, 1", lambda value: 0 <= value < 1)


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
class TrainConfig:
    """The options of one run, all decided. `TrainConfig.for_machine` fills in what is not given.

    Raises:
        TypeError, ValueError: an option has the wrong type, breaks its rule, or contradicts another.
    """

    model: Literal["palm", "palm-lite", "lamda", "perceiver-ar"] = option(
        "model", "which one to train", default="palm"
    )
    dim: int = option("model", "width of the model", POSITIVE, cpu=256, gpu=512)
    depth: int = option("model", "number of blocks", POSITIVE, cpu=4, gpu=12)
    heads: int = option("model", "query heads per block", POSITIVE, cpu=4, gpu=8)
    dim_head: int = option("model", "width of a head", POSITIVE, default=64)
    ff_mult: int = option(
        "model", "width of the feed-forward layer, in multiples of --dim", POSITIVE, default=4
    )
    seq_len: int = option("model", "tokens in a sequence", POSITIVE, cpu=256, gpu=1024)
    cross_attn_seq_len: int | None = option(
        "model", "Perceiver AR: tokens of a sequence that are prefix (default: half of --seq-len)", POSITIVE
    )
    perceive_depth: int | None = option(
        "model", "Perceiver AR: layers that see the prefix (default: 1)", POSITIVE
    )

    data: str | None = option(
        "data",
        "'enwik8', or a file or folder of text: plain, .gz, .xz, .bz2, .zip or .zst (default: Enwik8, found "
        "or downloaded; failing both, the source of Python's standard library)",
        default=None,
    )
    data_dir: str = option("data", "where Enwik8 is looked for and downloads are kept", default="data")
    batch_size: int = option("data", "sequences per slice, over all processes", POSITIVE, cpu=4, gpu=16)
    grad_accum: int = option("data", "slices per optimizer step", POSITIVE, cpu=1, gpu=2)

    steps: int = option("schedule", "optimizer steps in all", POSITIVE, cpu=6_000, gpu=20_000)
    schedule_steps: int = option(
        "schedule", "length of the learning rate's schedule (default: --steps)", POSITIVE
    )
    warmup_steps: int = option(
        "schedule",
        "steps of linear warm-up (default: 100, at most a tenth of --schedule-steps)",
        NOT_NEGATIVE,
    )
    lr: float = option("schedule", "peak learning rate", POSITIVE, cpu=1e-3, gpu=6e-4)
    min_lr: float = option("schedule", "where its cosine ends (default: a tenth of --lr)", NOT_NEGATIVE)

    weight_decay: float = option("regularisation", "of weight matrices, by AdamW", NOT_NEGATIVE, default=0.1)
    grad_clip: float = option("regularisation", "largest gradient norm; 0: any", NOT_NEGATIVE, default=1.0)
    dropout: float = option("regularisation", "of attention and feed-forward layers", FRACTION, default=0.0)
    cross_attn_dropout: float = option(
        "regularisation", "Perceiver AR: share of the prefix left out in training", FRACTION, default=0.0
    )

    device: str = option(
        "machine", "'auto' (a GPU if there is one), or PyTorch's name for it", default="auto"
    )
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "machine", "of matrix products; 'auto' is bfloat16 where the processor is fast at it", default="auto"
    )
    seed: int = option("machine", "decides weights, order of data, dropout and samples", SEED, default=42)

    out: str = option("run", "the run's folder (default: runs/MODEL-DATE-TIME)")
    resume: str | None = option(
        "run",
        "go on from a run's folder or one of its checkpoints; alone or 'auto': from the newest under --out "
        "(from the start, if there is none), or under runs/ without --out. Options that are not given are "
        "those of that run",
        default=None,
        bare="auto",
    )
    eval_every: int = option("run", "steps between validations; 0: only the last", NOT_NEGATIVE, default=500)
    eval_windows: int = option("run", "sequences that a validation scores", POSITIVE, cpu=128, gpu=512)
    test_windows: int = option("run", "sequences that the final test scores", POSITIVE, cpu=1_024, gpu=8_192)
    generate_every: int = option("run", "steps between samples; 0: none", NOT_NEGATIVE, default=1_000)
    generate_length: int = option("run", "tokens in a sample", POSITIVE, cpu=200, gpu=500)
    save_every: int = option(
        "run", "steps between checkpoints; 0: only the last", NOT_NEGATIVE, default=1_000
    )
    keep: int = option("run", "newest checkpoints to keep", POSITIVE, default=3)

    def __post_init__(self) -> None:
        check_options(type(self), vars(self))
        if self.model == "perceiver-ar":
            if self.cross_attn_seq_len is None or not self.cross_attn_seq_len < self.seq_len:
                raise ValueError(
                    f"cross_attn_seq_len is {self.cross_attn_seq_len}; it must be below seq_len "
                    f"({self.seq_len}), so that latents are left"
                )
        else:
            for name, unused in (
                ("cross_attn_seq_len", None),
                ("perceive_depth", None),
                ("cross_attn_dropout", 0),
            ):
                if getattr(self, name) != unused:
                    raise ValueError(
                        f"{name} is {getattr(self, name)} and model {self.model!r}; only perceiver-ar has it"
                    )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}; it must be at most lr ({self.lr})")
        if self.warmup_steps > self.schedule_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}; it must be at most schedule_steps "
                f"({self.schedule_steps})"
            )

    @classmethod
    def for_machine(cls, **given: Any) -> TrainConfig:
        """The `given` options, and for the rest what suits this machine. Defaults are decided here.

        Raises:
            TypeError, ValueError: as the class; an option that does not exist; a device that is not there.
        """
        check_options(cls, given)
        kind = "cpu" if select_device(given.get("device", "auto")).type == "cpu" else "gpu"
        filled = {spec.name: spec.metadata[kind] for spec in fields(cls) if kind in spec.metadata} | given
        filled.setdefault("model", "palm")
        perceiver = filled["model"] == "perceiver-ar"
        derived = {
            "schedule_steps": filled["steps"],
            "min_lr": filled["lr"] / 10,
            "warmup_steps": min(100, filled.get("schedule_steps", filled["steps"]) // 10),
            "cross_attn_seq_len": filled["seq_len"] // 2 if perceiver else None,
            "perceive_depth": 1 if perceiver else None,
            "out": f"runs/{filled['model']}-{time.strftime('%Y%m%d-%H%M%S')}",
        }
        return cls(**(derived | filled))

    @property
    def tokens_per_step(self) -> int:
        """Input tokens that one optimizer step consumes, over all slices and processes."""
        return self.batch_size * self.grad_accum * self.seq_len

    @property
    def prompt_len(self) -> int:
        """Tokens that a sample continues: half a sequence; of Perceiver AR, prefix and half of the rest."""
        return ((self.cross_attn_seq_len or 0) + self.seq_len + 1) // 2


def model_options(model: str) -> list[str]:
    """The options that decide the parameters of `model` and their meaning: not to change on resuming."""
    names = [spec.name for spec in fields(TrainConfig) if spec.metadata["group"] == "model"]
    if model != "perceiver-ar":  # whose positions are learned; the others' parameters take any length
        names.remove("seq_len")
    return names


def select_device(name: str) -> torch.device:
    """The device that `name` stands for: "auto" is the GPU if there is one, else the CPU.

    Raises:
        ValueError: PyTorch does not know it, or cannot use it on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device is {name!r}; expected one that PyTorch can use here ({reason})") from error
    return device


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products on `device`; "auto" is bfloat16 where the processor is fast at it."""
    if name == "auto":
        name = "bfloat16" if has_fast_bfloat16(device) else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 matrices itself, rather than by way of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if capabilities := getattr(torch.cpu, "get_capabilities", None):
        return any(capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    # Older than that function: private ones, which may be missing and know no Arm.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in probes)
