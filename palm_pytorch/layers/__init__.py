"""Modules that the models share; each works by itself."""

from palm_pytorch.layers.alibi import alibi_slopes
from palm_pytorch.layers.attention import MultiQueryAttention
from palm_pytorch.layers.feedforward import GEGLU, FeedForward, SwiGLU
from palm_pytorch.layers.kv_cache import KVCache
from palm_pytorch.layers.norm import L2Norm, LayerNorm, RMSNorm
from palm_pytorch.layers.prefix_dropout import PrefixDropout
from palm_pytorch.layers.relative_bias import T5RelativeBias
from palm_pytorch.layers.rotary import Rotary, apply_rotary
from palm_pytorch.layers.static_cache import StaticCache

__all__ = [
    "GEGLU",
    "FeedForward",
    "KVCache",
    "L2Norm",
    "LayerNorm",
    "MultiQueryAttention",
    "PrefixDropout",
    "RMSNorm",
    "Rotary",
    "StaticCache",
    "SwiGLU",
    "T5RelativeBias",
    "alibi_slopes",
    "apply_rotary",
]
