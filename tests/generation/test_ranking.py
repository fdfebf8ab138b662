"""Sample-and-rank: candidates are those of `generate`, and their scores what the model says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from definitions import error
from torch import Tensor, nn

from palm_pytorch import LaMDA
from palm_pytorch.generation.ranking import lengths

V, EOS = 23, 4


def build(num_tokens: int = V) -> LaMDA:
    net = LaMDA(num_tokens=num_tokens, dim=24, depth=2, heads=3, dim_head=16, ff_mult=2)
    for weight in net.parameters():
        nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.2)
    return net.eval()


def prompts() -> Tensor:
    return torch.randint(V, (2, 7))


@torch.no_grad()
def likelihood(net: LaMDA, prompt: Tensor, tokens: Tensor) -> float:
    """The mean log-probability of tokens (n,) after prompt (t,)."""
    log_probs = net(torch.cat([prompt, tokens])[None])[0].log_softmax(dim=-1)
    return log_probs[len(prompt) - 1 : -1].gather(1, tokens[:, None]).mean().item()


def test_candidates_come_best_first_with_their_likelihood_per_token() -> None:
    net, start = build(), prompts()
    found = net.sample_and_rank(start, 12, num_candidates=5, eos_token=EOS, pad_token=-1)
    assert found.tokens.shape[:2] == found.scores.shape == (2, 5)
    assert (found.scores[:, :-1] >= found.scores[:, 1:]).all()
    ended = 0
    for prompt, candidates, scores in zip(start, found.tokens, found.scores, strict=True):
        for tokens, score in zip(candidates, scores, strict=True):
            written = tokens[tokens != -1]
            ended += written[-1].item() == EOS
            assert EOS not in written[:-1]
            assert score.item() == pytest.approx(likelihood(net, prompt, written), rel=1e-4)
    assert ended > 0


def test_the_defaults_are_the_papers() -> None:
    net, start = build(num_tokens=50), prompts()
    found = net.sample_and_rank(start, 30, generator=torch.Generator().manual_seed(0)).tokens
    assert found.shape == (2, 16, 30)

    def drawn(top_k: int) -> list[list[int]]:
        seeded = torch.Generator().manual_seed(0)
        tokens: Tensor = net.generate(start, 30, num_samples=16, top_k=top_k, generator=seeded)
        return sorted(tokens.tolist())

    assert sorted(found.flatten(0, 1).tolist()) == drawn(40)
    assert drawn(39) != drawn(40) != drawn(41)


def test_greedy_candidates_are_alike() -> None:
    found = build().sample_and_rank(prompts(), 5, num_candidates=3, temperature=0)
    assert (found.tokens == found.tokens[:, :1]).all() and error(
        found.scores[:, 1], found.scores[:, 0]
    ) <= 1e-6


def test_lengths_count_the_end_token() -> None:
    tokens = torch.tensor([[EOS, 0, 0], [1, EOS, EOS], [1, 2, EOS], [1, 2, 3]])
    assert lengths(tokens, EOS).tolist() == [1, 2, 3, 3] and lengths(tokens, None).tolist() == [3] * 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_candidates": 0}, "num_candidates: .*0"),
        ({"max_new_tokens": 0}, "max_new_tokens: .*0"),
        ({"num_samples": 2}, "num_samples: "),
        ({"log_probs": True}, "log_probs: "),
        ({"top_k": 0}, "top_k: .*0"),
        ({"prompt": torch.zeros(0, 3, dtype=torch.long)}, r"prompt: .*\(0, 3\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        build().sample_and_rank(**{"prompt": prompts(), "max_new_tokens": 2, **changes})
