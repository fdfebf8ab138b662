"""Drawing tokens from the models."""

from palm_pytorch.generation.autoregressive_wrapper import AutoregressiveWrapper

__all__ = ["AutoregressiveWrapper"]
