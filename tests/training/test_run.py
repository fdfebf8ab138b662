"""A run is what its options say; what cannot be run is refused before anything is written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks

from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR
from palm_pytorch.training import config as config_module
from palm_pytorch.training import run as run_module
from palm_pytorch.training.architecture import build_model
from palm_pytorch.training.checkpoint import Source, complete_checkpoints
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.run import prepare
from palm_pytorch.training.run_folder import FolderLock

SHAPE = {"num_tokens": 256, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "ff_mult": 2}


@pytest.mark.parametrize(
    ("model", "kind", "arguments"),
    [
        ("palm", PaLM, {"attn_dropout": 0.25, "ff_dropout": 0.25}),
        ("palm-lite", PaLMLite, {"attn_dropout": 0.25, "ff_dropout": 0.25}),
        ("lamda", LaMDA, {"dropout": 0.25}),
        (
            "perceiver-ar",
            PerceiverAR,
            {"dropout": 0.25, "max_seq_len": 16, "cross_attn_seq_len": 8, "perceive_depth": 1},
        ),
    ],
)
def test_the_model_is_what_the_options_say(
    model: str, kind: type, arguments: dict[str, Any], tiny: dict[str, Any]
) -> None:
    built = build_model(TrainConfig.for_machine(**tiny, model=model, dropout=0.25))
    assert type(built) is kind
    assert {**built.config, **SHAPE, **arguments} == built.config


def test_perceiver_ar_options(tiny: dict[str, Any]) -> None:
    special = {"cross_attn_seq_len": 5, "perceive_depth": 2, "cross_attn_dropout": 0.5}
    config = build_model(TrainConfig.for_machine(**tiny, model="perceiver-ar", **special)).config
    assert {**config, **special} == config


def test_a_new_run(tiny: dict[str, Any]) -> None:
    run = prepare(**tiny)
    assert (run.state.step, run.state.tokens, run.history, run.precision) == (0, 0, [], torch.float32)
    assert run.folder == Path(tiny["out"])
    saved = json.loads((run.folder / "config.json").read_text())
    assert TrainConfig(**saved) == run.config and {**saved, **tiny} == saved
    about = str(run)
    parameters = sum(p.numel() for p in run.state.model.parameters())
    for part in ("palm", f"{parameters:,} parameters", "text.txt", "train 16,200, valid 900, test 900"):
        assert part in about
    for part in ("cpu with 1 threads, float32", "0 of 6", "64 tokens: 1 x 4 sequences of 16", tiny["out"]):
        assert part in about


def test_the_seed_decides_the_weights(tiny: dict[str, Any]) -> None:
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = prepare(**{**tiny, "seed": seed, "out": f"{tiny['out']}-{name}"})
        weights.append(torch.cat([p.flatten() for p in run.state.model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_resume_command(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(**{**tiny, "out": tiny["out"] + " 2"})
    monkeypatch.setattr(sys, "argv", ["/usr/bin/palm", "train"])
    assert run.resume_command() == f"palm train --resume '{run.folder}'"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert run.resume_command() == f"{sys.executable} train.py --resume '{run.folder}'"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run.resume_command() == f"torchrun ... train.py --resume '{run.folder}' --parallel none"


@pytest.fixture
def stopped(tiny: dict[str, Any]) -> dict[str, Any]:
    """Options of a run that is there, with checkpoints of steps 2 and 4."""
    run = prepare(**tiny, lr=0.125)
    rows = [{"step": step, "split": "train"} for step in range(1, 7)]
    rows.insert(2, {"step": 2, "split": "valid"})
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, metrics_rows in ((2, 3), (4, 5)):
        run.state.step, run.state.metrics_rows = step, metrics_rows
        run.saver.save(run.state)
    assert run.saver.wait() is None
    run.close()
    return tiny


def test_a_resumed_run_keeps_the_options_that_are_not_given(stopped: dict[str, Any]) -> None:
    run = prepare(resume=stopped["out"], steps=9)
    assert run.state.step == 4 and "4 of 9 done" in str(run)
    assert "learning rates of a schedule of 6" in str(run)
    assert {**asdict(run.config), "lr": 0.125, "steps": 9, "schedule_steps": 6, "dim": 16} == asdict(
        run.config
    )
    assert [(row["step"], row["split"]) for row in run.history] == [
        *((step, "train") for step in (1, 2)),
        (2, "valid"),
        *((step, "train") for step in (3, 4)),
    ]
    assert run.events == [("resume", {"checkpoint": "step-00000004"})]
    assert prepare(resume="auto", out=stopped["out"]).state.step == 4


def test_the_least_learning_rate_goes_along_with_a_new_one(stopped: dict[str, Any]) -> None:
    """Unless it was given: it was kept from the run before, and could be above the new one."""
    config = prepare(resume=stopped["out"], lr=1e-3).config
    assert (config.lr, config.min_lr) == (1e-3, 1e-4)
    config = prepare(resume=stopped["out"], lr=1e-2, min_lr=3e-4).config
    assert (config.lr, config.min_lr) == (1e-2, 3e-4)
    assert prepare(resume=stopped["out"], lr=1e-1).config.min_lr == 3e-4


def test_options_without_a_model_are_those_of_the_checkpoint(stopped: dict[str, Any]) -> None:
    (Path(stopped["out"]) / "config.json").write_text('{"steps": 3}')
    assert prepare(resume=stopped["out"]).state.step == 4


def test_a_prefix_with_nothing_to_predict_behind_it_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Conversations of 24 tokens: it was trained at a loss of 0, up to the first score."""
    with open(tmp_path / "chats.jsonl", "w") as file:
        for number in range(400):
            turns = [{"role": "user", "content": f"{number:05}"}, {"role": "assistant", "content": "ho"}]
            file.write(f"{json.dumps({'messages': turns})}\n")
    given = {**tiny, "data": str(tmp_path / "chats.jsonl"), "model": "perceiver-ar", "seq_len": 44}
    with pytest.raises(ValueError, match="cross_attn_seq_len is 30; expected less"):
        prepare(**given, cross_attn_seq_len=30)
    assert prepare(**given, cross_attn_seq_len=3).state.step == 0


