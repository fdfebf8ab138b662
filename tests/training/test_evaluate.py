"""Scores are means over all tokens, whatever the batches, and leave the model as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from palm_pytorch import PaLM, PerceiverAR
from palm_pytorch.data.batch import Batch
from palm_pytorch.training.evaluate import batch_loss, bits_per_byte, evaluate


class Bigram(nn.Module):
    """Logits of the next byte from the last one; stands for any model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 256)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = self.dropout(self.table(tokens))
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / (labels != -100).sum().clamp(min=1)


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(256, (7, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_the_score_is_the_mean_over_all_tokens(batch_size: int, windows: Tensor) -> None:
    model = Bigram()
    log_probabilities = model.table.weight.detach().double().log_softmax(-1)
    expected = -log_probabilities[windows[:, :-1], windows[:, 1:]].mean().item()
    score = evaluate(model, [Batch.of_windows(part) for part in windows.split(batch_size)])
    assert score == pytest.approx(expected, rel=1e-6)


def test_knowing_nothing_is_eight_bits_per_byte(windows: Tensor) -> None:
    model = Bigram()
    nn.init.zeros_(model.table.weight)
    assert bits_per_byte(evaluate(model, [Batch.of_windows(windows)])) == pytest.approx(8, abs=1e-6)
    assert bits_per_byte(math.log(2)) == 1


@pytest.mark.parametrize("training", [True, False])
def test_mode_gradients_and_random_streams_are_left_alone(training: bool, windows: Tensor) -> None:
    model = Bigram().train(training)
    before = torch.get_rng_state()
    evaluate(model, [Batch.of_windows(windows)])
    assert model.training == model.dropout.training == training
    assert model.table.weight.grad is None
    assert torch.equal(torch.get_rng_state(), before)


def test_the_mode_is_restored_after_an_error(windows: Tensor) -> None:
    model = Bigram()
    with pytest.raises(IndexError):
        evaluate(model, [Batch.of_windows(windows + 300)])
    assert model.training


def test_no_document_sees_another(windows: Tensor) -> None:
    """The loss of two documents in a row is that of both by themselves, their rotations with them."""
    model = PaLM(num_tokens=256, dim=16, depth=2, heads=2, dim_head=16).eval()
    batch = Batch.of_windows(windows)
    ids = (torch.arange(11) >= 4).long().expand(7, -1)
    apart = [Batch(batch.tokens[:, part], batch.labels[:, part]) for part in (slice(0, 4), slice(4, 11))]
    together = batch_loss(model, batch._replace(document_ids=ids), torch.float32).item()
    assert together == pytest.approx(evaluate(model, apart), rel=1e-5)
    assert together != pytest.approx(batch_loss(model, batch, torch.float32).item(), rel=1e-5)


def test_labels_that_do_not_count_weigh_nothing(windows: Tensor) -> None:
    """Rows may have any number of labels; the mean is over labels, not over rows or batches."""
    model = Bigram()
    batch = Batch.of_windows(windows)
    labels = batch.labels.clone()
    labels[0, 2:] = labels[3] = labels[6, ::3] = -100
    losses = -model.table.weight.detach().double().log_softmax(-1)[batch.tokens, labels.clamp(min=0)]
    expected = losses[labels != -100].mean().item()
    for size in (1, 2, 7):
        parts = zip(batch.tokens.split(size), labels.split(size), strict=True)
        assert evaluate(model, [Batch(*part) for part in parts]) == pytest.approx(expected, rel=1e-6)


def test_processes_share_the_sum(windows: Tensor) -> None:
    """Each scores its own rows, one of them none at all, and all get the mean over every label."""
    model, batch = Bigram(), Batch.of_windows(windows)
    shares = [[batch], [Batch(batch.tokens[:2, :5], batch.labels[:2, :5])], []]

    class Recorder:
        def __init__(self) -> None:
            self.given: list[float] = []

        def sum(self, values: Sequence[float]) -> list[float]:
            self.given = [*values]
            return [1.0, 1.0]

    recorders = [Recorder() for _ in shares]
    for share, recorder in zip(shares, recorders, strict=True):
        assert evaluate(model, share, parallel=recorder) == 1.0
    total, counted = (sum(column) for column in zip(*(r.given for r in recorders), strict=True))
    rows = [model.table.weight.detach().double().log_softmax(-1)[part.tokens] for part, *_ in shares[:2]]
    expected = [-r.gather(-1, p.labels[..., None]).sum() for r, (p, *_) in zip(rows, shares, strict=False)]
    assert counted == 77 + 10 and total == pytest.approx(sum(expected).item(), rel=1e-6)


def test_nothing_to_evaluate_on() -> None:
    with pytest.raises(ValueError, match="batches have no label that counts"):
        evaluate(Bigram(), [])


def test_perceiver_ar_is_scored_on_its_latents(windows: Tensor) -> None:
    model = PerceiverAR(
        num_tokens=256, dim=16, depth=1, heads=2, dim_head=8, max_seq_len=11, cross_attn_seq_len=4
    )
    model.eval()
    logits = model(windows[:, :-1]).detach().double()
    expected = -logits.log_softmax(-1).gather(-1, windows[:, 5:, None]).mean().item()
    parts = [Batch.of_windows(windows[:3]), Batch.of_windows(windows[3:])]
    assert evaluate(model, parts) == pytest.approx(expected, rel=1e-5)


def test_bfloat16_is_for_products_and_leaves_weights_float32(windows: Tensor) -> None:
    seen = []

    class Probe(Bigram):
        def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
            seen.append(nn.functional.linear(self.table(tokens), self.table.weight).dtype)
            return super().forward(tokens, labels)

    model = Probe()
    batch_loss(model, Batch.of_windows(windows), torch.bfloat16).backward()
    batch_loss(model, Batch.of_windows(windows), torch.float32)
    assert seen == [torch.bfloat16, torch.float32]
    assert model.table.weight.grad is not None and model.table.weight.grad.dtype == torch.float32
