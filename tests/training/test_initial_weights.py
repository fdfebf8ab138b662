"""A run starts from weights of any kind as they are, and from no others than it was asked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from definitions import error
from safetensors import safe_open
from torch import Tensor

from palm_pytorch import LaMDA, PaLM, PerceiverAR, from_pretrained
from palm_pytorch.checkpoints import find_tokenizer
from palm_pytorch.cli import main
from palm_pytorch.training import loop
from palm_pytorch.training.loop import train
from palm_pytorch.training.run import prepare
from palm_pytorch.training.trained import load_any

SHAPE: dict[str, Any] = {"num_tokens": 256, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "ff_mult": 2}
# What perceiver-ar-pytorch computed, see `tests/checkpoints/goldens.py`.
GOLDEN = Path(__file__).parents[1] / "checkpoints" / "golden" / "perceiver_ar.safetensors"
NOT_GIVEN = ("dim", "depth", "heads", "dim_head", "ff_mult", "seq_len")


@pytest.fixture
def free(tiny: dict[str, Any]) -> dict[str, Any]:
    """Options of a tiny run that do not ask for a model."""
    return {name: value for name, value in tiny.items() if name not in NOT_GIVEN} | {"generate_every": 0}


def start(**options: Any) -> tuple[dict[str, Tensor], int]:
    """The weights that a run starts with, and its step."""
    run = prepare(**options)
    weights = {name: tensor.clone() for name, tensor in run.state.model.state_dict().items()}
    step = run.state.step
    run.close()
    return weights, step


def test_from_a_saved_model_that_has_more_than_the_options_name(free: dict[str, Any], tmp_path: Path) -> None:
    model = PaLM(**SHAPE, norm="layernorm", qk_norm=True, tie_embeddings=False)
    model.save_pretrained(tmp_path / "saved")
    options = {**free, "seq_len": 16, "init": str(tmp_path / "saved")}
    options["architecture"] = "tie_embeddings=false,qk_norm=true,norm=layernorm"
    weights, step = start(**options)
    torch.testing.assert_close(weights, dict(model.state_dict()), rtol=0, atol=0)
    assert step == 0

    options["out"] += "-2"
    run = prepare(**options)
    train(run)
    run.close()
    saved = from_pretrained(Path(options["out"]) / "model")  # which knows what it is
    assert saved.config == {**model.config, "embedding_std": saved.config["embedding_std"]}
    _, step = start(resume=options["out"], steps=9)  # and so does the run, without the folder
    assert step == 6


def test_from_half_precision(free: dict[str, Any], tmp_path: Path) -> None:
    model = LaMDA(**SHAPE).bfloat16()
    model.save_pretrained(tmp_path / "saved")
    weights, _ = start(**free, seq_len=16, model="lamda", init=str(tmp_path / "saved"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    torch.testing.assert_close(weights, dict(model.float().state_dict()), rtol=0, atol=0)


def test_a_perceiver_ar_has_its_lengths_from_the_weights(free: dict[str, Any], tmp_path: Path) -> None:
    model = PerceiverAR(**SHAPE, max_seq_len=18, cross_attn_seq_len=7)
    model.save_pretrained(tmp_path / "saved")
    run = prepare(**free, init=str(tmp_path / "saved"))
    assert (run.config.model, run.config.seq_len, run.config.cross_attn_seq_len) == ("perceiver-ar", 18, 7)
    run.close()
    with pytest.raises(ValueError, match="seq_len is 32, in the weights 18"):
        prepare(**{**free, "out": free["out"] + "-2"}, seq_len=32, init=str(tmp_path / "saved"))


def test_from_a_run_its_best_or_one_of_its_checkpoints(
    tiny: dict[str, Any], free: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "score", lambda run, *_: (float(run.state.step), 1.0))  # ever worse
    run = prepare(**{**tiny, "eval_every": 3, "generate_every": 0})
    train(run)
    run.close()
    expected = {"": 6, "best": 3, "checkpoints/step-00000004": 4}
    for name, step in expected.items():
        source = str(Path(tiny["out"]) / name)
        trained = load_any(source)
        weights, started_at = start(**{**free, "seq_len": 16, "out": f"{free['out']}-{step}"}, init=source)
        assert (trained.step, started_at) == (step, 0)
        torch.testing.assert_close(weights, dict(trained.model.state_dict()), rtol=0, atol=0)


def test_from_a_file_of_an_older_project(free: dict[str, Any], tmp_path: Path) -> None:
    """Of perceiver-ar-pytorch, whose tensors do not tell all."""
    with safe_open(GOLDEN, framework="pt") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    state = {
        name.removeprefix("state:"): t.float() for name, t in golden.items() if name.startswith("state:")
    }
    torch.save(state, tmp_path / "older.pt")
    np.save(tmp_path / "values.npy", (np.arange(40_000) % 28).astype(np.uint8))
    data = {"data": str(tmp_path / "values.npy"), "num_tokens": 28}  # and a token that ends a sequence
    told = {"cross_attn_seq_len": 25, "dim_head": 36, "heads": 3}
    run = prepare(**{**free, **data}, **told, init=str(tmp_path / "older.pt"))
    logits = run.state.model.eval()(golden["tokens"].long(), prefix_mask=golden.get("prefix_mask"))
    assert error(logits, golden["logits"]) <= 1e-5
    run.close()
    with pytest.raises(ValueError, match="dim_head: expected it to be given"):
        prepare(**{**free, **data, "out": free["out"] + "-2"}, init=str(tmp_path / "older.pt"))


def test_init_and_resume_together_begin_once(free: dict[str, Any], tmp_path: Path) -> None:
    """As a job that a scheduler may start again is given both."""
    PaLM(**SHAPE).save_pretrained(tmp_path / "saved")
    given = {**free, "seq_len": 16, "init": str(tmp_path / "saved"), "resume": "auto"}
    run = prepare(**given)
    assert torch.equal(
        run.state.model.token_emb.weight, PaLM.from_pretrained(tmp_path / "saved").token_emb.weight
    )
    run.state.step = 1
    torch.nn.init.ones_(run.state.model.token_emb.weight)
    run.saver.save(run.state)
    assert run.saver.wait() is None
    run.close()
    again = prepare(**given)
    assert again.state.step == 1 and (again.state.model.token_emb.weight == 1).all()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dim": 32, "heads": 4}, "dim is 32, in the weights 16; heads is 4, in the weights 2"),
        ({"model": "lamda"}, "model is 'lamda', in the weights 'palm'"),
        ({"architecture": "qk_norm=true"}, "architecture is 'qk_norm=true', in the weights None"),
        ({"resume": "a"}, "init is 'SAVED' and resume 'a'; expected one of them, or resume 'auto' and out"),
        ({"init": "nowhere/at/all"}, "nowhere/at/all"),
        (
            {"init": "WORDS"},
            "init is WORDS, a model of 300 tokens; expected as many of the data, which have 256",
        ),
    ],
)
def test_what_is_refused_leaves_no_folder(
    given: dict[str, Any], says: str, free: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    PaLM(**SHAPE).save_pretrained("SAVED")
    PaLM(**{**SHAPE, "num_tokens": 300}).save_pretrained("WORDS")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        prepare(**{**free, "seq_len": 16, "init": "SAVED", **given})
    assert says in str(error.value)
    assert not Path(free["out"]).exists()


def test_another_tokenizer_is_refused_by_name(free: dict[str, Any], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from palm_pytorch.data.tokenizer import load_tokenizer

    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(["the quick brown fox"], trainer)
    made.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(tmp_path / "words.json")
    model = PaLM(**{**SHAPE, "num_tokens": tokenizer.num_tokens})
    model.save_pretrained(tmp_path / "saved", tokenizer=tokenizer)
    with pytest.raises(
        ValueError, match=r"init is .*saved, whose tokenizer is .*; expected .* which is bytes"
    ):
        prepare(**free, seq_len=16, init=str(tmp_path / "saved"), tokenizer="bytes")


def test_convert_takes_a_run(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare(**{**tiny, "steps": 2, "generate_every": 0})
    train(run)
    run.close()
    folder = tmp_path / "converted"
    assert main(["convert", tiny["out"], str(folder), "--dtype", "bfloat16"]) == 0
    expected = load_any(tiny["out"], dtype=torch.bfloat16).model
    converted = from_pretrained(folder)
    torch.testing.assert_close(dict(converted.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    tokenizer = find_tokenizer(folder)
    assert tokenizer is not None and tokenizer.fingerprint == "bytes"
    capsys.readouterr()
    assert main(["convert", tiny["out"], str(tmp_path / "other"), "--heads", "3"]) == 2
    assert "heads cannot be given for" in capsys.readouterr().err
