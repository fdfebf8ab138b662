"""What a model is given, refused by name where it is none of it."""

from __future__ import annotations

import torch
from torch import Tensor

from palm_pytorch.layers.kv_cache import NO_CACHE, KVCache
from palm_pytorch.ops.arguments import expect_tensor, readable


def usable_cache(cache: KVCache | None, tokens: Tensor, document_ids: Tensor | None) -> KVCache:
    """The cache that a model works with, which keeps nothing if it is given none. Refuses what is no cache,
    ids that do not go with the tokens (b, n), and any with a cache, which keeps none."""
    if cache is not None and not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected one of `new_cache`, got {type(cache).__name__}")
    if document_ids is not None:
        expect_tensor("document_ids", document_ids)
        if document_ids.shape != tokens.shape:
            shapes = f"{tuple(tokens.shape)}, got {tuple(document_ids.shape)}"
            raise ValueError(f"document_ids: expected the shape of tokens, {shapes}")
        if cache is not None:
            raise ValueError("document_ids: a cache does not keep them, so expected None with one")
    return NO_CACHE if cache is None else cache


def check_tokens(tokens: Tensor, num_tokens: int, device: torch.device, name: str = "tokens") -> None:
    """Refuses what is no batch of token ids, as far as they are `readable`."""
    expect_tensor(name, tokens)
    if tokens.dtype not in (torch.long, torch.int):
        raise TypeError(f"{name}: expected torch.long or torch.int, got {tokens.dtype}")
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(f"{name}: expected shape (batch, length), neither empty, got {tuple(tokens.shape)}")
    if device.type != "meta" and tokens.device != device:  # or elsewhere until they are called for
        raise ValueError(f"{name}: expected the model's device {device}, got {tokens.device}")
    if readable(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < num_tokens:
        found = f"from {int(tokens.min())} to {int(tokens.max())}"
        raise ValueError(f"{name}: expected ids in [0, {num_tokens}), got ids {found}")
