"""Weights of the older projects: recognised by their names, used to the last tensor, as models of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from palm_pytorch.checkpoints.native import build_on_meta, fill
from palm_pytorch.checkpoints.reference.layout import SOURCE
from palm_pytorch.checkpoints.reference.parallel import (
    PALM,
    PALM_FLAX,
    PALM_LITE,
    PALM_RLHF,
    PALM_RLHF_QK_NORM,
)
from palm_pytorch.checkpoints.reference.sequential import LAMDA, PERCEIVER_AR
from palm_pytorch.checkpoints.reference.source import read_tensors
from palm_pytorch.models.language_model import LanguageModel

__all__ = ["load_reference"]

LAYOUTS = (PALM, PALM_LITE, PALM_RLHF_QK_NORM, PALM_RLHF, LAMDA, PERCEIVER_AR, PALM_FLAX)


def load_reference(
    path_or_state_dict: str | Path | Mapping[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> LanguageModel:
    """A model of ours, in eval mode, that computes what an older project's does with these weights.

    path_or_state_dict: names and tensors, or arrays, nested or not; or a file: PyTorch's (read with
    `weights_only=True`), `.safetensors`, `.npz`, or flax's `.msgpack`. Of PaLM-pytorch and its palm_lite,
    PaLM-rlhf-pytorch, LaMDA-pytorch, perceiver-ar-pytorch or PaLM-flax; bare, in their AutoregressiveWrapper,
    or as DataParallel or torch.compile name them.
    device, dtype: of the model; by default the CPU and the embedding's dtype.
    config: constructor arguments. What the tensors tell needs not be given, and has to agree; what they do
    not tell stays at its default if there is one. A file cut off between two blocks looks like a shallower
    model: give `depth` where that could be. These have no default:

    - perceiver-ar-pytorch: `cross_attn_seq_len`; `dim_head` where several would fit.
    - PaLM-rlhf-pytorch: `gain="gamma"` (up to 0.2.3) or `"gamma+1"` (from 0.2.4 on), where the gains could
      be either; `xpos` if the file holds no buffers. Its `xpos_scale_base` is in no file: 512 unless given.
      Up to 0.2.0 logits skip the last norm, whose gain was thus never trained: `final_norm=False`, which is
      seen by that. Versions 0.0.63 to 0.0.68 applied `qk_scale=8` to normed queries and keys; if yours was
      one, give it.

    Raises:
        TypeError, ValueError: the tensors are of no known project, damaged, missing or too many; what only
            the user knows was not given, or what was given is not so.
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the package that reads such files is not installed.
    """
    older = read_tensors(path_or_state_dict)
    layout = next((layout for layout in LAYOUTS if layout.fits(older)), None)
    if layout is None:
        known = ", ".join(layout.project for layout in LAYOUTS if layout is not PALM_RLHF_QK_NORM)
        raise ValueError(
            f"{SOURCE}: expected the tensors of {known}, got {', '.join([*older][:4]) or 'none'}, ..."
        )
    arguments, weights = layout.read(older, config)
    model = build_on_meta(layout.model, arguments)
    source = f"the {layout.project} weights"
    fill(model, weights.items(), source, device=device, dtype=dtype or weights["token_emb.weight"].dtype)
    return model.eval()
