"""The four models; each file is its block, its model and how it is initialised."""

from palm_pytorch.models.lamda import LaMDA
from palm_pytorch.models.palm import PaLM
from palm_pytorch.models.palm_lite import PaLMLite
from palm_pytorch.models.perceiver_ar import PerceiverAR
from palm_pytorch.models.presets import preset

__all__ = ["LaMDA", "PaLM", "PaLMLite", "PerceiverAR", "preset"]
