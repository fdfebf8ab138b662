from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """400 short texts, ten of them twice."""
    rng = random.Random(5)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) + f" {number}" for number in range(390)]
    return [*texts[:200], *texts[100:110], *texts[200:]]


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """The same as a file of JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path
