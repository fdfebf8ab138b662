"""`palm generate`, on a run and on a saved model, of bytes and of a tokenizer."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from palm_pytorch import LaMDA, PaLM, from_pretrained
from palm_pytorch.cli import main
from palm_pytorch.data.tokenizer import ByteTokenizer
from palm_pytorch.training.generating import show, visible
from palm_pytorch.training.loop import train
from palm_pytorch.training.run import prepare
from palm_pytorch.training.trained import load_run

HALF = "\N{REPLACEMENT CHARACTER}"
FLAGS = ["--device", "cpu", "--precision", "float32", "--seed", "3", "--max-new-tokens", "12"]


@pytest.fixture
def run(tiny: dict[str, Any]) -> str:
    train(prepare(**{**tiny, "steps": 2, "generate_every": 0, "eval_every": 0}))
    return tiny["out"]


@pytest.fixture
def saved(tmp_path: Path) -> str:
    folder = tmp_path / "saved"
    LaMDA(num_tokens=256, dim=16, depth=1, heads=2, dim_head=8, ff_mult=2).save_pretrained(folder)
    return str(folder)


def told(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main([*arguments, *FLAGS]) == status
    return tuple(capsys.readouterr())


def test_generate_goes_on_from_a_prompt(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = told(capsys, "generate", "--checkpoint", run, "--prompt", "the quick", "--temperature", "0")
    net = load_run(run).model
    prompt = torch.tensor([list(b"the quick")])
    written = bytes(net.generate(prompt, 12, temperature=0)[0].tolist()).decode(errors="replace")
    assert out == visible("the quick" + written) + "\n"
    assert err.startswith("12 tokens in ") and err.endswith("tokens/s\n")


def test_the_seed_decides(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--checkpoint", saved, "--prompt", "a"]
    first, again = (told(capsys, *command)[0] for _ in range(2))
    other = told(capsys, *command, "--num-samples", "2")[0]
    assert first == again and len(other) > len(first)


def test_lines_of_json(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One for each sample of each prompt, whatever it holds; log-probabilities are of the model as it is."""
    (tmp_path / "prompts").write_text('\x1b "one"\ntwo é\n', encoding="utf-8")
    command = ["generate", "--checkpoint", saved, "--prompt-file", str(tmp_path / "prompts")]
    command += ["--top-k", "9", "--num-samples", "3", "--json"]
    end = json.loads(told(capsys, *command)[0].splitlines()[0])["tokens"][4]
    model = from_pretrained(saved)
    out, err = told(capsys, *command, "--eos-token", str(end))
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ['\x1b "one"'] * 3 + ["two é"] * 3
    assert err.startswith(f"{sum(len(line['tokens']) for line in lines)} tokens in ")
    assert len(lines[0]["tokens"]) <= 5 and lines[0]["tokens"][-1] == end
    for line in lines:
        assert end not in line["tokens"][:-1] and (len(line["tokens"]) == 12 or line["tokens"][-1] == end)
        assert line["text"] == bytes(line["tokens"]).decode(errors="replace")
        prompt = list(line["prompt"].encode("utf-8"))
        logits = model(torch.tensor([prompt + line["tokens"]]))[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(line["tokens"])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(line["log_probs"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["file", "-", "text"])
def test_prompts_from_a_file_or_the_input(
    where: str,
    saved: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "prompts").write_text("one é\n\ntwo\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one é\n\ntwo\n"))
    flags = {"file": ["--prompt-file", str(tmp_path / "prompts")], "-": ["--prompt-file", "-"], "text": []}
    out, err = told(capsys, "generate", "--checkpoint", saved, *flags[where])
    assert out.startswith("one é") and "\ntwo" in out
    assert err.startswith("12 tokens" if where == "text" else "24 tokens")


def test_spaces_at_the_end_of_a_line_belong_to_its_prompt(
    saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts").write_bytes(b"of \r\n")
    greedy = ["generate", "--checkpoint", saved, "--temperature", "0"]
    found = told(capsys, *greedy, "--prompt-file", str(tmp_path / "prompts"))[0]
    assert found == told(capsys, *greedy, "--prompt", "of ")[0]


def test_a_text_ends_with_the_end_token(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the tokenizer, 0xFF of bytes, unless another is asked for; it is not shown."""
    command = ["generate", "--checkpoint", saved, "--prompt", "a", "--temperature", "0"]
    out, err = told(capsys, *command)
    assert (out, err[:9]) == (told(capsys, *command, "--eos-token", "255")[0], "12 tokens")
    first = from_pretrained(saved).generate(torch.tensor([[97]]), 1, temperature=0).item()
    assert told(capsys, *command, "--eos-token", str(first))[1].startswith("1 tokens")
    assert show([0x61, 0x62, 0xFF], ByteTokenizer()) == 3
    assert capsys.readouterr().out == "ab\n"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("generate --checkpoint nowhere --prompt x", "'nowhere'"),
        ("generate --prompt x", "under runs/"),
        ("generate --checkpoint SAVED --prompt=", "prompt is empty"),
        ("generate --checkpoint SAVED --prompt x --prompt-file y", "prompt_file is 'y'"),
        ("generate --checkpoint SAVED --prompt-file missing", "missing"),
        ("generate --checkpoint SAVED --prompt-file empty", "prompt_file is 'empty', without text"),
        ("generate --checkpoint SAVED --prompt x --top-k 0", "top_k: "),
        ("generate --checkpoint SAVED --prompt x --temperature -1", "temperature: "),
        ("generate --checkpoint SAVED --prompt x --eos-token 256", "eos_token: "),
        ("generate --checkpoint SAVED --prompt x --num-samples 0", "num_samples is 0"),
        (f"generate --checkpoint SAVED --prompt x --num-samples {10**15}", "can't allocate memory"),
        ("generate --checkpoint WORDS --prompt x", "a model of 300 tokens with no tokenizer"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    flags: str,
    says: str,
    saved: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n\n")
    shape: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "ff_mult": 2}
    if "WORDS" in flags:
        PaLM(num_tokens=300, **shape).save_pretrained(tmp_path / "WORDS")
    out, err = told(capsys, *flags.replace("SAVED", saved).split(), status=2)
    assert out == "" and says in err and err.startswith("palm: error: ") and err.count("\n") == 1


def test_control_characters_are_not_obeyed() -> None:
    assert visible("a\tb\n\x1b[2Jé") == f"a\tb\n{HALF}[2Jé"
