"""Models in folders, on the hub, and from the older projects' files.

Models have `save_pretrained`, `from_pretrained` and `push_to_hub` from here: they do not import what stands
above them.
"""

from palm_pytorch.checkpoints.hub import push_to_hub
from palm_pytorch.checkpoints.native import find_tokenizer, save_pretrained
from palm_pytorch.checkpoints.pretrained import from_pretrained as _from_pretrained
from palm_pytorch.checkpoints.reference import load_reference
from palm_pytorch.models.language_model import LanguageModel

__all__ = ["find_tokenizer", "from_pretrained", "load_reference"]

LanguageModel.save_pretrained = save_pretrained  # type: ignore[assignment, method-assign]
LanguageModel.push_to_hub = push_to_hub  # type: ignore[assignment, method-assign]
LanguageModel.from_pretrained = classmethod(_from_pretrained)  # type: ignore[assignment, method-assign]
# Of the class that the config says.
from_pretrained = LanguageModel.from_pretrained
