"""Every option of a training run, once: its type, help text, rule, and default on this kind of machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any, Literal

from palm_pytorch.training.machine import select_device, select_precision
from palm_pytorch.training.options import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    Options,
    check_options,
    option,
)
from palm_pytorch.training.recipes import recipe_options
from palm_pytorch.training.schedule import check_batch_ramp
from palm_pytorch.training.sinks import LOGS


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
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
        "model", "width of the feed-forward layer, in multiples of --dim", POSITIVE, cpu=2, gpu=4
    )
    seq_len: int = option("model", "tokens in a sequence", POSITIVE, cpu=256, gpu=1024)
    cross_attn_seq_len: int | None = option(
        "model", "Perceiver AR: tokens of a sequence that are prefix (default: half of --seq-len)", POSITIVE
    )
    perceive_depth: int | None = option(
        "model", "Perceiver AR: layers that see the prefix (default: 1)", POSITIVE
    )

    architecture: str | None = option(
        "model",
        "further options of the model's constructor, as 'norm=layernorm,qk_norm=true'",
        default=None,
    )
    init_style: Literal["gpt2", "palm"] = option(
        "model",
        "embeddings of std 0.02 at first, or of std 1, with logits scaled by dim^-0.5 as in the PaLM paper",
        default="gpt2",
    )

    recipe: Literal["default", "palm"] = option(
        "recipe",
        "defaults that belong together: 'palm' has the paper's optimizer, learning rate, batch ramp, z-loss "
        "and --init-style",
        default="default",
    )
    optimizer: Literal["adamw", "adafactor"] = option(
        "recipe", "'adafactor' is PaLM's: not factorised, scaled by each parameter's size", default="adamw"
    )

    data: str | None = option(
        "data",
        "'enwik8', 'text8', 'the-pile', 'c4', 'fineweb', or 'hf:' and a data set's name; a folder of palm "
        "data prepare or of the datasets library; a file or folder of text, JSON lines or parquet, "
        "compressed or not; conversations, as JSON lines with 'messages'; integers in a .npy or .bin file "
        "(default: Enwik8, found or downloaded; failing both, the source of Python's standard library)",
        default=None,
    )
    tokenizer: str | None = option(
        "data", "'bytes', or a tokenizer's file (default: that of prepared data, else bytes)", default=None
    )
    num_tokens: int | None = option(
        "data", "of integers in a .npy or .bin file: each must be below it", POSITIVE, default=None
    )
    data_dtype: str | None = option("data", "of a .bin file, as 'uint8' or 'uint16'", default=None)
    documents: Literal["inside", "across"] = option(
        "data", "whether attention stays inside a document or reaches across them", default="inside"
    )
    text_column: str = option("data", "of records: which column is the text", default="text")
    data_config: str | None = option("data", "configuration of a data set on the hub", default=None)
    data_split: str = option("data", "split of a Hugging Face data set", default="train")
    verify_data: bool = option(
        "data", "check the SHA-256 of all prepared data, not of a gibibyte only", default=False
    )
    data_dir: str = option("data", "where Enwik8 is looked for and downloads are kept", default="data")
    num_workers: int = option(
        "data", "processes that read ahead; none of them changes what is read", NOT_NEGATIVE, default=0
    )
    batch_size: int = option("data", "sequences per slice, over all processes", POSITIVE, cpu=4, gpu=16)
    grad_accum: int = option("data", "slices per optimizer step", POSITIVE, cpu=1, gpu=2)
    batch_ramp: str | None = option(
        "data",
        "where steps get so many times as many slices: STEP:TIMES,..., as '2000:2,5000:4', or with shares of "
        "--schedule-steps, as '20%%:2,45%%:4'",
        default=None,
    )

    steps: int = option("schedule", "optimizer steps in all", POSITIVE, cpu=8_700, gpu=20_000)
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
    lr_schedule: Literal["cosine", "palm", "constant"] = option(
        "schedule",
        "after the warm-up: 'palm' is min(lr, 1/sqrt(k)) in step number k",
        default="cosine",
    )

    weight_decay: float = option(
        "regularisation",
        "of weight matrices, by AdamW, in multiples of the learning rate; by Adafactor of everything, in "
        "multiples of its square",
        NOT_NEGATIVE,
        default=0.1,
    )
    grad_clip: float = option("regularisation", "largest gradient norm; 0: any", NOT_NEGATIVE, default=1.0)
    dropout: float = option("regularisation", "of attention and feed-forward layers", FRACTION, default=0.0)
    cross_attn_dropout: float = option(
        "regularisation", "Perceiver AR: share of the prefix left out in training", FRACTION, default=0.0
    )
    prefix_truncation: float = option(
        "regularisation",
        "Perceiver AR: share of the training sequences whose prefix is cut to a random length",
        SHARE,
        default=0.0,
    )
    z_loss: float = option(
        "regularisation", "weight of log(Z)^2, added to the loss in training", NOT_NEGATIVE, default=0.0
    )

    spike_factor: float = option(
        "faults",
        "a loss above this times the median of the last 100 sets the run back to an earlier checkpoint; 0: "
        "none does",
        NOT_NEGATIVE,
        default=0.0,
    )
    spike_rewind: int = option(
        "faults", "steps before such a loss from which on batches are passed over", NOT_NEGATIVE, default=100
    )
    spike_skip: int = option("faults", "how many batches are", POSITIVE, default=300)

    device: str = option(
        "machine", "'auto' (a GPU if there is one), or PyTorch's name for it", default="auto"
    )
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "machine", "of matrix products; 'auto' is bfloat16 where that is faster", default="auto"
    )
    seed: int = option("machine", "decides weights, order of data, dropout and samples", SEED, default=42)

    parallel: Literal["auto", "none", "ddp", "fsdp", "tp", "fsdp+tp"] = option(
        "parallel",
        "how the processes that torchrun starts share the work; 'auto' is none for one, ddp for several",
        default="auto",
    )
    tensor_parallel: int | None = option(
        "parallel",
        "processes that share each layer (default: all for tp, those of a machine for fsdp+tp)",
        POSITIVE,
        default=None,
    )
    activation_checkpointing: Literal["none", "attention", "block"] = option(
        "parallel", "what is computed again in the backward pass, to save memory", default="none"
    )
    compile: bool = option("parallel", "compile each block by torch.compile", default=False)

    init: str | None = option(
        "run",
        "start from weights that are there: of a run (RUN/best: of its best checkpoint), a saved model, the "
        "hub or an older project's file; they decide the options of the model",
        default=None,
    )
    out: str = option("run", "the run's folder (default: runs/MODEL-DATE-TIME)")
    resume: str | None = option(
        "run",
        "go on from a run's folder or one of its checkpoints; alone or 'auto': from the newest under --out "
        "(from the start, if there is none), or under runs/ without --out. Options that are not given are "
        "those of that run, but for --parallel and --tensor-parallel",
        default=None,
        bare="auto",
    )
    eval_every: int = option("run", "steps between validations; 0: only the last", NOT_NEGATIVE, default=500)
    eval_windows: int = option("run", "sequences that a validation scores", POSITIVE, cpu=128, gpu=512)
    test_windows: int = option("run", "sequences that the final test scores", POSITIVE, cpu=1_024, gpu=8_192)
    generate_every: int = option(
        "run", "steps between samples, and one at the end; 0: none", NOT_NEGATIVE, default=1_000
    )
    generate_length: int = option("run", "tokens in a sample", POSITIVE, cpu=200, gpu=500)
    save_every: int = option(
        "run", "steps between checkpoints; 0: only the last", NOT_NEGATIVE, default=1_000
    )
    log: str | None = option(
        "run",
        "where metrics go besides metrics.jsonl: 'tensorboard', 'wandb' or 'tensorboard,wandb'",
        LOGS,
        default=None,
    )
    peak_flops: float | None = option(
        "run",
        "FLOP/s of a device at best, for mfu in the metrics (default: known of many GPUs, measured of a CPU)",
        POSITIVE,
        default=None,
    )
    keep: int = option(
        "run", "newest checkpoints to keep; the best by validation stays too", POSITIVE, default=3
    )
    keep_every: int = option("run", "and those of every so many steps; 0: no others", NOT_NEGATIVE, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
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
                ("prefix_truncation", 0),
            ):
                if getattr(self, name) != unused:
                    raise ValueError(
                        f"{name} is {getattr(self, name)} and model {self.model!r}; only perceiver-ar has it"
                    )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}; it must be at most lr ({self.lr})")
        if self.spike_skip <= self.spike_rewind:
            raise ValueError(
                f"spike_skip is {self.spike_skip}; it must be above spike_rewind ({self.spike_rewind}), or "
                "the batch of the spike would be read again"
            )
        if self.batch_ramp is not None:
            check_batch_ramp(self.batch_ramp, self.schedule_steps)
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
        device = select_device(given.get("device", "auto"))
        kind = "cpu" if device.type == "cpu" else "gpu"
        machine = {spec.name: spec.metadata[kind] for spec in fields(cls) if kind in spec.metadata}
        filled = {**machine, **recipe_options(given), **given}
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
        if filled.get("precision", "auto") == "auto":
            # Decided once: what is measured anew for a resumed run might come out otherwise.
            precision = select_precision("auto", device)
            filled["precision"] = str(precision).removeprefix("torch.")
        return cls(**(derived | filled))

    @property
    def tokens_per_step(self) -> int:
        """Input tokens that one optimizer step consumes, over all slices and processes; with a batch ramp,
        at first."""
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
