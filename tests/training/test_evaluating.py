"""`palm evaluate`: every byte of a split is scored, on whatever has weights, and the result is kept."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palm_pytorch import LaMDA, PaLM, PerceiverAR
from palm_pytorch.cli import main
from palm_pytorch.data.tokenizer import IntegerTokenizer
from palm_pytorch.training import evaluating
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.loop import train
from palm_pytorch.training.run import prepare, read_data
from palm_pytorch.training.trained import load_run

SHAPE: dict[str, Any] = {"num_tokens": 256, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "ff_mult": 2}
FLAGS = ["--device", "cpu", "--precision", "float32", "--batch-size", "64"]


TEXT = b"the quick brown fox jumps over the lazy dog; " * 400


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and a run of two steps on it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_bytes(TEXT)
    train_on(folder / "text.txt", test_windows=5)
    return folder


def train_on(file: Path, **options: Any) -> Path:
    """The folder of a run of two steps on a file, beside it."""
    folder = file.parent / "run"
    places = {"data": str(file), "data_dir": str(file.parent), "out": str(folder)}
    shape = {name: size for name, size in SHAPE.items() if name != "num_tokens"}
    sizes = {**shape, "seq_len": 16, "batch_size": 4, "steps": 2, "generate_every": 0, "eval_windows": 5}
    machine = {"device": "cpu", "precision": "float32", "peak_flops": 1e12}
    started = prepare(**{**places, **sizes, **machine, **options})
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


def load_dataset(run: Path, **other: Any) -> Any:
    """The data of a run, with other options."""
    return read_data(TrainConfig.for_machine(**{**json.loads((run / "config.json").read_text()), **other}))


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


@pytest.mark.parametrize("model", ["palm", "perceiver-ar"])
def test_whole_sequences_as_training_scores_them(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once they were slid over as one text, whose rows a Perceiver AR saw at places that it did not know."""
    file = tmp_path / "rows.npy"
    first, step = np.random.default_rng(0).integers(1, 31, size=(2, 300, 1))
    np.save(file, (first + step * np.arange(12)) % 31)
    more = {"cross_attn_seq_len": 4} if model == "perceiver-ar" else {}
    run = train_on(file, model=model, num_tokens=31, seq_len=12, steps=40, lr=1e-2, **more)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (expected,) = (row for row in metrics if row["split"] == "test")
    sequences = len(load_dataset(run).splits["test"])
    scored = sequences * (12 - (4 if more else 0))

    for source, given in ((run, []), (run / "model", ["--data", str(file)])):
        out = told(capsys, str(source), *given)
        (result,) = results(source)
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert result["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
        assert (result["tokens"], result["bytes"]) == (scored, scored)
        assert (result["seq_len"], result["stride"]) == (12, None)
        assert f"bits per value of {scored:,}, perplexity" in out
        assert (
            f"windows {sequences} of 12 tokens, a whole sequence each: {1.5 if more else 1.0} tokens" in out
        )

        for flags, says in (
            (["--stride", "4"], "stride is 4; expected none for sequences, which are read whole"),
            (["--seq-len", "11"], "seq_len is 11; expected 12, the length of the sequences in"),
        ):
            assert says in told(capsys, str(source), *given, *flags, status=2)
        assert len(results(source)) == 1

    np.save(tmp_path / "longer.npy", np.random.default_rng(1).integers(31, size=(300, 14)))
    longer = ["--data", str(tmp_path / "longer.npy")]
    if model == "palm":
        assert " of 14 tokens, a whole sequence each" in told(capsys, str(run), *longer)
    else:
        assert "seq_len is 14; expected 5 to 12" in told(capsys, str(run), *longer, status=2)


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_streams_of_integers(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, values = tmp_path / f"notes{suffix}", np.random.default_rng(0).integers(300, size=2000)
    if suffix == ".npy":
        np.save(file, values)
    else:
        values.astype(np.uint16).tofile(file)
    dtype = "uint16" if suffix == ".bin" else None
    run = train_on(file, num_tokens=300, data_dtype=dtype)
    told(capsys, str(run))
    given = ["--data", str(file), *(["--data-dtype", dtype] if dtype else [])]
    told(capsys, str(run), *given)
    out = told(capsys, str(run / "model"), *given, "--seq-len", "16")
    scores = [*results(run), *results(run / "model")]
    assert "bits per value of 99" in out and {each["stride"] for each in scores} == {8}
    assert len({each["bits_per_byte"] for each in scores}) == 1 and len(scores) == 3
    if dtype:
        assert "expected data_dtype beside it" in told(capsys, str(run / "model"), *given[:2], status=2)


def test_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a saved model they were once cut to two tokens each."""
    file, draw = tmp_path / "chats.jsonl", random.Random(0)
    with open(file, "w", encoding="utf-8") as lines:
        for _ in range(200):
            words = ["".join(draw.choices("etaoin", k=draw.randint(2, 20))) for _ in range(4)]
            roles = ("user", "assistant", "user", "assistant")
            turns = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
            lines.write(json.dumps({"messages": turns}) + "\n")
    run = train_on(file, seq_len=48)
    for seq_len in ("48", "128"):
        for source in (run, run / "model"):
            out = told(capsys, str(source), "--data", str(file), "--seq-len", seq_len)
            assert ("cut to their latest turns" in out) == (seq_len == "48")
    told(capsys, str(run))
    short, long, _ = results(run)
    scores = [[each["bits_per_byte"], each["tokens"]] for each in results(run)]
    assert scores[:2] == [[each["bits_per_byte"], each["tokens"]] for each in results(run / "model")]
    assert scores[0] == scores[2]
    responses = load_dataset(run, seq_len=128).held_out("test")
    assert short["bytes"] < long["bytes"] == responses.num_bytes and long["tokens"] == responses.num_labels


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
            "seq_len is 21; expected 13 to 20: more than the model's prefix, at most its max_seq_len",
        ),
        (["PERCEIVER", "--data", "TEXT", "--seq-len", "12"], "seq_len is 12; expected 13 to 20"),
        (["PERCEIVER"], "data is not given, and the model is of no run"),
        (["no/where/at/all"], "no/where/at/all"),
        (["auto"], "under runs/"),
        (["RUN", "--data", "missing.txt"], "missing.txt"),
        (["WORDS", "--data", "TEXT"], "a model of 300 tokens with no tokenizer"),
        (["RUN", "--data", "some.npy"], "data is some.npy; expected text: the model's tokens are bytes"),
        (["NOTES", "--data", "TEXT"], "expected integers, in a .npy or .bin file: the model's tokens are "),
        (["NOTES", "--data", "some.npy"], "'some.npy' does not exist"),
        (["begun"], "neither a complete checkpoint of a run nor a saved model there"),
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
    PaLM(**{**SHAPE, "num_tokens": 31}).save_pretrained("NOTES", tokenizer=IntegerTokenizer(30))
    Path("begun").mkdir()  # a run, before its first checkpoint
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(run / name, "begun")
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

    monkeypatch.setattr(evaluating, "score", interrupted)
    assert main(["evaluate", str(run), *FLAGS]) == 130
    assert capsys.readouterr().err.endswith(
        "64 of 900 tokens were scored, and nothing written\npalm: stopped\n"
    )
    assert not (run / "evaluations.jsonl").exists()
