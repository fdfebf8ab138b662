"""Functions on tensors; nothing here knows of modules."""

from palm_pytorch.ops.attention import AlibiBias, RelativeBias, attention
from palm_pytorch.ops.cross_entropy import linear_cross_entropy
from palm_pytorch.ops.rms_norm import rms_norm
from palm_pytorch.ops.rotary import rotate

__all__ = ["AlibiBias", "RelativeBias", "attention", "linear_cross_entropy", "rms_norm", "rotate"]
