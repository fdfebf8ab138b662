"""Documents packed into one row give what they give alone: losses, and the gradient of every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR
from palm_pytorch.models.language_model import LanguageModel

SHAPE: dict[str, Any] = {"num_tokens": 31, "dim": 24, "depth": 2, "heads": 3, "dim_head": 8, "ff_mult": 2}
MODELS = {
    "palm": lambda: PaLM(**SHAPE, xpos=True),
    "palm-lite": lambda: PaLMLite(**SHAPE),
    "lamda": lambda: LaMDA(**SHAPE, num_buckets=8, max_distance=12),
}
# Rotary tables are float32, and hold a position's angle as exactly as that can; the others are float64.
TOLERANCES = {"palm": 1e-5, "palm-lite": 1e-9, "lamda": 1e-9}
LENGTHS = (5, 1, 19, 2, 9)  # one is too short to predict anything


def gradients(model: LanguageModel, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_are_separate_ones(name: str) -> None:
    torch.manual_seed(1)
    model, close = MODELS[name]().double(), TOLERANCES[name]
    documents = [torch.randint(31, (1, length)) for length in LENGTHS]
    tokens = torch.cat(documents, dim=1)
    labels = [torch.nn.functional.pad(document[:, 1:], (0, 1), value=-100) for document in documents]
    ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    counted = sum(LENGTHS) - len(LENGTHS)

    packed = counted * model(tokens, labels=torch.cat(labels, dim=1), document_ids=ids)
    alone = torch.zeros((), dtype=torch.float64)
    for document, label in zip(documents, labels, strict=True):
        if document.shape[1] > 1:
            alone = alone + (document.shape[1] - 1) * model(document, labels=label)
    torch.testing.assert_close(packed, alone, rtol=close, atol=0)
    for found, wanted in zip(gradients(model, packed), gradients(model, alone), strict=True):
        torch.testing.assert_close(found, wanted, rtol=close, atol=close / 10)

    logits = model(tokens, document_ids=ids)
    separate = torch.cat([model(document) for document in documents], dim=1)
    torch.testing.assert_close(logits, separate, rtol=0, atol=close)
    assert (model(tokens) - separate).abs().max() > 1e-3, "without ids, attention reaches across"


def perceiver(**options: Any) -> PerceiverAR:
    torch.manual_seed(1)
    return PerceiverAR(**SHAPE, max_seq_len=20, cross_attn_seq_len=7, perceive_depth=2, **options).double()


def test_perceiver_ar_stays_inside_a_document() -> None:
    """Its positions are learned and count along the row, so a document is compared in its place: whatever
    stands in the others, its logits are the same."""
    model = perceiver()
    ids = torch.arange(4).repeat_interleave(torch.tensor([4, 6, 1, 9]))[None]
    first, second = torch.randint(31, (2, 1, 20))
    logits = model(first, document_ids=ids)
    for document in range(1, 4):
        mixed = torch.where(ids == document, first, second)
        of_latents = (ids == document)[0, 7:]
        torch.testing.assert_close(
            model(mixed, document_ids=ids)[:, of_latents], logits[:, of_latents], rtol=0, atol=1e-12
        )
        assert (model(mixed) - model(first))[:, of_latents].abs().max() > 1e-3


def test_perceiver_ar_sees_the_prefix_of_its_document_alone() -> None:
    model, tokens = perceiver(), torch.randint(31, (2, 20))
    ids = (torch.arange(20) >= 3).long().expand(2, 20)
    seen = (torch.arange(7) >= 3).expand(2, 7)
    torch.testing.assert_close(
        model(tokens, document_ids=ids), model(tokens, prefix_mask=seen), rtol=0, atol=1e-12
    )


def test_prefix_dropout_takes_the_documents_along() -> None:
    """With half of the prefix gone, what is left of another document is still not seen."""
    model = perceiver(cross_attn_dropout=0.5).train()
    ids = (torch.arange(20) >= 3).long()[None]
    first, second = torch.randint(31, (2, 1, 20))
    logits = []
    for tokens in (first, torch.where(ids == 0, second, first)):
        torch.manual_seed(5)
        logits.append(model(tokens, document_ids=ids))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_what_does_not_fit_is_named(name: str) -> None:
    model = MODELS[name]()
    tokens = torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(
        ValueError, match=r"document_ids: expected the shape of tokens, \(2, 6\), got \(2, 5\)"
    ):
        model(tokens, document_ids=tokens[:, 1:])
    with pytest.raises(ValueError, match="document_ids: a cache"), torch.no_grad():
        model(tokens, document_ids=tokens, cache=model.new_cache())
    with pytest.raises(TypeError, match="document_ids: expected integers"):
        model(tokens, document_ids=tokens.double())
