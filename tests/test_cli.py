"""Flags come from dataclasses, errors are one line, and `train.py` is `palm train`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest

import palm_pytorch
from palm_pytorch import cli
from palm_pytorch.cli import main
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.options import add_options, option

ROOT = Path(__file__).parents[1]


@dataclass(kw_only=True)
class Options:
    split: Literal["valid", "test"] = option("what", "which split", default="test")
    stride: int = option("what", "tokens between windows", cpu=64, gpu=8)
    context: int | None = option("what", "tokens before (default: all)")
    rate: float = option("how", "a rate", default=0.5)
    fast: bool = option("how", "whether to hurry", default=False)
    out: str | None = option("how", "a folder", default=None, bare="here")


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("test", allow_abbrev=False)
    add_options(made, Options)
    return made


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        ("", {}),
        ("--stride 3 --rate 1e-3", {"stride": 3, "rate": 0.001}),
        ("--context 7 --split valid", {"context": 7, "split": "valid"}),
        ("--fast", {"fast": True}),
        ("--no-fast", {"fast": False}),
        ("--out", {"out": "here"}),
        ("--out there", {"out": "there"}),
    ],
)
def test_flags_have_the_types_of_the_fields(
    flags: str, given: dict[str, Any], parser: argparse.ArgumentParser
) -> None:
    assert vars(parser.parse_args(flags.split())) == given


@pytest.mark.parametrize(
    "flags", ["--stride x", "--stride 1.5", "--split train", "--stri 3", "--rate", "--nonsense"]
)
def test_flags_of_another_type_are_refused(
    flags: str, parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(flags.split())
    assert exit.value.code == 2 and flags.split()[0] in capsys.readouterr().err


def test_help_tells_types_and_defaults(parser: argparse.ArgumentParser) -> None:
    told = " ".join(parser.format_help().split())
    for part in (
        "--split {valid,test} which split (default: test)",
        "--stride N tokens between windows (default: 64, on a GPU 8)",
        "--context N tokens before (default: all)",
        "--rate X a rate (default: 0.5)",
        "--fast, --no-fast whether to hurry (default: False)",
        "--out [here|TEXT] a folder",
    ):
        assert part in told


def test_help_of_train_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["train", "--help"])
    assert exit.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for spec in fields(TrainConfig):
        assert f"--{spec.name.replace('_', '-')} " in told
    assert "(default: 256, on a GPU 512)" in told


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"palm_pytorch {palm_pytorch.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["fly"]])
def test_a_command_is_needed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--dim 0", "palm: error: dim is 0; expected a finite number above 0\n"),
        ("--data nowhere.txt", "nowhere.txt"),
        (
            "--resume nowhere",
            "palm: error: resume is 'nowhere', but there is no complete checkpoint in nowhere\n",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    flags: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *flags.split()]) == 2
    told = capsys.readouterr().err
    assert says in told and told.startswith("palm: error: ") and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit_into_memory_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox " * 1000)
    flags = f"--data {tmp_path / 'text.txt'} --out {tmp_path / 'run'} --dim 30000000 --device cpu"
    assert main(["train", *flags.split()]) == 2
    told = capsys.readouterr().err
    assert "palm: error: " in told and "can't allocate memory" in told and "expected a smaller model" in told
    with pytest.raises(RuntimeError, match="another reason"):
        cli.memory_error(RuntimeError("another reason"))


def test_verified_data_have_their_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sentencepiece")
    text, tokenizer, folder = (str(tmp_path / name) for name in ("a.txt", "a.model", "prepared"))
    Path(text).write_text("".join(f"{number} brown foxes and {number**2} dogs\n" for number in range(900)))
    assert main(["tokenizer", "train", text, "--vocab-size", "300", "--out", tokenizer]) == 0
    assert main(["data", "prepare", text, folder, "--tokenizer", tokenizer, "--workers", "1"]) == 0
    assert main(["data", "verify", folder]) == 0
    stored = Path(folder) / "tokenizer.model"
    stored.write_bytes(stored.read_bytes() + b"damage")
    capsys.readouterr()
    assert main(["data", "verify", folder]) == 2 and "tokenizer.model: cannot be" in capsys.readouterr().err
    stored.unlink()
    assert main(["data", "verify", folder]) == 2 and "tokenizer is bytes" in capsys.readouterr().err


def test_of_several_processes_each_says_what_ended_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first alone said it, and torchrun had ended that one when another had failed."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert cli.fail(OSError("the disk is full"), 3) == 3
        assert capsys.readouterr().err == f"rank {rank}: palm: error: the disk is full\n"


def test_train_is_given_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(cli, "train_command", lambda **given: seen.update(given) or 0)
    assert main(["train", "--lr", "1e-3", "--steps", "20_000", "--resume", "--model", "lamda"]) == 0
    assert seen == {"lr": 0.001, "steps": 20_000, "resume": "auto", "model": "lamda"}


def test_ctrl_c_before_training_is_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**given: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train_command", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "palm: stopped\n"


def test_train_py_is_palm_train(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--seq-len", "-1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "palm: error: seq_len is -1; expected a finite number above 0\n",
    )
