"""Scores are means over all tokens, whatever the batches, and leave the model as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from palm_pytorch import PerceiverAR
from palm_pytorch.data.windows import batches
from palm_pytorch.training.evaluate import bits_per_byte, evaluate, window_loss


class Bigram(nn.Module):
    """Logits of the next byte from the last one; stands for any model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 256)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = self.dropout(self.table(tokens))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(256, (7, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_the_score_is_the_mean_over_all_tokens(batch_size: int, windows: Tensor) -> None:
    model = Bigram()
    log_probabilities = model.table.weight.detach().double().log_softmax(-1)
    expected = -log_probabilities[windows[:, :-1], windows[:, 1:]].mean().item()
    score = evaluate(model, batches(windows.to(torch.uint8).numpy(), batch_size))
    assert score == pytest.approx(expected, rel=1e-6)


def test_knowing_nothing_is_eight_bits_per_byte(windows: Tensor) -> None:
    model = Bigram()
    nn.init.zeros_(model.table.weight)
    assert bits_per_byte(evaluate(model, [windows])) == pytest.approx(8, abs=1e-6)
    assert bits_per_byte(math.log(2)) == 1


@pytest.mark.parametrize("training", [True, False])
def test_mode_gradients_and_random_streams_are_left_alone(training: bool, windows: Tensor) -> None:
    model = Bigram().train(training)
    before = torch.get_rng_state()
    evaluate(model, [windows])
    assert model.training == model.dropout.training == training
    assert model.table.weight.grad is None
    assert torch.equal(torch.get_rng_state(), before)


def test_the_mode_is_restored_after_an_error(windows: Tensor) -> None:
    model = Bigram()
    with pytest.raises(IndexError):
        evaluate(model, [windows + 300])
    assert model.training


def test_nothing_to_evaluate_on() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        evaluate(Bigram(), [])


def test_perceiver_ar_is_scored_on_its_latents(windows: Tensor) -> None:
    model = PerceiverAR(
        num_tokens=256, dim=16, depth=1, heads=2, dim_head=8, max_seq_len=11, cross_attn_seq_len=4
    )
    model.eval()
    logits = model(windows[:, :-1]).detach().double()
    expected = -logits.log_softmax(-1).gather(-1, windows[:, 5:, None]).mean().item()
    assert evaluate(model, [windows[:3], windows[3:]]) == pytest.approx(expected, rel=1e-5)


def test_bfloat16_is_for_products_and_leaves_weights_float32(windows: Tensor) -> None:
    seen = []

    class Probe(Bigram):
        def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
            seen.append(nn.functional.linear(self.table(tokens), self.table.weight).dtype)
            return super().forward(tokens, labels)

    model = Probe()
    window_loss(model, windows, torch.bfloat16).backward()
    window_loss(model, windows, torch.float32)
    assert seen == [torch.bfloat16, torch.float32]
    assert model.table.weight.grad is not None and model.table.weight.grad.dtype == torch.float32
