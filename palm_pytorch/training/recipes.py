"""Recipes: options that belong together, as defaults. What is given on the command line goes before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The rate and the decay go with the optimizer, whatever else is chosen; AdamW's are the options' defaults.
OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "adamw": {},
    "adafactor": {"lr": 1e-2, "weight_decay": 1.0},
}

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # What scored best in the time that a first run takes: benchmarks/recipes.py. It is what the options say.
    "default": {},
    # Chowdhery et al. 2022, arXiv 2204.02311, section 5. The batch grew from 512 sequences to 1,024 at step
    # 50,000 and to 2,048 at 115,000 of 255,000.
    "palm": {
        "optimizer": "adafactor",
        "lr_schedule": "palm",
        "warmup_steps": 0,
        "grad_clip": 1.0,
        "z_loss": 1e-4,
        "init_style": "palm",
        "batch_ramp": "20%:2,45%:4",
        "dropout": 0.0,
    },
}


def recipe_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe and the optimizer of the `given` options are to set, where these do not."""
    recipe = RECIPES[given.get("recipe", "default")]
    optimizer = {**recipe, **given}.get("optimizer", "adamw")
    return {**OPTIMIZERS[optimizer], **recipe}
