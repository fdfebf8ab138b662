"""`palm chat`: what the model is shown, what is said of its replies, and a run that was trained to."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from palm_pytorch import LaMDA, PaLM
from palm_pytorch.cli import main
from palm_pytorch.generation.ranking import Ranked
from palm_pytorch.training import chatting
from palm_pytorch.training.loop import train
from palm_pytorch.training.run import prepare

FLAGS = ["--device", "cpu", "--precision", "float32", "--seed", "3"]
SHAPE: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "ff_mult": 2}


@pytest.fixture
def saved(tmp_path: Path) -> str:
    LaMDA(num_tokens=256, **SHAPE).save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


def told(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    *flags: str,
    status: int = 0,
) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    capsys.readouterr()
    assert main(["chat", *flags, *FLAGS]) == status
    return tuple(capsys.readouterr())


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the model is shown; its best reply to each is their number, the others are not."""
    texts: list[str] = []

    def ranked(model: Any, prompt: torch.Tensor, max_new_tokens: int, **options: Any) -> Ranked:
        texts.append(bytes(prompt[0].tolist()).decode())
        assert options["num_candidates"] == 16 and options["top_k"] == 40 and options["eos_token"] == 10
        replies = [f" reply\\n{len(texts)}\n\0\0", " nonsense\nnonsense"]
        tokens = torch.tensor([[list(reply.encode().ljust(20)) for reply in replies]])
        return Ranked(tokens, torch.zeros(1, 2))

    monkeypatch.setattr(chatting, "sample_and_rank", ranked)
    return texts


def test_the_model_sees_the_conversation_in_the_template(
    saved: str, shown: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = told(capsys, monkeypatch, "hello\na \\ b\n", "--checkpoint", saved, "--system", "Two\nlines.")
    assert (out, err) == ("reply\n1\nreply\n2\n", "")
    first = "system: Two\\nlines.\nuser: hello\nassistant:"
    assert shown == [first, first + " reply\\n1\nuser: a \\\\ b\nassistant:"]


def test_old_turns_leave_the_window_whole(
    saved: str, shown: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 80 tokens 20 are the reply's, and 10 `assistant:`; 50 are left: 3 turns of 14, 20 and 14."""
    flags = ["--checkpoint", saved, "--window", "80", "--max-new-tokens", "20"]
    told(capsys, monkeypatch, "message1\n" * 4 + "x" * 99 + "\n", *flags)
    reply = "assistant: reply\\n{}\n"
    turn = "user: message1\n"
    assert shown[0] == turn + "assistant:"
    for number in (1, 2, 3):
        assert shown[number] == turn + reply.format(number) + turn + "assistant:"
    assert shown[4] == "x" * 49 + "\nassistant:"  # one that does not fit: its end


def test_a_window_without_room(
    saved: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = told(capsys, monkeypatch, "a\n", "--checkpoint", saved, "--window", "20", status=2)
    assert out == "" and err == "palm: error: window is 20; expected at least 22 tokens\n"


def test_a_run_on_conversations_talks(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that knows a single answer gives it, by itself and from its saved model."""
    pair = [{"role": "user", "content": "{}"}, {"role": "assistant", "content": "yes"}]
    lines = [json.dumps({"messages": pair}).replace("{}", f"q{n}") for n in range(400)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    more = {"seq_len": 64, "steps": 100, "lr": 0.01, "dim": 32}
    more |= {"generate_every": 0, "save_every": 0, "eval_every": 0}
    run = prepare(**{**tiny, **more, "model": "lamda", "data": str(tmp_path / "chats.jsonl")})
    train(run)
    run.close()
    metrics = [json.loads(line) for line in Path(tiny["out"], "metrics.jsonl").read_text().splitlines()]
    test = next(row for row in metrics if row.get("split") == "test")
    assert test["loss"] < 0.1  # of the response alone: the question cannot be foretold
    for checkpoint in (tiny["out"], f"{tiny['out']}/model"):
        flags = ["--checkpoint", checkpoint, "--temperature", "0.5"]
        assert told(capsys, monkeypatch, "q1\nq2\n", *flags) == ("yes\nyes\n", "")


def test_a_run_on_text_is_told_apart(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(**{**tiny, "steps": 1, "generate_every": 0, "eval_every": 0})
    train(run)
    run.close()
    _, err = told(capsys, monkeypatch, "a\n", "--checkpoint", tiny["out"], "--window", "40")
    assert "was not trained on conversations" in err


@pytest.mark.parametrize("kind", [LaMDA, PaLM])
def test_any_model_answers(
    kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind(num_tokens=256, **SHAPE).save_pretrained(tmp_path / "model")
    flags = ["--checkpoint", str(tmp_path / "model"), "--num-candidates", "3", "--max-new-tokens", "5"]
    first, again = (told(capsys, monkeypatch, "hello\nyou\n", *flags)[0] for _ in range(2))
    assert first == again and first.count("\n") >= 2