def test_an_earlier_checkpoint_is_resumed_into_a_new_folder(stopped: dict[str, Any]) -> None:
    earlier = f"{stopped['out']}/checkpoints/step-00000002"
    with pytest.raises(ValueError, match="not the newest checkpoint of its run"):
        prepare(resume=earlier)
    run = prepare(resume=earlier, out=stopped["out"] + "-branch")
    assert run.state.step == 2 and max(row["step"] for row in run.history) == 2
    assert not (run.folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        (
            {"dim": 32, "heads": 4},
            ValueError,
            "dim is 32, in the checkpoint 16; heads is 4, in the checkpoint 2",
        ),
        ({"model": "perceiver-ar"}, ValueError, "model is 'perceiver-ar', in the checkpoint 'palm'"),
        ({"steps": 3}, ValueError, "steps is 3; expected at least the 4 done already"),
        ({"lr": -1.0}, ValueError, "lr is -1.0; expected"),
        ({"data": __file__}, ValueError, r"data is test_run\.py \(text .*\); expected the text .* text\.txt"),
    ],
)
def test_what_a_resumed_run_cannot_change(
    given: dict[str, Any], kind: type[Exception], says: str, stopped: dict[str, Any]
) -> None:
    config = (Path(stopped["out"]) / "config.json").read_text()
    with pytest.raises(kind, match=says):
        prepare(resume=stopped["out"], **given)
    assert (Path(stopped["out"]) / "config.json").read_text() == config


def test_options_of_the_last_start_hold_also_if_it_saved_nothing(stopped: dict[str, Any]) -> None:
    prepare(resume=stopped["out"], steps=9).close()
    assert prepare(resume=stopped["out"]).config.steps == 9


def test_options_are_found_in_a_checkpoint_where_the_folder_has_lost_them(stopped: dict[str, Any]) -> None:
    (Path(stopped["out"]) / "config.json").write_text("{")
    run = prepare(resume=stopped["out"])
    assert (run.config.lr, run.state.step) == (0.125, 4)
    assert json.loads((run.folder / "config.json").read_text())["lr"] == 0.125


