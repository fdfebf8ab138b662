"""`palm convert`: from whatever holds weights to a folder, or an error of one line and no folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from definitions import error
from goldens import FOLDER, golden
from small_tokenizers import tokenizer_of

from palm_pytorch import PerceiverAR, from_pretrained
from palm_pytorch.checkpoints import find_tokenizer, hub
from palm_pytorch.checkpoints.convert import convert
from palm_pytorch.cli import main
from palm_pytorch.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(golden("perceiver_ar").state, tmp_path / "older.pt")
    return tmp_path / "older.pt"


def test_convert(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older, folder = golden("perceiver_ar"), tmp_path / "model"
    flags = ["--cross-attn-seq-len", "25", "--dim-head", "36", "--heads", "3"]
    assert main(["convert", str(file), str(folder), *flags]) == 0
    model = from_pretrained(folder)
    assert type(model) is PerceiverAR and error(model(older.tokens), older.logits) <= 1e-5
    count = sum(parameter.numel() for parameter in model.parameters())
    assert capsys.readouterr().out == f"{folder}: a PerceiverAR of {count:,} parameters\n"

    tokenizer = tokenizer_of(29, tmp_path / "words.json")
    again = [
        "convert",
        str(folder),
        str(tmp_path / "half"),
        "--dtype",
        "bfloat16",
        "--tokenizer",
        str(tokenizer),
    ]
    assert main(again) == 0
    assert {p.dtype for p in from_pretrained(tmp_path / "half").parameters()} == {torch.bfloat16}
    found = find_tokenizer(tmp_path / "half")
    assert found is not None and found.num_tokens == 29
    assert main(["convert", str(tmp_path / "half"), str(tmp_path / "third")]) == 0
    assert find_tokenizer(tmp_path / "third") is not None  # goes along


def test_generate_finds_the_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, words = tmp_path / "model", tokenizer_of(29, tmp_path / "words.json")
    assert main(["convert", str(FOLDER / "palm_flax.msgpack"), str(folder), "--tokenizer", str(words)]) == 0
    capsys.readouterr()
    assert main(["generate", "--checkpoint", str(folder), "--prompt", "7", "--max-new-tokens", "3"]) == 0
    first, *others = capsys.readouterr().out.split()
    assert first.startswith("7") and others and all(0 <= int(word) < 29 for word in others)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--dim-head", "36"], "cross_attn_seq_len: expected it to be given"),
        (["--cross-attn-seq-len", "25", "--dim-head", "48"], "dim_head: expected one of [36, 54]"),
        (["--cross-attn-seq-len", "25", "--dim-head", "36", "--heads", "4"], "heads: expected 3"),
        (
            ["--cross-attn-seq-len", "25", "--dim-head", "36", "--gain", "gamma"],
            "config: PerceiverAR takes no gain",
        ),
    ],
)
def test_bad_input_is_one_line_and_no_folder(
    flags: list[str], says: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(file), str(tmp_path / "model"), *flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"palm: error: {says}") and told.count("\n") == 1
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "expected a file, and"), (b"", "is damaged"), (b"\x80\x02}q\x00.", "weights.pt: is damaged")],
)
def test_a_file_that_is_none(
    content: bytes | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "weights.pt").write_bytes(content)
    assert main(["convert", str(tmp_path / "weights.pt"), str(tmp_path / "model")]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1 and not (tmp_path / "model").exists()


def test_a_folder_that_holds_something(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(file), str(tmp_path)]) == 2
    assert "folder: expected a new or empty one" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [file]


def test_a_tokenizer_of_more_tokens_than_the_model_has(file: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"cross_attn_seq_len": 25, "dim_head": 36}
    tokenizer = str(tokenizer_of(30, tmp_path / "words.json"))
    with pytest.raises(ValueError, match=r"at most the model's 29 tokens, got 30"):
        convert(str(file), tmp_path / "model", tokenizer=tokenizer, **given)
    assert not (tmp_path / "model").exists()


def test_a_public_checkpoint_gets_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from palm_pytorch import PaLM

    asked = []

    def fetch(repo_id: str) -> Tokenizer:
        asked.append(repo_id)
        return load_tokenizer(tokenizer_of(5, tmp_path / "words.json"))

    def load(repo_id: str, **options: Any) -> PaLM:
        asked.append(repo_id)
        return PaLM(num_tokens=37, dim=8, depth=1, heads=1, dim_head=8)

    monkeypatch.setattr(hub, "fetch_tokenizer", fetch)
    monkeypatch.setattr("palm_pytorch.checkpoints.pretrained.load_from_hub", load)
    convert("conceptofmind/palm-1b", tmp_path / "model")
    assert asked == ["conceptofmind/palm-1b", "EleutherAI/gpt-neox-20b"]
    assert find_tokenizer(tmp_path / "model") is not None
