"""A tokenizer goes with its run and its model, and no other takes its place."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from palm_pytorch import from_pretrained
from palm_pytorch.checkpoints import find_tokenizer
from palm_pytorch.cli import main
from palm_pytorch.data.tokenizer import Tokenizer, load_tokenizer, stored_tokenizer
from palm_pytorch.training.checkpoint import complete_checkpoints
from palm_pytorch.training.loop import train
from palm_pytorch.training.manifest import write_manifest
from palm_pytorch.training.run import prepare
from palm_pytorch.training.trained import ModelOptions, load_any, load_trained

DRAW = random.Random(0)
WORDS = ["".join(DRAW.choices("etaoins", k=DRAW.randint(2, 6))) for n in range(99)]
TEXT = " ".join(DRAW.choices(WORDS, k=4000))


def load(checkpoint: str | Path) -> Any:
    return load_trained(ModelOptions(checkpoint=str(checkpoint), device="cpu", precision="float32"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two tokenizers of as many tokens, made by `palm tokenizer train`."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(TEXT)
    for kind in ("bpe", "unigram"):
        flags = ["--kind", kind, "--vocab-size", "310", "--out", str(folder / f"{kind}.model")]
        flags += ["--data-dir", str(folder)]
        assert main(["tokenizer", "train", str(folder / "text.txt"), *flags]) == 0
    return [str(folder / "bpe.model"), str(folder / "unigram.model")]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, files: list[str]) -> dict[str, Any]:
    """A run of four steps with the first of them."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT)
    options = {
        **{"data": str(folder / "text.txt"), "data_dir": str(folder / "data"), "out": str(folder / "run")},
        **{"dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "ff_mult": 2, "seq_len": 16, "batch_size": 4},
        **{"steps": 4, "generate_every": 4, "generate_length": 3, "device": "cpu", "precision": "float32"},
        "tokenizer": files[0],
    }
    run = prepare(**options)
    train(run)
    run.close()
    return options


def test_a_run_and_its_model_have_the_tokenizer(options: dict[str, Any], files: list[str]) -> None:
    run, expected = Path(options["out"]), load_tokenizer(files[0])
    for checkpoint in (run, run / "model"):
        trained = load(checkpoint)
        assert trained.tokenizer.fingerprint == expected.fingerprint
        assert trained.model.config["num_tokens"] == 310
    sample = (run / "samples" / "step-00000004.txt").read_text()
    assert WORDS[0] in TEXT and any(word in sample for word in WORDS)


def test_generate_writes_its_words(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt", f"{WORDS[3]} {WORDS[4]}", "--max-new-tokens", "5", "--device", "cpu"]
    for checkpoint in (options["out"], f"{options['out']}/model"):
        assert main(["generate", "--checkpoint", checkpoint, *flags]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"{WORDS[3]} {WORDS[4]}") and err.split()[0] in "12345"


def test_bits_per_byte_are_of_the_text(options: dict[str, Any]) -> None:
    """Nats of all labels, over the bytes that the held-out text has, but for its first token's."""
    metrics = [json.loads(line) for line in Path(options["out"], "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in metrics if row.get("split") == "test")
    run = prepare(**{**options, "out": options["out"] + "-2"})
    held_out, tokenizer = run.data.held_out("test"), run.data.tokenizer
    run.close()
    text = tokenizer.decode(held_out.tokens)
    assert text in TEXT and len(text) > 500
    assert held_out.num_bytes == len(text) - len(tokenizer.decode(held_out.tokens[:1]))
    assert len(held_out.tokens) < 0.8 * len(text)
    per_byte = row["loss"] * held_out.num_labels / held_out.num_bytes / math.log(2)
    assert row["bits_per_byte"] == pytest.approx(per_byte, rel=1e-6)


def rewrite_about(folder: Path, **changes: dict[str, Any]) -> None:
    """Have a checkpoint say something else, of which its manifest knows."""
    about = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(
        json.dumps({name: about[name] | changes.get(name, {}) for name in about})
    )
    (folder / "manifest.json").unlink()
    write_manifest(folder, {"step": about["state"]["step"]})


def test_a_run_of_another_device_is_read_on_this_one(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(options["out"], tmp_path / "run")
    rewrite_about(complete_checkpoints(run)[-1], config={"device": "cuda:99"})
    assert load(run).device.type == "cpu"
    assert main(["evaluate", str(run), "--device", "cpu", "--stride", "16"]) == 0
    assert main(["convert", str(run), str(tmp_path / "converted")]) == 0


def test_the_best_is_the_newest_where_it_is_missing_or_damaged(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """As where it could not be written, and where the checkpoint that knew of a better one is damaged."""
    run = shutil.copytree(options["out"], tmp_path / "run")
    (newest,) = complete_checkpoints(run)
    rewrite_about(newest, state={"best_step": 2})
    best = run / "checkpoints" / "step-00000002"
    for says in (rf"{best}/manifest\.json is missing", rf"{best}/state\.json is damaged"):
        with pytest.warns(UserWarning, match=rf"{says}.*; using .*step-00000004 instead"):
            assert load(run / "best").step == 4
        if not best.exists():
            shutil.copytree(newest, best)
            assert load(run / "best").step == 2
            (best / "state.json").write_text("{}")


def test_a_run_before_its_first_checkpoint_is_a_run(options: dict[str, Any], tmp_path: Path) -> None:
    """And no damaged folder of `save_pretrained`, for which its `config.json` was once taken."""
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(Path(options["out"], name), tmp_path)
    for source in (tmp_path, tmp_path / "best"):
        with pytest.raises(FileNotFoundError, match="there is neither a complete checkpoint of a run nor"):
            load_any(str(source))


def swapped(folder: Path, file: str) -> Tokenizer:
    other = load_tokenizer(file)
    other.save(folder)
    return other


def test_another_tokenizer_is_refused(options: dict[str, Any], files: list[str], tmp_path: Path) -> None:
    run, own = Path(options["out"]), load_tokenizer(files[0])
    with pytest.raises(ValueError, match=r"tokenizer .*; expected the tokenizer that the checkpoint was"):
        prepare(resume=str(run), steps=5, tokenizer=files[1])
    with pytest.raises(ValueError, match=r"init is .*, whose tokenizer is SentencePiece"):
        prepare(
            **{**options, "out": str(tmp_path / "new"), "tokenizer": files[1], "init": str(run / "model")}
        )
    for folder in (run, run / "model"):
        swapped(folder, files[1])
        with pytest.raises(
            ValueError, match=rf"tokenizer is .*; the .* in .* has another \({own.fingerprint[:12]}"
        ):
            load(folder)
        own.save(folder)
    (run / "model" / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer is bytes; the model in .* has another"):
        find_tokenizer(run / "model")
    own.save(run / "model")
    assert load(run / "model").tokenizer.fingerprint == own.fingerprint


def test_what_goes_on_has_the_tokenizer_without_being_told(
    options: dict[str, Any], files: list[str], tmp_path: Path
) -> None:
    """Resumed without its file, which may be on another machine; or begun from a model's folder."""
    own = load_tokenizer(files[0])
    moved = Path(files[0]).rename(tmp_path / "moved.model")
    try:
        resumed = prepare(resume=options["out"], steps=5, out=str(tmp_path / "branch"))
        assert resumed.data.tokenizer.fingerprint == own.fingerprint
        resumed.close()
        stored = stored_tokenizer(tmp_path / "branch")
        assert stored is not None and stored.fingerprint == own.fingerprint
        tuned = {name: options[name] for name in ("data", "data_dir", "device", "precision")}
        new = prepare(**tuned, out=str(tmp_path / "new"), init=f"{options['out']}/model", seq_len=16)
        assert new.data.tokenizer.fingerprint == own.fingerprint
        new.close()
    finally:
        moved.rename(files[0])


def test_a_model_saved_without_its_tokenizer_keeps_that_of_the_folder(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = from_pretrained(Path(options["out"]) / "model")
    model.save_pretrained(tmp_path / "a")
    assert find_tokenizer(tmp_path / "a") is None
    own = load(options["out"]).tokenizer
    model.save_pretrained(tmp_path / "a", tokenizer=own)
    model.save_pretrained(tmp_path / "a")
    found = find_tokenizer(tmp_path / "a")
    assert found is not None and found.fingerprint == own.fingerprint