def test_what_a_crash_left_after_a_checkpoints_metrics_does_not_matter(stopped: dict[str, Any]) -> None:
    metrics = Path(stopped["out"]) / "metrics.jsonl"
    metrics.write_text("".join(line + "\n" for line in metrics.read_text().split("\n")[:5]) + "\0\0\n{")
    assert len(prepare(resume=stopped["out"]).history) == 5


def test_a_damaged_checkpoint_is_set_aside(
    stopped: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(stopped["out"])
    newest = complete_checkpoints(run)[-1]
    (newest / "state.json").write_text("{}")
    resumed = prepare(resume=str(run))
    assert (resumed.state.step, len(resumed.history)) == (2, 3)
    (kind, details), _ = resumed.events
    assert kind == "checkpoint-damaged" and f"{newest / 'state.json'} is damaged" in details["error"]
    assert "going on from" in capsys.readouterr().out
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["damaged-step-00000004", "step-00000002"]


def test_a_damaged_checkpoint_that_is_named_is_an_error(stopped: dict[str, Any]) -> None:
    newest = complete_checkpoints(Path(stopped["out"]))[-1]
    (newest / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"step-00000004/\.metadata is missing"):
        prepare(resume=str(newest))
    assert len(complete_checkpoints(Path(stopped["out"]))) == 2


def test_a_folder_with_a_run_is_not_overwritten(stopped: dict[str, Any], tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    prepare(**{**stopped, "out": other})
    for given in (stopped, {"resume": stopped["out"], "out": other}):
        with pytest.raises(FileExistsError, match="holds what a run writes; expected a new folder, or --res"):
            prepare(**given)


@pytest.mark.parametrize(
    "name",
    ["model", "checkpoints", "samples", "metrics.jsonl", "loss.png", "tokenizer.model"],
)
def test_what_a_run_writes_is_not_overwritten_where_its_options_are_lost(
    name: str, tiny: dict[str, Any]
) -> None:
    """Such a folder was trained into: a model in it was removed for that of the new run."""
    kept = Path(tiny["out"]) / name / ("" if "." in name else "kept")
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    for given in (tiny, {**tiny, "resume": "auto"}):
        with pytest.raises(FileExistsError, match=rf"holds what a run writes; .* \(there is {name}\)"):
            prepare(**given)
    assert kept.read_text() == "kept" and [path.name for path in Path(tiny["out"]).iterdir()] == [name]


def test_old_checkpoints_do_not_become_those_of_a_new_run(stopped: dict[str, Any]) -> None:
    (Path(stopped["out"]) / "config.json").unlink()
    with pytest.raises(FileExistsError, match=r"there is metrics\.jsonl, checkpoints"):
        prepare(**stopped)


def test_a_finished_run_without_checkpoints_is_not_started_again(tiny: dict[str, Any]) -> None:
    prepare(**tiny).close()
    (Path(tiny["out"]) / "model").mkdir()
    with pytest.raises(FileExistsError, match=r"there is config\.json, model"):
        prepare(**tiny, resume="auto")


def test_a_run_that_begins_before_the_folder_is_locked_is_not_overwritten(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two starts found no folder; the second got the lock when the first was done with it."""

    class Late(FolderLock):
        def __init__(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").write_text("of the first")
            super().__init__(folder)

    monkeypatch.setattr(run_module, "FolderLock", Late)
    with pytest.raises(FileExistsError, match="holds what a run writes"):
        prepare(**tiny)
    assert (Path(tiny["out"]) / "config.json").read_text() == "of the first"


def test_a_run_without_a_checkpoint_yet_is_started_again_by_auto(tiny: dict[str, Any]) -> None:
    for _ in range(2):
        assert prepare(**tiny, resume="auto").state.step == 0
    with pytest.raises(FileExistsError):
        prepare(**tiny)


@pytest.mark.parametrize("given", [{}, {"precision": "auto"}])
def test_a_run_goes_on_in_the_precision_that_it_began_in(
    given: dict[str, Any], tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is measured then, with a checkpoint or from the start."""
    options = {name: value for name, value in tiny.items() if name != "precision"} | given
    monkeypatch.setattr(config_module, "select_precision", lambda name, device: torch.bfloat16)
    prepare(**options).close()
    monkeypatch.setattr(config_module, "select_precision", lambda name, device: torch.float32)
    begun = prepare(**options, resume="auto")
    assert begun.config.precision == "bfloat16"
    begun.saver.save(begun.state)
    assert begun.saver.wait() is None
    begun.close()
    assert prepare(resume=tiny["out"], **given).config.precision == "bfloat16"
    assert prepare(resume=tiny["out"], precision="float32").config.precision == "float32"


def test_how_processes_shared_the_work_is_not_resumed(stopped: dict[str, Any]) -> None:
    """The command that a run of several printed failed on one: tensor_parallel did not divide it."""
    config = Path(stopped["out"]) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "parallel": "tp", "tensor_parallel": 2}))
    resumed = prepare(resume=stopped["out"])
    assert (resumed.config.parallel, resumed.config.tensor_parallel) == ("auto", None)
    assert prepare(resume=stopped["out"], parallel="ddp").config.parallel == "ddp"


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        ({"data": "nowhere.txt"}, FileNotFoundError, r"nowhere\.txt"),
        ({"seq_len": 1000}, ValueError, r"too short.*seq_len=1000"),
        ({"dim": -1}, ValueError, "dim is -1"),
        ({"resume": "nowhere"}, FileNotFoundError, "resume is 'nowhere'"),
        ({"model": "perceiver-ar", "cross_attn_seq_len": 16}, ValueError, "cross_attn_seq_len is 16"),
    ],
)
def test_what_is_refused_leaves_no_folder(
    given: dict[str, Any], kind: type[Exception], says: str, tiny: dict[str, Any]
) -> None:
    with pytest.raises(kind, match=says):
        prepare(**{**tiny, **given})
    assert not Path(tiny["out"]).exists()


