"""PaLM, PaLM-lite, LaMDA and Perceiver AR in PyTorch."""

from palm_pytorch.checkpoints import from_pretrained, load_reference
from palm_pytorch.generation import AutoregressiveWrapper
from palm_pytorch.models import LaMDA, PaLM, PaLMLite, PerceiverAR, preset
from palm_pytorch.version import __version__ as __version__

__all__ = [
    "AutoregressiveWrapper",
    "LaMDA",
    "PaLM",
    "PaLMLite",
    "PerceiverAR",
    "from_pretrained",
    "load_reference",
    "preset",
]
