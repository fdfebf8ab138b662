"""What is saved comes back, whole or not at all, and only where it belongs."""

from __future__ import annotations

import os
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from palm_pytorch.data.corpus import Corpus
from palm_pytorch.training.checkpoint import (
    TrainState,
    check_same_model,
    complete_checkpoints,
    find_checkpoint,
    load_checkpoint,
    random_state,
    save_checkpoint,
    seed_everything,
    set_random_state,
)
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.optim import build_optimizer, set_learning_rate

CPU = torch.device("cpu")


def new_state(weight_decay: float = 0.1) -> TrainState:
    config = TrainConfig.for_machine(weight_decay=weight_decay, out="run")
    corpus = Corpus("poem", np.zeros(1, dtype=np.uint8), Path("poem.txt"), "poem.txt", "f" * 64)
    model = nn.Linear(3, 2)
    return TrainState(model, build_optimizer(model, weight_decay=weight_decay), config, corpus)


def take_step(state: TrainState) -> None:
    set_learning_rate(state.optimizer, 0.1)
    state.model(torch.randn(4, 3)).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.advance(12, 0.5)


def fake_checkpoint(run: Path, step: int, state: str = "state.pt") -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / state).write_bytes(b"")
    return folder


def test_a_saved_state_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    straight = new_state()
    for _ in range(3):
        take_step(straight)
    folder = save_checkpoint(straight, tmp_path, keep=1)
    for _ in range(2):
        take_step(straight)

    torch.manual_seed(999)
    resumed = new_state()
    resumed.load_state_dict(load_checkpoint(folder))
    assert (resumed.step, resumed.tokens, resumed.seconds) == (3, 36, 1.5)
    for _ in range(2):
        take_step(resumed)
    for ours, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(resumed.optimizer.state[ours][name], straight.optimizer.state[theirs][name])


def test_hyper_parameters_are_those_of_the_resuming_run(tmp_path: Path) -> None:
    state = new_state(weight_decay=0.1)
    take_step(state)
    other = new_state(weight_decay=0.7)
    other.load_state_dict(load_checkpoint(save_checkpoint(state, tmp_path, keep=1)))
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.7, 0.0]


def draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(()).item()


def test_all_random_streams_are_seeded_and_restored() -> None:
    seed_everything(5, CPU)
    first = draw()
    saved = random_state(CPU)
    then = [draw(), draw()]
    set_random_state(saved, CPU)
    assert [draw(), draw()] == then
    seed_everything(5, CPU)
    assert draw() == first
    seed_everything(2**63 - 1, CPU)  # more than NumPy takes
    assert not set(draw()) & set(first)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    state = new_state()
    for _ in range(4):
        take_step(state)
        save_checkpoint(state, tmp_path, keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000003", "step-00000004"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (123_456_789, 99_999_999, 5):
        fake_checkpoint(tmp_path, step)
    steps = [int(path.name.removeprefix("step-")) for path in complete_checkpoints(tmp_path)]
    assert steps == [5, 99_999_999, 123_456_789]


def test_what_is_not_complete_does_not_count(tmp_path: Path) -> None:
    whole = fake_checkpoint(tmp_path, 3)
    fake_checkpoint(tmp_path, 4, state="something-else")
    fake_checkpoint(tmp_path, 5).rename(tmp_path / "checkpoints" / ".partial-step-00000005")
    (tmp_path / "checkpoints" / "step-00000006").mkdir()
    (tmp_path / "checkpoints" / "step-00000007").write_bytes(b"a file")
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert complete_checkpoints(tmp_path) == [whole]
    assert complete_checkpoints(tmp_path / "nowhere") == []


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = new_state()
    before = save_checkpoint(state, tmp_path, keep=1)
    take_step(state)

    def fill_the_disk(content: object, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(state, tmp_path, keep=1)
    assert os.listdir(tmp_path / "checkpoints") == [before.name]
    assert load_checkpoint(before)["step"] == 0


def test_the_remains_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    for name in (".partial-step-00000000", ".partial-step-00000009"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.pt").write_bytes(b"half of it")
    save_checkpoint(new_state(), tmp_path, keep=1)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000000"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 nor a whole archive"])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    folder = fake_checkpoint(tmp_path, 3)
    (folder / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match="step-00000003 cannot be read"):
        load_checkpoint(folder)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = save_checkpoint(new_state(), tmp_path, keep=1)
    whole = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="step-00000000 cannot be read"):
        load_checkpoint(folder)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb, 2))])
def test_no_code_is_run_from_a_checkpoint(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = fake_checkpoint(tmp_path, 3)
    write(Bomb(), folder / "state.pt")
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(folder)
    assert not (tmp_path / "exploded").exists()


def test_another_text_is_refused() -> None:
    saved = new_state().state_dict()
    other = new_state()
    other.corpus = replace(other.corpus, name="novel", fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"data is novel \(0{12}\); expected .* poem \(f{12}\)"):
        other.load_state_dict(saved)


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


def test_which_checkpoint_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    older, newer = Path("runs/older"), Path("runs/newer")
    first, second = fake_checkpoint(older, 10), fake_checkpoint(older, 20)
    only = fake_checkpoint(newer, 1)
    for age, folder in enumerate((only, second, first)):
        os.utime(folder / "state.pt", (10**9 - age, 10**9 - age))
    (Path("runs") / "empty").mkdir()
    assert find_checkpoint("auto", None) == only
    assert find_checkpoint("auto", "runs/older") == second
    assert find_checkpoint("auto", "runs/empty") is None
    assert find_checkpoint("runs/older", None) == second
    assert find_checkpoint("runs/older/checkpoints/step-00000010", None) == first


@pytest.mark.parametrize(("resume", "where"), [("auto", "under runs/"), ("runs/palm", "in runs/palm")])
def test_nothing_to_resume(resume: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"resume is '{resume}', .* {where}"):
        find_checkpoint(resume, None)
