"""A Perceiver AR learns to copy across its prefix, from a file of integers to a saved model that writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from palm_pytorch import PerceiverAR
from palm_pytorch.data.arrays import open_array
from palm_pytorch.training.loop import train
from palm_pytorch.training.run import prepare

END, HALF, SEQUENCES = 256, 15, 20_000


def mirrored(path: Path) -> Path:
    """Rows of 15 random bytes, these mirrored, and END: after the token that begins them, sequences as
    "random_mirrored_32" of the authors' code has them, each of them new."""
    half = np.random.default_rng(1).integers(0, END, (SEQUENCES, HALF), dtype=np.uint16)
    end = np.full((SEQUENCES, 1), END, dtype=np.uint16)
    np.save(path, np.concatenate([half, half[:, ::-1], end], axis=1))
    return path


def test_a_mirrored_copy_is_learned_to_the_last_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """16 latents predict the mirrored half and END; held-out halves are copied without a fault."""
    data, length = mirrored(tmp_path / "mirrored.npy"), 2 * HALF + 1
    run = prepare(
        model="perceiver-ar",
        data=str(data),
        num_tokens=END + 1,
        seq_len=length,
        cross_attn_seq_len=HALF,
        **{"dim": 128, "depth": 1, "perceive_depth": 1, "heads": 4, "dim_head": 32, "ff_mult": 4},
        **{"batch_size": 128, "grad_accum": 1, "steps": 260, "lr": 1e-3, "lr_schedule": "constant"},
        **{"warmup_steps": 200, "eval_every": 0, "save_every": 0, "generate_every": 0},
        **{"device": "cpu", "precision": "float32", "out": str(tmp_path / "run")},
    )
    train(run)
    run.close()
    assert "bits per value\n" in capsys.readouterr().out

    sequences = open_array(data, END + 1, seq_len=length).held_out("test").tokens.reshape(-1, 1 + length)
    held_out = torch.from_numpy(sequences.astype(np.int64))[:500]
    model = PerceiverAR.from_pretrained(tmp_path / "run" / "model")
    prompt, copy = held_out.split([1 + HALF, HALF + 1], dim=1)
    assert torch.equal(model.generate(prompt, HALF + 1, temperature=0), copy)
