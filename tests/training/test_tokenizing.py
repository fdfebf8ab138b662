"""`palm tokenizer`: a file that gives every text back, or one line that says what is wrong and no file."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
from pathlib import Path

import pytest

from palm_pytorch.cli import main
from palm_pytorch.data.tokenizer import load_tokenizer

DRAW = random.Random(0)
TEXT = " ".join("".join(DRAW.choices("etaoinsé", k=DRAW.randint(2, 6))) for _ in range(2000))


class Bytes(io.TextIOWrapper):
    """Standard input or output whose bytes are looked at."""

    def __init__(self, content: bytes = b"") -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")


def test_train_on_several_sources_then_encode_and_decode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = len(TEXT) // 2
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT[:half].encode()))
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": TEXT[half:]}) + "\n")
    out = str(tmp_path / "made.model")
    flags = [
        "--vocab-size",
        "300",
        "--out",
        out,
        "--data-dir",
        str(tmp_path / "data"),
        "--text-column",
        "body",
    ]
    assert main(["tokenizer", "train", str(tmp_path / "a.txt.gz"), str(tmp_path / "b.jsonl"), *flags]) == 0
    tokenizer = load_tokenizer(out)
    assert capsys.readouterr().out.startswith(
        f"{out}: SentencePiece, 300 tokens ({tokenizer.fingerprint[:12]})"
    )
    assert all(len(tokenizer.encode(part)) < 0.75 * len(part) for part in (TEXT[:half], TEXT[half:]))

    content = "né 12\n\n <s>".encode() + b"\xff"
    monkeypatch.setattr(sys, "stdin", Bytes(content))
    assert main(["tokenizer", "encode", out]) == 0
    told = capsys.readouterr().out
    assert [int(word) for word in told.split()] == tokenizer.encode(content).tolist()
    monkeypatch.setattr(sys, "stdin", io.StringIO(told))
    monkeypatch.setattr(sys, "stdout", written := Bytes())
    assert main(["tokenizer", "decode", out]) == 0
    assert written.buffer.getvalue() == content  # type: ignore[attr-defined]


def test_train_on_what_is_said_in_conversations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokenizer as from the same contents as documents: nothing of their JSON is in it."""
    monkeypatch.chdir(tmp_path)
    contents = [*TEXT.split(" s"), "half a pair: \ud83d"]
    said = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "README.md").write_text("Q" * 1000)
    (tmp_path / "chats" / "a.jsonl").write_text(
        "".join(json.dumps({"messages": said[at : at + 2]}) + "\n" for at in range(0, len(said) - 1, 2))
    )
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": message["content"]}) + "\n" for message in said[: len(said) // 2 * 2])
    )
    for source in ("chats", "texts.jsonl"):
        assert main(["tokenizer", "train", source, "--vocab-size", "300", "--out", f"{source}.model"]) == 0
    assert (tmp_path / "chats.model").read_bytes() == (tmp_path / "texts.jsonl.model").read_bytes()
    assert main(["data", "prepare", "chats", "out"]) == 2
    assert "chats holds conversations; expected documents" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("train TEXT --vocab-size 300000", "vocab_size is 300,000; this text gives at most "),
        ("train TEXT --vocab-size 0", "vocab_size is 0; expected"),
        ("train TEXT --out a.json", "out is 'a.json'; expected a name that ends in .model"),
        ("train TEXT --out old.model", "out is 'old.model', which exists; expected a new file"),
        ("train nowhere.txt", "nowhere.txt"),
        ("train EMPTY", "source is ''; expected a file, a folder or a name"),
        ("train numbers.npy", "numbers.npy holds integers; expected text"),
        ("train chats.jsonl", "chats.jsonl, line 2: "),
        ("encode nowhere.model", "nowhere.model: expected 'bytes' or a tokenizer's file, got none"),
        ("encode bytes --invalid-bytes refuse", "byte 0xff at 1 is not UTF-8"),
        ("decode bytes", "token '256': expected a number from 0 to 255"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    flags: str,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "old.model").write_text("")
    (tmp_path / "numbers.npy").write_text("")
    (tmp_path / "chats.jsonl").write_text(
        '{"messages": [{"role": "assistant", "content": "a"}]}\n{"messages": 2}\n'
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 256") if "decode" in flags else Bytes(b"a\xff"))
    before = {*tmp_path.iterdir()}
    words = flags.replace("TEXT", "text.txt").split()
    assert main(["tokenizer", *("" if word == "EMPTY" else word for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.startswith("palm: error: ") and err.count("\n") == 1
    assert {*tmp_path.iterdir()} == before
