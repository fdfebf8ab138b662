"""Every token is scored once, with the context that the definition gives it, whatever the batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR
from palm_pytorch.data.arrays import SequenceDataset
from palm_pytorch.data.batch import HeldOut
from palm_pytorch.data.tokenizer import IntegerTokenizer
from palm_pytorch.models.language_model import LanguageModel
from palm_pytorch.training.scoring import Score, SlidingWindows, Window, read_all, read_windows
from palm_pytorch.training.scoring import score as score_reading

SHAPE: dict[str, Any] = {"num_tokens": 23, "dim": 16, "depth": 2, "heads": 3, "dim_head": 8}


def build(name: str) -> LanguageModel:
    torch.manual_seed(3)
    if name == "perceiver-ar":
        model: LanguageModel = PerceiverAR(**SHAPE, max_seq_len=13, cross_attn_seq_len=6, dropout=0.5)
    elif name == "lamda":
        model = LaMDA(**SHAPE, num_buckets=8, max_distance=12, dropout=0.5)
    else:
        model = {"palm": PaLM, "palm-lite": PaLMLite}[name](**SHAPE, attn_dropout=0.5, ff_dropout=0.5)
    for parameter in model.parameters():  # far from uniform, so that the context matters
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.double()


def text(length: int, **more: Any) -> HeldOut:
    tokens = np.random.default_rng(length).integers(23, size=length).astype(np.uint8)
    return HeldOut(tokens, **{"num_bytes": length - 1, **more})


def score(
    model: LanguageModel, held_out: HeldOut, *, seq_len: int, stride: int | None, batch_size: int
) -> Score:
    sizes = {"stride": stride, "batch_size": batch_size, "prefix_len": getattr(model, "prefix_len", 0)}
    return score_reading(model, read_all(held_out, seq_len=seq_len, **sizes))


def loss_at(model: LanguageModel, tokens: Tensor, position: int, start: int) -> float:
    """The loss of the token after `position`, read off the last of the logits of what is from `start` on."""
    seen, inputs = tokens[None, max(0, start) : position + 1], {}
    if isinstance(model, PerceiverAR):
        padding = max(0, -start)
        seen = torch.nn.functional.pad(seen, (padding, 0))
        inputs["prefix_mask"] = torch.arange(model.prefix_len)[None] >= padding
    logits = model(seen, **inputs)[0, -1]
    return -logits.log_softmax(-1)[tokens[position + 1]].item()


def plain_score(model: LanguageModel, tokens: Tensor, *, seq_len: int, stride: int) -> float:
    """The definition, one position after the other."""
    predicting = seq_len - getattr(model, "prefix_len", 0)
    last = len(tokens) - 1
    total = 0.0
    for position in range(last):
        steps = math.ceil(max(0, position + 1 - predicting) / stride)  # of the window that scores it
        end = min(predicting + steps * stride, max(last, predicting))
        total += loss_at(model, tokens, position, end - seq_len)
    return total


@pytest.mark.parametrize("name", ["palm", "palm-lite", "lamda", "perceiver-ar"])
@pytest.mark.parametrize(
    ("length", "seq_len", "stride"),
    [(41, 13, 4), (40, 13, 7), (30, 11, 1), (9, 13, 5), (20, 12, 6), (2, 10, 3)],
)
def test_the_score_is_that_of_the_definition(name: str, length: int, seq_len: int, stride: int) -> None:
    if name == "perceiver-ar" and stride > seq_len - 6:
        stride = seq_len - 6
    model, held_out = build(name).train(), text(length)
    found = score(model, held_out, seq_len=seq_len, stride=stride, batch_size=3)
    assert model.training and found.num_labels == length - 1
    tokens = torch.from_numpy(held_out.tokens.astype(np.int64))
    with torch.no_grad():
        expected = plain_score(model.eval(), tokens, seq_len=seq_len, stride=stride)
    assert found.nats == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["palm", "perceiver-ar"])
def test_the_size_of_batches_changes_nothing(name: str) -> None:
    model, held_out = build(name), text(60)
    scores = {size: score(model, held_out, seq_len=12, stride=5, batch_size=size).nats for size in (1, 3, 99)}
    assert scores[3] == pytest.approx(scores[1], rel=1e-13) == pytest.approx(scores[99], rel=1e-13)


def test_another_stride_is_another_context() -> None:
    model, held_out = build("palm"), text(60)
    scores = {
        stride: score(model, held_out, seq_len=12, stride=stride, batch_size=9) for stride in (1, 6, 12)
    }
    assert len({round(each.nats, 6) for each in scores.values()}) == 3


@pytest.mark.parametrize("prefix_len", [0, 4])
@pytest.mark.parametrize("stride", [1, 3, 7])
@pytest.mark.parametrize("num_positions", [1, 6, 7, 8, 29])
def test_every_position_counts_once_with_all_the_context_there_is(
    num_positions: int, stride: int, prefix_len: int
) -> None:
    windows = SlidingWindows(num_positions, 7 + prefix_len, stride, prefix_len)
    owners: dict[int, Window] = {}
    for window in windows:
        for position in range(window.first, window.end):
            assert owners.setdefault(position, window) is window
    assert sorted(owners) == list(range(num_positions))
    for position, window in owners.items():
        start = max(0, window.end - windows.length)
        assert position - start + 1 >= min(position + 1, 7 + prefix_len - stride + 1)
        assert position >= window.end - windows.positions  # a latent


def test_the_cost_is_known_beforehand() -> None:
    """For each token that is scored: of a dialog, the others are read too."""
    tokens = np.broadcast_to(np.uint8(0), 5_000_001)
    sizes = {"seq_len": 1024, "stride": 256, "batch_size": 1}
    reading = read_all(HeldOut(tokens, num_bytes=5_000_000), **sizes)
    assert reading.count == 1 + math.ceil((5_000_000 - 1024) / 256)
    assert str(reading) == (
        "19,529 of 1,024 tokens, 256 apart: 4.0 tokens go through the model for each that is scored"
    )
    half = HeldOut(tokens, num_bytes=2_500_000, counts=np.arange(5_000_001) % 2 == 1)
    assert ", 256 apart: 8.0 tokens go" in str(read_all(half, **sizes))


@pytest.mark.parametrize("name", ["palm", "palm-lite", "lamda", "perceiver-ar"])
def test_whole_sequences_are_scored_one_by_one(name: str) -> None:
    """Each from the token that begins it, and nothing of another; what is in a prefix is not predicted."""
    values = np.random.default_rng(1).integers(22, size=(200, 11)).astype(np.uint8)
    data = SequenceDataset(values, Path("values.npy"), IntegerTokenizer(22), 11)
    model, held_out = build(name), data.held_out("test")
    reading = read_all(
        held_out, seq_len=11, stride=None, batch_size=2, prefix_len=getattr(model, "prefix_len", 0)
    )
    found, rows = score_reading(model, reading), held_out.tokens.reshape(-1, 12).astype(np.int64)
    predicted = range(6 if name == "perceiver-ar" else 0, 11)
    assert found.num_labels == found.num_bytes == len(predicted) * len(rows) and len(rows) > 2
    cost = 11 / len(predicted)
    assert f"{len(rows)} of 11 tokens, a whole sequence each: {cost:.1f} tokens go" in str(reading)
    with torch.no_grad():
        expected = sum(
            loss_at(model.eval(), torch.from_numpy(row), at, 0) for row in rows for at in predicted
        )
    assert found.nats == pytest.approx(expected, rel=1e-7)  # rotary is float32
    with pytest.raises(ValueError, match="stride is 3; expected none for sequences, which are read whole"):
        score(model, held_out, seq_len=11, stride=3, batch_size=2)


def test_early_windows_of_a_prefix_are_padded_on_the_left() -> None:
    held_out = HeldOut(np.arange(10, 22), num_bytes=11)
    batch = read_windows(held_out, SlidingWindows(11, 7, 2, prefix_len=4), range(3))
    assert batch.tokens.tolist() == [
        [0, 0, 0, 0, 10, 11, 12],
        [0, 0, 10, 11, 12, 13, 14],
        [10, 11, 12, 13, 14, 15, 16],
    ]
    assert batch.labels.tolist() == [
        [-100] * 4 + [11, 12, 13],
        [-100] * 5 + [14, 15],
        [-100] * 5 + [16, 17],
    ]
    assert batch.prefix_mask is not None
    assert batch.prefix_mask.tolist() == [[False] * 4, [False, False, True, True], [True] * 4]
    batch = read_windows(held_out, SlidingWindows(11, 7, 2, prefix_len=4), range(2, 5))
    assert batch.prefix_mask is None


def test_only_tokens_that_count_are_scored() -> None:
    """Responses of a dialog, say: the others are context."""
    model = build("palm")
    held_out = text(40, counts=np.arange(40) % 3 == 0, num_bytes=77)
    found = score(model, held_out, seq_len=10, stride=4, batch_size=2)
    assert (found.num_labels, found.num_bytes) == (13, 77)
    tokens = torch.from_numpy(held_out.tokens.astype(np.int64))
    with torch.no_grad():
        expected = sum(
            loss_at(model.eval(), tokens, at, min(10 + math.ceil(max(0, at - 9) / 4) * 4, 39) - 10)
            for at in range(39)
            if (at + 1) % 3 == 0
        )
    assert found.nats == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["palm", "palm-lite", "lamda"])
def test_documents_are_scored_as_if_alone(name: str) -> None:
    """Where attention stays inside them: nothing of one is a context of the next, nor predicts its first."""
    model, tokens = build(name), text(30).tokens
    held_out = HeldOut(tokens, num_bytes=29, ends=np.array([7, 9, 24]))
    found = score(model, held_out, seq_len=40, stride=4, batch_size=2)
    alone = [
        score(model, HeldOut(part, num_bytes=len(part) - 1), seq_len=40, stride=4, batch_size=2)
        for part in np.split(tokens, [7, 9, 24])
    ]
    assert found.num_labels == sum(each.num_labels for each in alone) == 26
    assert found.nats == pytest.approx(sum(each.nats for each in alone), rel=1e-7)  # rotary is float32


def test_bits_are_per_byte_of_text_and_perplexity_per_token() -> None:
    found = Score(nats=8 * math.log(2), num_labels=4, num_bytes=16)
    assert found.bits_per_byte == pytest.approx(0.5) and found.perplexity == pytest.approx(4)
    assert Score(1e6, 1, 1).perplexity == math.inf


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stride": 0}, "stride is 0; expected 1 to 8, or tokens would be left out"),
        ({"stride": 9}, "stride is 9; expected 1 to 8,"),
        ({"prefix_len": 5, "stride": 4}, "stride is 4; expected 1 to 3, the 3 latents,"),
        ({"num_positions": 0, "stride": 1}, "the text is too short"),
    ],
)
def test_windows_that_cannot_be(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as error:
        SlidingWindows(**{"num_positions": 20, "seq_len": 8, **given})
    assert says in str(error.value)


def test_ctrl_c_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build("palm").train(), []
    forward = model.forward

    def interrupted(*args: Any, **inputs: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **inputs)

    monkeypatch.setattr(model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt, match="14 of 59 tokens were scored, and nothing written"):
        score(model, text(60), seq_len=10, stride=4, batch_size=1)
    assert model.training
