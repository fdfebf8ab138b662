"""`palm evaluate`: every byte of a split is scored, on whatever has weights, and the result is kept."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from palm_pytorch import LaMDA, PaLM, PerceiverAR
from palm_pytorch.cli import main
from palm_pytorch.training import evaluation
from palm_pytorch.training.loop import train
from palm_pytorch.training.run import prepare
from palm_pytorch.training.trained import load_run

SHAPE: dict[str, Any] = {"num_tokens": 256, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "ff_mult": 2}
FLAGS = ["--device", "cpu", "--precision", "float32", "--batch-size", "64"]


TEXT = b"the quick brown fox jumps over the lazy dog; " * 400


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and a run of two steps on it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_bytes(TEXT)
    places = {"data": str(folder / "text.txt"), "data_dir": str(folder), "out": str(folder / "run")}
    shape = {name: size for name, size in SHAPE.items() if name != "num_tokens"}
    started = prepare(
        **{**places, **shape, "seq_len": 16, "batch_size": 4, "steps": 2, "generate_every": 0},
        **{"eval_windows": 5, "test_windows": 5, "device": "cpu", "precision": "float32", "peak_flops": 1e12},
    )
    train(started)
    started.close()
    return folder


@pytest.fixture
def run(trained: Path) -> Iterator[Path]:
    """That run, with no results yet."""
    yield trained / "run"
    (trained / "run" / "evaluations.jsonl").unlink(missing_ok=True)


@pytest.fixture
def data(trained: Path) -> list[str]:
    return ["--data", str(trained / "text.txt"), "--data-dir", str(trained)]


def told(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    capsys.readouterr()
    assert main(["evaluate", *arguments, *FLAGS]) == status
    out, err = capsys.readouterr()
    return err if status else out


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_all_bytes_of_a_split_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """18,000 bytes, of which the last 900 are for the test, and each is predicted from 16 to 9 before it."""
    out = told(capsys, str(run))
    (result,) = results(run)
    assert (result["tokens"], result["bytes"], result["seq_len"], result["stride"]) == (900, 900, 16, 8)
    assert (result["split"], result["step"], result["precision"]) == ("test", 2, "float32")
    assert result["checkpoint"].endswith("checkpoints/step-00000002")
    assert (
        f"test    {result['bits_per_byte']:.4f} bits per byte of 900, in" in out and "perplexity" not in out
    )
    assert "windows 112 of 16 tokens, 8 apart: 2.0 tokens go through the model for each" in out

    text = torch.tensor(list(TEXT))
    model, nats = load_run(str(run)).model.double(), 0.0
    with torch.no_grad():
        for position in range(17_100, 18_000):
            end = 17_100 + 16 + math.ceil(max(0, position - 17_115) / 8) * 8
            start = min(end, 18_000) - 17
            logits = model(text[None, start:position])[0, -1]
            nats -= logits.log_softmax(-1)[text[position]].item()
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / 900, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / 900), rel=1e-4)


def test_results_are_added(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, str(run), "--stride", "16")
    told(capsys, str(run / "best"), "--stride", "5", "--seq-len", "32", "--split", "valid")
    first, second = results(run)
    assert (first["stride"], first["split"], first["seq_len"]) == (16, "test", 16)
    assert (second["stride"], second["split"], second["seq_len"]) == (5, "valid", 32)
    assert first["bytes"] == second["bytes"] == 900
    told(capsys, str(run / "checkpoints" / "step-00000002"))
    assert len(results(run)) == 3


def test_a_saved_model(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PerceiverAR(**SHAPE, max_seq_len=20, cross_attn_seq_len=12).save_pretrained(tmp_path / "saved")
    out = told(capsys, str(tmp_path / "saved"), *data)
    (result,) = results(tmp_path / "saved")
    assert (result["seq_len"], result["stride"], result["bytes"], result["step"]) == (20, 4, 900, None)
    assert "a PerceiverAR of" in out
    LaMDA(**SHAPE).bfloat16().save_pretrained(tmp_path / "half")
    told(capsys, str(tmp_path / "half"), *data, "--stride", "1024")
    (result,) = results(tmp_path / "half")
    assert (result["seq_len"], result["bits_per_byte"]) == (1024, pytest.approx(8, abs=0.5))


def test_tokens_of_a_tokenizer(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bits are per byte of text, perplexity is per token."""
    tokenizers = pytest.importorskip("tokenizers")
    from palm_pytorch.data.tokenizer import load_tokenizer

    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = byte_level, tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|endoftext|>"]
    )
    made.train_from_iterator([TEXT.decode()], trainer)
    made.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(tmp_path / "words.json")
    model = PaLM(**{**SHAPE, "num_tokens": tokenizer.num_tokens})
    torch.nn.init.zeros_(model.token_emb.weight)  # every token is as likely as any other
    model.save_pretrained(tmp_path / "saved", tokenizer=tokenizer)
    out = told(capsys, str(tmp_path / "saved"), "--data", data[1], "--data-dir", str(tmp_path))
    (result,) = results(tmp_path / "saved")
    assert result["bytes"] > 2 * result["tokens"] > 100
    bits = math.log2(tokenizer.num_tokens) * result["tokens"] / result["bytes"]
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert result["perplexity"] == pytest.approx(tokenizer.num_tokens, rel=1e-5)
    assert f"perplexity {result['perplexity']:.2f} per token of {result['tokens']:,}" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["RUN", "--stride", "17"], "stride is 17; expected 1 to 16"),
        (["RUN", "--stride", "0"], "stride is 0; expected a finite number above 0"),
        (["PERCEIVER", "--data", "TEXT", "--stride", "9"], "stride is 9; expected 1 to 8, the 8 latents"),
        (
            ["PERCEIVER", "--data", "TEXT", "--seq-len", "21"],
            "seq_len is 21; expected at most the model's 20",
        ),
        (["PERCEIVER", "--data", "TEXT", "--seq-len", "12"], "expected more than the prefix of 12 tokens"),
        (["PERCEIVER"], "data is not given, and the model is of no run"),
        (["no/where/at/all"], "no/where/at/all"),
        (["auto"], "under runs/"),
        (["RUN", "--data", "missing.txt"], "missing.txt"),
        (["WORDS", "--data", "TEXT"], "a model of 300 tokens with no tokenizer"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    says: str,
    run: Path,
    data: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    PerceiverAR(**SHAPE, max_seq_len=20, cross_attn_seq_len=12).save_pretrained("PERCEIVER")
    PaLM(**{**SHAPE, "num_tokens": 300}).save_pretrained("WORDS")
    places = {"RUN": str(run), "TEXT": data[1]}
    err = told(capsys, *(places.get(each, each) for each in arguments), status=2)
    assert says in err and err.startswith("palm: error: ") and err.count("\n") == 1
    assert not [*tmp_path.rglob("evaluations.jsonl"), *run.rglob("evaluations.jsonl")]


def test_a_text_that_has_changed_since(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run.parent / "text.txt"
    try:
        file.write_bytes(b"another text, " * 2000)
        assert "expected the text that the checkpoint was trained on" in told(capsys, str(run), status=2)
        told(capsys, str(run), "--data", str(file))  # asked for
    finally:
        file.write_bytes(TEXT)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.chmod(0o500)
    assert "could not be written" in told(capsys, str(run), status=2)
    run.chmod(0o700)


def test_ctrl_c_says_what_was_done_and_leaves_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt("64 of 900 tokens were scored, and nothing written")

    monkeypatch.setattr(evaluation, "score", interrupted)
    assert main(["evaluate", str(run), *FLAGS]) == 130
    assert capsys.readouterr().err.endswith(
        "64 of 900 tokens were scored, and nothing written\npalm: stopped\n"
    )
    assert not (run / "evaluations.jsonl").exists()
