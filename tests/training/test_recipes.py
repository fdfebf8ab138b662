"""Recipes are defaults: what is given goes before them, and every part of them stands alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from palm_pytorch.training.architecture import build_model
from palm_pytorch.training.config import TrainConfig, model_options
from palm_pytorch.training.evaluate import batch_loss, evaluate
from palm_pytorch.training.loader import Loader
from palm_pytorch.training.logging import read_metrics
from palm_pytorch.training.loop import train
from palm_pytorch.training.recipes import RECIPES
from palm_pytorch.training.run import prepare
from palm_pytorch.training.step import accumulate_gradients


def config(**given: Any) -> TrainConfig:
    return TrainConfig.for_machine(device="cpu", **given)


def test_the_papers_settings() -> None:
    """Literal values of arXiv 2204.02311, section 5."""
    made = config(recipe="palm")
    assert (made.optimizer, made.lr, made.lr_schedule, made.warmup_steps) == ("adafactor", 1e-2, "palm", 0)
    assert (made.weight_decay, made.grad_clip, made.z_loss, made.dropout) == (1.0, 1.0, 1e-4, 0.0)
    assert (made.init_style, made.batch_ramp) == ("palm", "20%:2,45%:4")


def test_what_is_given_goes_before_the_recipe() -> None:
    made = config(recipe="palm", z_loss=0.5, lr=0.2, lr_schedule="cosine", warmup_steps=7, steps=1_000)
    assert (made.z_loss, made.lr, made.lr_schedule, made.warmup_steps) == (0.5, 0.2, "cosine", 7)
    assert made.optimizer == "adafactor"


def test_rate_and_decay_follow_the_optimizer() -> None:
    plain = config()
    assert plain.optimizer == "adamw"
    alone = config(optimizer="adafactor")
    assert (alone.lr, alone.weight_decay, alone.min_lr) == (1e-2, 1.0, 1e-3)
    assert (alone.lr_schedule, alone.z_loss, alone.init_style) == ("cosine", 0.0, "gpt2")
    mixed = config(recipe="palm", optimizer="adamw")
    assert (mixed.lr, mixed.weight_decay, mixed.z_loss) == (plain.lr, plain.weight_decay, 1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_suit_every_model(recipe: str) -> None:
    for model in ("palm", "palm-lite", "lamda", "perceiver-ar"):
        assert config(recipe=recipe, model=model).model == model


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"recipe": "gopher"}, "recipe is 'gopher'; expected one of default, palm"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; expected one of adamw, adafactor"),
        ({"prefix_truncation": 0.5}, "prefix_truncation is 0.5 and model 'palm'; only perceiver-ar"),
        ({"z_loss": -1e-4}, "z_loss is -0.0001; expected a finite number, 0 or more"),
    ],
)
def test_bad_options_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as error:
        config(**given)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "palm", "model": "palm", "batch_ramp": "1:2,40%:3"},
        {"recipe": "palm", "model": "perceiver-ar", "prefix_truncation": 0.5, "cross_attn_dropout": 0.3},
    ],
    ids=["palm", "perceiver-ar"],
)
def test_a_stop_and_a_resume_change_nothing(options: dict[str, Any], tiny: dict[str, Any]) -> None:
    """Weights, the optimizer's state and the tokens read, bit for bit, in the middle of the batch ramp."""
    options = {**tiny, **options, "generate_every": 0}
    out = tiny["out"]
    straight = outcome_of({**options, "out": f"{out}-straight"})
    outcome_of({**options, "steps": 3, "schedule_steps": 6})
    resumed = outcome_of({"resume": out, "steps": 6})
    assert resumed[0] == straight[0]
    assert all(torch.equal(a, b) for a, b in zip(resumed[1], straight[1], strict=True))
    if "batch_ramp" in options:
        assert resumed[0][-1][0] == 4 * 16 * (1 + 2 + 2 + 3 + 3 + 3)


def outcome_of(options: dict[str, Any]) -> tuple[list[tuple[int, float]], list[torch.Tensor]]:
    """Of a run: tokens and loss of its metrics' rows; its weights and all that its optimizer keeps."""
    run = prepare(**options)
    train(run)
    rows = [(row["tokens"], row["loss"]) for row in read_metrics(run.metrics_file) if "loss" in row]
    weights = list(run.state.model.parameters())
    kept = [value for weight in weights for value in run.state.optimizer.state[weight].values()]
    tensors = [tensor.detach().clone() for tensor in (*weights, *kept)]
    run.close()
    return rows, tensors


def test_z_loss_is_for_training_alone(tiny: dict[str, Any]) -> None:
    run = prepare(**tiny, z_loss=0.1)
    with Loader(run.data, run.config, run.parallel) as loader:
        loader.seek(run.state)
        batches = loader.read()
    (batch,), model = batches, run.state.model
    with torch.no_grad():
        log_z = model(batch.tokens).logsumexp(dim=-1)
        plain = batch_loss(model, batch, torch.float32).item()
    expected = plain + 0.1 * log_z.square().mean().item()
    assert accumulate_gradients(run, batches) == pytest.approx(expected, rel=1e-6)
    assert evaluate(model, batches) == pytest.approx(plain, rel=1e-6)
    run.close()


def test_the_init_style_reaches_the_model() -> None:
    shape = {"dim": 36, "depth": 1, "heads": 2, "dim_head": 8, "seq_len": 16}
    for model in ("palm", "palm-lite", "lamda", "perceiver-ar"):
        built = build_model(config(model=model, init_style="palm", **shape)).config
        assert (built["embedding_std"], built["logit_scale"]) == (1.0, 1 / 6)
        built = build_model(config(model=model, **shape)).config
        assert (built["embedding_std"], built["logit_scale"]) == (0.02, 1.0)
    assert "init_style" in model_options("palm")


def test_a_run_goes_on_with_its_own_optimizer(tiny: dict[str, Any]) -> None:
    """Whose state has the same names as the other's, and another meaning."""
    run = prepare(**{**tiny, "steps": 2, "generate_every": 0})
    train(run)
    run.close()
    with pytest.raises(ValueError, match="optimizer is 'adafactor', in the checkpoint 'adamw'"):
        prepare(resume=tiny["out"], steps=3, optimizer="adafactor")
