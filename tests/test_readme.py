"""Every Python block of the README runs by itself, as when pasted, and so does each `palm convert`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tokenizers
import torch
from torch import Tensor

from palm_pytorch import PaLM, PerceiverAR, from_pretrained
from palm_pytorch.checkpoints.reference.layout import Layout, count_blocks, expand
from palm_pytorch.checkpoints.reference.parallel import PALM
from palm_pytorch.checkpoints.reference.sequential import PERCEIVER_AR, keys_and_values
from palm_pytorch.cli import main
from palm_pytorch.data.tokenizer import load_tokenizer
from palm_pytorch.models.language_model import LanguageModel

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
CONVERSIONS = re.findall(r"^palm convert .*$", README, flags=re.MULTILINE)


def older(model: LanguageModel, layout: Layout) -> dict[str, Tensor]:
    """The weights of `model` as an older project would have saved them."""
    weights, state = model.state_dict(), {}
    ours = [line._replace(theirs=line.ours) for line in layout.weights]
    for line in expand(layout.weights, count_blocks(ours, weights)):
        both = line.change is keys_and_values  # the queries were put in just before
        state[line.theirs] = (
            torch.cat([state[line.theirs], weights[line.ours]]) if both else weights[line.ours]
        )
    return state


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the README speaks of, in the folder that its commands run in, and no network."""
    monkeypatch.chdir(tmp_path)
    shape = {"num_tokens": 37, "dim": 8, "depth": 2, "heads": 2}
    palm = PaLM(**shape, norm="layernorm")
    torch.save(older(palm, PALM), "palm.pt")
    theirs = {"norm": "layernorm-biased", "final_norm": False, "gated": False, "prefix_bias": True}
    perceiver = PerceiverAR(
        **shape, **theirs, max_seq_len=4096, cross_attn_seq_len=3072, tie_embeddings=False
    )
    torch.save(older(perceiver, PERCEIVER_AR), "perceiver.pt")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save("words.json")
    monkeypatch.setattr("palm_pytorch.checkpoints.pretrained.load_from_hub", lambda *_, **__: palm)
    monkeypatch.setattr(
        "palm_pytorch.checkpoints.hub.fetch_tokenizer", lambda _: load_tokenizer("words.json")
    )


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == len(re.findall(r"^ *```(?:python|py)\b", README, flags=re.MULTILINE)) > 0
    assert len(CONVERSIONS) > 0


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{n}" for n in range(len(BLOCKS))])
def test_block_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_generation_from_an_older_file(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(older(PaLM(num_tokens=256, dim=8, depth=2, heads=2, norm="layernorm"), PALM), "palm.pt")
    (command,) = re.findall(r"^palm generate --checkpoint palm\.pt .*$", README, flags=re.MULTILINE)
    _, *arguments = shlex.split(command, comments=True)
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(arguments[-1])


@pytest.mark.parametrize("command", CONVERSIONS)
def test_conversion_runs(command: str) -> None:
    _, *arguments = shlex.split(command, comments=True)
    assert main(arguments) == 0
    from_pretrained(arguments[2])
