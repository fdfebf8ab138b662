"""A Perceiver AR learns to copy across its prefix: model, loss, schedule, optimizer and cached generation."""

from __future__ import annotations

import torch
from torch import Tensor

from palm_pytorch import PerceiverAR
from palm_pytorch.training.config import TrainConfig
from palm_pytorch.training.optim import build_optimizer, set_learning_rate
from palm_pytorch.training.schedule import learning_rate

START, END = 256, 257
STEPS = 180


def mirrored(rows: int, generator: torch.Generator) -> Tensor:
    """(rows, 32): START, 15 tokens, these mirrored, END, as "random_mirrored_32" of the authors' code is."""
    half = torch.randint(256, (rows, 15), generator=generator)
    start, end = torch.full((rows, 1), START), torch.full((rows, 1), END)
    return torch.cat([start, half, half.flip(1), end], dim=1)


def test_a_mirrored_copy_is_learned_to_the_last_token() -> None:
    """16 latents predict the mirrored half and END; new halves, 256^15 of them, are written without a fault.

    Learning rate 1e-3 after 200 steps of warm-up, as the authors' kind of schedule has it.
    """
    config = TrainConfig.for_machine(
        device="cpu", lr=1e-3, warmup_steps=200, lr_schedule="constant", steps=400
    )
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    model = PerceiverAR(
        num_tokens=258, dim=128, depth=1, heads=4, dim_head=32, max_seq_len=32, cross_attn_seq_len=15
    )
    optimizer = build_optimizer(model, config)
    for step in range(STEPS):
        tokens = mirrored(128, generator)
        model(tokens[:, :-1], labels=tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        set_learning_rate(optimizer, learning_rate(step, config))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    held_out = mirrored(200, generator)
    assert torch.equal(model.generate(held_out[:, :16], 16, temperature=0), held_out[:, 16:])
