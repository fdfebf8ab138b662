"""What is saved comes back, and only where it belongs; which one is meant; what is damaged is named."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from palm_pytorch.training.checkpoint import (
    Source,
    check_same_data,
    check_same_model,
    complete_checkpoints,
    load_state,
    load_weights,
    read_about,
)
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.distributed import Parallel, start
from palm_pytorch.training.manifest import DamagedError, write_manifest
from palm_pytorch.training.saver import Saver
from palm_pytorch.training.state import TrainState


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    alone = start(TrainConfig.for_machine(out="run", device="cpu"), torch.device("cpu"))
    yield alone
    alone.stop()


def new_state(lr: float = 0.1) -> TrainState:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    return TrainState(model, AdamW(model.parameters(), lr=lr))


def take_step(state: TrainState) -> None:
    torch.manual_seed(state.step)
    state.model(torch.randn(4, 3)).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.advance(12, 0.5)


def save(state: TrainState, run: Path, parallel: Parallel) -> Path:
    saver = Saver(run, parallel, {"config": {"model": "palm"}, "data": {}}, keep=9)
    saver.save(state)
    assert saver.wait() is None
    return complete_checkpoints(run)[-1]


def fake_checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "tensors").write_bytes(b"some")
    write_manifest(folder, {"step": step})
    return folder


def test_a_saved_state_goes_on_as_if_it_had_not_stopped(tmp_path: Path, parallel: Parallel) -> None:
    straight = new_state()
    for _ in range(3):
        take_step(straight)
    folder = save(straight, tmp_path, parallel)
    for _ in range(2):
        take_step(straight)

    resumed = new_state()
    load_state(folder, resumed)
    assert (resumed.step, resumed.tokens, resumed.seconds, resumed.batch_index) == (3, 36, 1.5, 3)
    for _ in range(2):
        take_step(resumed)
    torch.testing.assert_close(resumed.tensors(), straight.tensors(), rtol=0, atol=0)
    assert set(resumed.tensors()["optimizer"]["1.bias"]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_run_that_has_taken_no_step_has_no_optimizer_state(tmp_path: Path, parallel: Parallel) -> None:
    state, other = new_state(), new_state()
    load_state(save(state, tmp_path, parallel), other)
    torch.testing.assert_close(other.tensors(), state.tensors(), rtol=0, atol=0)
    assert not other.optimizer.state


def test_weights_are_read_without_the_rest(tmp_path: Path, parallel: Parallel) -> None:
    state = new_state()
    take_step(state)
    model = new_state().model
    load_weights(save(state, tmp_path, parallel), model)
    for ours, theirs in zip(model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 3), nn.Linear(2, 2))])
def test_tensors_of_another_model_are_refused(model: nn.Module, tmp_path: Path, parallel: Parallel) -> None:
    folder = save(new_state(), tmp_path, parallel)
    with pytest.raises(DamagedError, match="step-00000000 cannot be read into this model"):
        load_state(folder, TrainState(model, AdamW(model.parameters())))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_code_is_run_from_a_checkpoint(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: Parallel
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save(new_state(), tmp_path, parallel)
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(), protocol))
    with pytest.raises(DamagedError, match=r"it asks for (posix|nt)\.mkdir"):
        load_state(folder, new_state())
    assert not (tmp_path / "exploded").exists()


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (123_456_789, 99_999_999, 5):
        fake_checkpoint(tmp_path, step)
    steps = [int(path.name.removeprefix("step-")) for path in complete_checkpoints(tmp_path)]
    assert steps == [5, 99_999_999, 123_456_789]


def test_what_is_not_complete_does_not_count(tmp_path: Path) -> None:
    whole = fake_checkpoint(tmp_path, 3)
    (fake_checkpoint(tmp_path, 4) / "manifest.json").unlink()
    fake_checkpoint(tmp_path, 5).rename(tmp_path / "checkpoints" / ".partial-step-00000005")
    (tmp_path / "checkpoints" / "step-00000006").mkdir()
    (tmp_path / "checkpoints" / "step-00000007").write_bytes(b"a file")
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert complete_checkpoints(tmp_path) == [whole]
    assert complete_checkpoints(tmp_path / "nowhere") == []


def test_which_checkpoint_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    older, newer = Path("runs/older"), Path("runs/newer")
    first, second = fake_checkpoint(older, 10), fake_checkpoint(older, 20)
    only = fake_checkpoint(newer, 1)
    for age, folder in enumerate((only, second, first)):
        os.utime(folder / "manifest.json", (10**9 - age, 10**9 - age))
    (Path("runs") / "empty").mkdir()

    def found(resume: str, out: str | None = None) -> Path | None:
        source = Source.find(resume, out)
        return None if source is None else source.undamaged()

    assert found("auto") == only
    assert found("auto", "runs/older") == second
    assert found("auto", "runs/empty") is None
    assert found("runs/older") == second
    assert found("runs/older/checkpoints/step-00000010") == first


@pytest.mark.parametrize(("resume", "where"), [("auto", "under runs/"), ("runs/palm", "in runs/palm")])
def test_nothing_to_resume(resume: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"resume is '{resume}', .* {where}"):
        Source.find(resume, None)


def test_a_damaged_checkpoint_is_passed_over_unless_it_was_named(tmp_path: Path) -> None:
    folders = [fake_checkpoint(tmp_path, step) for step in (1, 2, 3)]
    (folders[2] / "tensors").write_bytes(b"sime")
    (folders[1] / "tensors").write_bytes(b"som")
    source = Source.find(str(tmp_path), None)
    assert source is not None
    chosen, damaged = source.choose()
    assert chosen == folders[0]
    assert ["step-00000003/tensors is damaged" in str(e) for e in damaged] == [True, False]
    with pytest.warns(UserWarning, match="tensors is damaged: .*using .*step-00000001 instead") as warned:
        assert source.undamaged() == folders[0]
    assert len(warned) == 2
    named = Source.find(str(folders[1]), None)
    assert named is not None
    with pytest.raises(DamagedError, match="step-00000002/tensors is damaged: 3 bytes, expected 4"):
        named.undamaged()
    (folders[0] / "tensors").unlink()
    with pytest.raises(DamagedError, match=r"step-00000003.*step-00000002.*step-00000001/tensors is missing"):
        source.choose()


@pytest.mark.parametrize("content", ["", "[]", '{"state": 1}', "{"])
def test_plain_values_that_cannot_be_read_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(DamagedError, match=r"state\.json is missing or damaged"):
        read_about(tmp_path)


def test_another_text_or_tokenizer_is_refused() -> None:
    saved = {"name": "poem", "fingerprint": "f" * 64, "tokenizer": None}
    check_same_data(saved, {**saved, "name": "the same under another name"})
    with pytest.raises(ValueError, match=r"data is novel \(text 0{12}\); expected the text .* poem"):
        check_same_data(saved, {**saved, "name": "novel", "fingerprint": "0" * 64})
    with pytest.raises(ValueError, match=r"data is poem \(tokenizer a{12}\); expected the tokenizer"):
        check_same_data(saved, {**saved, "tokenizer": "a" * 64})


def test_another_model_is_refused_option_by_option() -> None:
    saved = {"model": "palm", "dim": 8, "depth": 2, "heads": 1, "dim_head": 8, "ff_mult": 4, "seq_len": 32}
    saved |= {"cross_attn_seq_len": None, "perceive_depth": None}
    check_same_model(saved, {})
    check_same_model(saved, {"seq_len": 64, "lr": 3.0, "dim": 8})
    with pytest.raises(ValueError) as error:
        check_same_model(saved, {"dim": 16, "depth": 2, "heads": 2})
    assert "dim is 16, in the checkpoint 8; heads is 2, in the checkpoint 1" in str(error.value)
    with pytest.raises(ValueError, match="seq_len is 64, in the checkpoint 32"):
        check_same_model({**saved, "model": "perceiver-ar"}, {"seq_len": 64})
