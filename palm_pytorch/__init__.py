"""PaLM, PaLM-lite, LaMDA and Perceiver AR in PyTorch."""

from palm_pytorch.generation import AutoregressiveWrapper
from palm_pytorch.models import LaMDA, PaLM, PaLMLite, PerceiverAR, preset

__version__ = "0.1.0"

__all__ = ["AutoregressiveWrapper", "LaMDA", "PaLM", "PaLMLite", "PerceiverAR", "preset"]
