"""`palm generate` and `palm chat`, on a run and on a saved model; bytes and tokenizers as text."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from palm_pytorch import LaMDA, PaLM
from palm_pytorch.cli import main
from palm_pytorch.training.loop import train
from palm_pytorch.training.run import prepare
from palm_pytorch.training.writing import ByteCoding, TokenizerCoding, load_run, visible

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
    net = load_run(run)
    prompt = torch.tensor([list(b"the quick")])
    written = bytes(net.generate(prompt, 12, temperature=0)[0].tolist()).decode(errors="replace")
    assert out == visible("the quick" + written) + "\n"
    assert err.startswith("12 tokens in ") and err.endswith("tokens/s\n")


def test_the_seed_decides(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--checkpoint", saved, "--prompt", "a"]
    first, again = (told(capsys, *command)[0] for _ in range(2))
    other = told(capsys, *command, "--num-samples", "2")[0]
    assert first == again and len(other) > len(first)


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


def test_chat_answers_each_line(
    saved: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand you\n"))
    out, err = told(capsys, "chat", "--checkpoint", saved, "--num-candidates", "3")
    assert out.count("\n") == 2 and err == ""


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("generate --checkpoint nowhere --prompt x", "'nowhere'"),
        ("generate --prompt x", "under runs/"),
        ("generate --checkpoint SAVED --prompt=", "prompt is empty"),
        ("generate --checkpoint SAVED --prompt x --prompt-file y", "prompt_file is 'y'"),
        ("generate --checkpoint SAVED --prompt-file missing", "missing"),
        ("generate --checkpoint SAVED --prompt x --top-k 0", "top_k: "),
        ("generate --checkpoint SAVED --prompt x --temperature -1", "temperature: "),
        ("generate --checkpoint SAVED --prompt x --eos-token 256", "eos_token: "),
        ("generate --checkpoint SAVED --prompt x --num-samples 0", "num_samples is 0"),
        ("chat --checkpoint WORDS", "tokenizer"),
        ("chat --checkpoint PALM", "expected a LaMDA"),
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
    shape: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "ff_mult": 2}
    for name, num_tokens in (("PALM", 256), ("WORDS", 300)):
        if name in flags:
            PaLM(num_tokens=num_tokens, **shape).save_pretrained(tmp_path / name)
    out, err = told(capsys, *flags.replace("SAVED", saved).split(), status=2)
    assert out == "" and says in err and err.startswith("palm: error: ") and err.count("\n") == 1


# Text


def shown(coding: Any, tokens: list[int]) -> list[str]:
    decode = coding.decoder()
    return [decode(token) for token in [*tokens, None]]


def test_characters_of_several_bytes_come_whole() -> None:
    tokens = ByteCoding().encode("aé€😀b")
    assert tokens == list("aé€😀b".encode())
    assert shown(ByteCoding(), tokens) == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]
    assert shown(ByteCoding(), [0xE2, 0x82]) == ["", "", HALF]
    assert shown(ByteCoding(), [0xE2, 0x41, 0xFF]) == ["", HALF + "A", HALF, ""]


class Words:
    """A tokenizer of words with a space before them, but at the start; tokens above 90 are bytes."""

    def decode(self, tokens: list[int]) -> str:
        text = b"".join(bytes([t]) if t > 90 else b" w%d" % t for t in tokens)
        return text.decode(errors="replace").removeprefix(" ")


def test_tokens_of_a_tokenizer_come_with_their_spaces() -> None:
    coding = TokenizerCoding(Words())  # type: ignore[arg-type]
    euro = list("€".encode())
    found = shown(coding, [1, 2, *euro, 3, *[7] * 20, euro[0]])
    assert found == ["w1", " w2", "", "", "€", " w3", *[" w7"] * 20, "", HALF]


def test_control_characters_are_not_obeyed() -> None:
    assert visible("a\tb\n\x1b[2Jé") == f"a\tb\n{HALF}[2Jé"
