"""A tokenizer of as many tokens as a small model has."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import models


def tokenizer_of(size: int, path: Path) -> Path:
    made = tokenizers.Tokenizer(models.WordLevel({str(n): n for n in range(size)}, unk_token="0"))
    made.save(str(path))
    return path
