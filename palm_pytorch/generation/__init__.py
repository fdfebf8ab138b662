"""Drawing tokens from the models.

Models have `generate` and `stream` from here, and LaMDA `sample_and_rank`: they do not import what stands
above them.
"""

from palm_pytorch.generation.autoregressive_wrapper import AutoregressiveWrapper
from palm_pytorch.generation.decode import generate, prefill, step, stream
from palm_pytorch.generation.ranking import sample_and_rank
from palm_pytorch.generation.sampling import Sampling
from palm_pytorch.models import LaMDA
from palm_pytorch.models.language_model import LanguageModel

__all__ = ["AutoregressiveWrapper", "Sampling", "generate", "prefill", "sample_and_rank", "step", "stream"]

LanguageModel.generate = generate  # type: ignore[method-assign,assignment]
LanguageModel.stream = stream  # type: ignore[method-assign,assignment]
LaMDA.sample_and_rank = sample_and_rank  # type: ignore[method-assign,assignment]
