"""The shapes of published models, as arguments for this package's constructors.

A preset is a model's shape and nothing of its training: dropout and the like stay at the constructors'
defaults. Where a publication leaves an argument open, the comment beside it says what was chosen and why.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any


def _palm(*, dim: int, depth: int, heads: int) -> dict[str, Any]:
    # Chowdhery et al. 2022, arXiv 2204.02311, section 2: a vocabulary of 256k, heads of 256, a feed-forward
    # four times as wide as the model, no bias in dense layers or layer norms.
    return {
        "num_tokens": 256_000,
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "dim_head": 256,
        "ff_mult": 4,
        "norm": "layernorm",
    }


def _palm_c4(*, dim: int, depth: int) -> dict[str, Any]:
    # github.com/conceptofmind/PaLM, README and hubconf.py: trained on C4 at 8,192 tokens; GPT-NeoX-20B's
    # tokenizer padded to 50,304, xPos rotary, bias-less layer norms, no query-key norm.
    return {
        "num_tokens": 50_304,
        "dim": dim,
        "depth": depth,
        "heads": 8,
        "dim_head": 128,
        "ff_mult": 4,
        "norm": "layernorm",
        "xpos": True,
        "xpos_scale_base": 512,
    }


def _lamda(*, dim: int, depth: int, heads: int) -> dict[str, Any]:
    # Thoppilan et al. 2022, arXiv 2201.08239, section 3: a SentencePiece vocabulary of 32K; for 137B, heads
    # of 128 and a feed-forward of 65,536 = 8 * 8192. The smaller models are given as layers, units and heads
    # only. These ratios, and a key and value for every head, make all three sizes come out (2.1B, 8.6B and
    # 137.4B parameters besides embeddings); one shared key and value would leave 137B at 120B.
    return {
        "num_tokens": 32_000,
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "dim_head": 128,
        "kv_heads": heads,
        "ff_mult": 8,
    }


def _perceiver_ar(*, num_tokens: int, depth: int, heads: int, context: int, latents: int) -> dict[str, Any]:
    # Hawthorne et al. 2022, arXiv 2202.07765, and its code, github.com/google-research/perceiver-ar
    # (`get_sweep` in experiment.py): layer norms, one cross-attention layer before `depth` layers over the
    # latents, all 1,024 wide, with a feed-forward four times that, and a head of its own. The feed-forward
    # there is an ungated squared ReLU, so that parameter counts differ.
    return {
        "num_tokens": num_tokens,
        "dim": 1024,
        "depth": depth,
        "heads": heads,
        "dim_head": 1024 // heads,
        "ff_mult": 4,
        "max_seq_len": context,
        "cross_attn_seq_len": context - latents,
        "perceive_depth": 1,
        "norm": "layernorm",
        "tie_embeddings": False,
    }


# Perceiver AR's vocabularies begin with padding, end and start (`NUM_RESERVED_TOKENS` in dataset.py).
_RESERVED = 3

_PRESETS = {
    # PaLM, table 1: 8.63B, 62.50B and 540.35B parameters.
    "palm-8b": _palm(dim=4096, depth=32, heads=16),
    "palm-62b": _palm(dim=8192, depth=64, heads=32),
    "palm-540b": _palm(dim=18_432, depth=118, heads=48),
    # The public checkpoints, table in the README.
    "palm-150m": _palm_c4(dim=768, depth=12),
    "palm-410m": _palm_c4(dim=1024, depth=24),
    "palm-1b": _palm_c4(dim=2048, depth=16),
    "palm-2b": _palm_c4(dim=2560, depth=24),
    # LaMDA, appendix D, table 27.
    "lamda-2b": _lamda(dim=2560, depth=10, heads=40),
    "lamda-8b": _lamda(dim=4096, depth=16, heads=64),
    "lamda-137b": _lamda(dim=8192, depth=64, heads=128),
    # Perceiver AR's code, `random_mirrored_131072`: bytes.
    "perceiver-ar-copy": _perceiver_ar(
        num_tokens=_RESERVED + 256, depth=6, heads=16, context=131_072, latents=1024
    ),
    # Its code, `imagenet_w_positions`: a start token, then 64 * 64 * 3 colour values. The code pads them to
    # 12,416 and embeds row, column and channel; here a position has one embedding.
    "perceiver-ar-imagenet64": _perceiver_ar(
        num_tokens=_RESERVED + 256, depth=60, heads=16, context=1 + 64 * 64 * 3, latents=1024
    ),
    # The paper's PG-19 model at the context that scored best, 32k SentencePiece tokens. Its token embedding
    # is 4,096 wide, read by 128 cross-attention heads; here the latents' width (1,024: it gives the paper's
    # 974.6M parameters to 0.1%) and the heads of the models above hold throughout.
    "perceiver-ar-pg19": _perceiver_ar(num_tokens=32_000, depth=60, heads=16, context=2048, latents=1024),
    # The paper's symbolic MAESTRO model, on the 388 events of Music Transformer (arXiv 1809.04281, appendix
    # A.2). Its cross-attention has a single head; its width is not stated, and taken from the models above.
    "perceiver-ar-maestro": _perceiver_ar(
        num_tokens=_RESERVED + 388, depth=12, heads=4, context=4096, latents=2048
    ),
}


def preset(name: str) -> dict[str, Any]:
    """Constructor arguments of a published model, as a new dict: `PaLM(**preset("palm-8b"))`.

    Names begin with their model: `palm-` for `PaLM`, `lamda-` for `LaMDA`, `perceiver-ar-` for `PerceiverAR`.
    Raises ValueError for a name that is not known, listing those that are; TypeError for what is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {name!r}")
    if name not in _PRESETS:
        close = get_close_matches(name, _PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name: expected one of {', '.join(_PRESETS)}, got {name!r}{hint}")
    return dict(_PRESETS[name])