def test_of_a_refused_run_nothing_is_left_that_was_made_for_it(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        prepare(**{**tiny, "data": "nowhere.txt", "out": str(tmp_path / "mine" / "runs" / "run")})
    assert list((tmp_path / "mine").iterdir()) == []


# Data that are not there: what cannot be written to is refused before they are looked for.
CANNOT_BE_WRITTEN = "out is {}; expected a folder that can be written to"


def test_a_file_in_the_way_is_named(tiny: dict[str, Any]) -> None:
    Path(tiny["out"]).write_text("not a folder")
    with pytest.raises(OSError, match=CANNOT_BE_WRITTEN.format(tiny["out"])):
        prepare(**{**tiny, "data": "nowhere.txt"})


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that not even root can write to")
def test_a_folder_that_cannot_be_written_to_is_named(tiny: dict[str, Any]) -> None:
    with pytest.raises(OSError, match=CANNOT_BE_WRITTEN.format("/proc/run")):
        prepare(**{**tiny, "data": "nowhere.txt", "out": "/proc/run"})


# ------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


def resume_blind(options: dict[str, Any]) -> tuple[int, int]:
    """Where a run goes on, and how many rows it has then; the second process finds no checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            patch.setattr(Source, "find", lambda resume, out: None)
        run = prepare(**options, resume="auto")
    found = run.state.step, len(run.history)
    run.close()
    return found


def test_all_processes_go_on_from_what_the_first_one_finds(ranks: Ranks, stopped: dict[str, Any]) -> None:
    """Where a file system was behind, a process began anew, and the others waited for it to load too."""
    assert ranks.run(2, resume_blind, stopped) == [(4, 5), (4, 5)]


def refusal(options: dict[str, Any]) -> str:
    with pytest.MonkeyPatch.context() as patch, pytest.raises((OSError, ValueError)) as refused:
        if options.pop("full"):
            patch.setattr(run_module, "write_json", full_disk)
        prepare(**options)
    return str(refused.value)


def full_disk(path: Path, content: Any, indent: int = 1) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("full", [False, True])
def test_what_the_first_process_cannot_write_all_refuse(
    full: bool, ranks: Ranks, tiny: dict[str, Any]
) -> None:
    if not full:
        Path(tiny["out"]).write_text("not a folder")
    says = "No space left on device" if full else CANNOT_BE_WRITTEN.format(tiny["out"])
    first, second = ranks.run(2, refusal, {**tiny, "full": full})
    assert says in first and second == f"process 0: {first}"
