"""Every option of a training run, once: its type, help text, rule, and default on this kind of machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any, Literal

from palm_pytorch.training.machine import select_device
from palm_pytorch.training.options import FRACTION, NOT_NEGATIVE, POSITIVE, SEED, check_options, option


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
