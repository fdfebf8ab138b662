"""A saved model comes back as it was, or not at all."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import stat
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import palm_pytorch
from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR, from_pretrained
from palm_pytorch.checkpoints import native
from palm_pytorch.models.language_model import LanguageModel

SHAPE: dict[str, Any] = {"num_tokens": 37, "dim": 24, "depth": 2, "heads": 3, "dim_head": 16, "ff_mult": 2}
LENGTHS = {"max_seq_len": 40, "cross_attn_seq_len": 9}
MODELS: list[tuple[type[LanguageModel], dict[str, Any]]] = [
    (PaLM, {}),
    (
        PaLM,
        {"norm": "layernorm", "qk_norm": True, "xpos": True, "tie_embeddings": False, "final_norm": False},
    ),
    (PaLMLite, {"norm": "rmsnorm-clamped"}),
    (LaMDA, {"kv_heads": 3}),
    (LaMDA, {"norm": "layernorm-biased", "bias": True, "tie_embeddings": False}),
    (PerceiverAR, LENGTHS),
    (PerceiverAR, {**LENGTHS, "norm": "layernorm-biased", "gated": False, "prefix_bias": True}),
]
models = pytest.mark.parametrize(("kind", "options"), MODELS, ids=str)


def build(kind: type[LanguageModel] = PaLM, **options: Any) -> LanguageModel:
    """A model whose biases are not zero, nor its gains one."""
    model = kind(**{**SHAPE, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(folder: Path, **options: Any) -> LanguageModel:
    model = build(**options)
    model.save_pretrained(folder)
    return model


def tokens() -> Tensor:
    return torch.randint(37, (2, 30))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------------- there and back


@models
def test_round_trip(kind: type[LanguageModel], options: dict[str, Any], tmp_path: Path) -> None:
    model, text = build(kind, **options).eval(), tokens()
    model.save_pretrained(tmp_path / "new" / "folder")
    for loaded in (
        kind.from_pretrained(tmp_path / "new" / "folder"),
        from_pretrained(str(tmp_path / "new" / "folder")),
    ):
        assert type(loaded) is kind and loaded.config == model.config and not loaded.training
        assert {p.requires_grad for p in loaded.parameters()} == {True}
        assert torch.equal(loaded(text), model(text))


def test_what_is_written(tmp_path: Path) -> None:
    saved(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"] == "PaLM" and config["palm_pytorch"] == palm_pytorch.__version__
    assert config["config"].items() >= SHAPE.items()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "palm_pytorch": palm_pytorch.__version__}
        assert "to_logits.weight" not in file.keys()  # noqa: SIM118  # tied


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_others_may_read_what_they_may_read_of_this_user(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "plain").write_text("")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_weights_that_the_user_tied_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = build(tie_embeddings=False)
    model.to_logits.weight = model.token_emb.weight  # type: ignore[union-attr, assignment]
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "to_logits.weight" not in file.keys()  # noqa: SIM118
    loaded = PaLM.from_pretrained(tmp_path)
    assert loaded.to_logits.weight is loaded.token_emb.weight  # type: ignore[union-attr]
    assert len([*loaded.parameters()]) == len([*model.parameters()])


@models
def test_shards(kind: type[LanguageModel], options: dict[str, Any], tmp_path: Path) -> None:
    model, text = build(kind, **options).eval(), tokens()
    largest = max(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=largest)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    shards = sorted(tmp_path.glob("*.safetensors"))
    count = len(shards)
    assert count > 1 and {*index["weight_map"].values()} == {shard.name for shard in shards}
    assert [s.name for s in shards] == [
        f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)
    ]
    for shard in shards:
        stored = safetensors.torch.load_file(shard)
        assert sum(tensor.nbytes for tensor in stored.values()) <= largest
    assert torch.equal(kind.from_pretrained(tmp_path)(text), model(text))
    model.save_pretrained(tmp_path)  # leaves no shard behind
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_other_files_stay_where_they_are(tmp_path: Path) -> None:
    others = {"model_ema.safetensors", "model-best.safetensors", "models.safetensors", "model-1.bin"}
    for name in others:
        (tmp_path / name).write_text("precious")
    saved(tmp_path)
    assert others < {file.name for file in tmp_path.iterdir()}


CHANGES: dict[str, Callable[[PaLM], Any]] = {
    "token_emb.weight: expected shape": lambda m: setattr(m, "token_emb", torch.nn.Embedding(60, 24)),
    "no place for: to_logits.weight": lambda m: setattr(m, "to_logits", torch.nn.Linear(24, 37, bias=False)),
    "no place for: layers.0.ff_out.bias": lambda m: setattr(
        m.layers[0].ff_out, "bias", torch.nn.Parameter(torch.zeros(24))
    ),
    "lacks tensors of its config: layers.1": lambda m: m.layers.__delitem__(1),
}


@pytest.mark.parametrize("said", CHANGES)
def test_a_model_that_could_not_be_loaded_is_not_saved_over_one_that_can(said: str, tmp_path: Path) -> None:
    saved(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    model = build()
    CHANGES[said](model)
    with pytest.raises(ValueError, match=f"^model.*{said}"):
        model.save_pretrained(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


class Own(PaLM):
    def __init__(self, **config: Any) -> None:
        super().__init__(**config)


def test_a_class_that_passes_its_arguments_on(tmp_path: Path) -> None:
    Own(**SHAPE).save_pretrained(tmp_path)
    assert type(Own.from_pretrained(tmp_path)) is Own
    with pytest.raises(TypeError, match="colour"):
        Own.from_pretrained(tmp_path, colour="red")


def test_a_tensor_larger_than_a_shard_has_one_to_itself(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path, max_shard_size=1)
    assert len([*tmp_path.glob("*.safetensors")]) == len([*model.parameters()])
    with pytest.raises(ValueError, match="max_shard_size: expected at least 1, got 0"):
        model.save_pretrained(tmp_path, max_shard_size=0)


def test_dtype_is_that_saved_or_the_one_asked_for(tmp_path: Path) -> None:
    model = build().bfloat16()
    model.save_pretrained(tmp_path)
    kept, wide = PaLM.from_pretrained(tmp_path), PaLM.from_pretrained(tmp_path, dtype=torch.float32)
    for a, b, c in zip(model.parameters(), kept.parameters(), wide.parameters(), strict=True):
        assert b.dtype == torch.bfloat16 and torch.equal(a, b)
        assert c.dtype == torch.float32 and torch.equal(a.float(), c)


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_device(device: str, tmp_path: Path) -> None:
    saved(tmp_path)
    loaded = from_pretrained(tmp_path, device=device, dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in loaded.parameters()} == {(device, torch.float16)}
    with torch.device(device):
        assert {p.device.type for p in from_pretrained(tmp_path).parameters()} == {device}


class Memory(TorchDispatchMode):
    """The most bytes at a time of tensors that operators returned off the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type != "meta":
            self.made.append(weakref.ref(out))
            alive = [t.untyped_storage() for made in self.made if (t := made()) is not None]
            self.most = max(self.most, sum({s.data_ptr(): s.nbytes() for s in alive}.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_holds_one_tensor_beside_the_model(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the file's tensors are read and not mapped."""
    model = saved(tmp_path)
    read = ((name, tensor.clone()) for name, tensor in model.state_dict().items())
    monkeypatch.setattr(native, "stored_tensors", lambda folder, files: read)
    with Memory() as memory:
        loaded = from_pretrained(tmp_path, dtype=dtype)
    size, largest = sum(p.nbytes for p in loaded.parameters()), max(p.nbytes for p in model.parameters())
    assert size <= memory.most <= size + largest


def test_the_model_outlives_its_files(tmp_path: Path) -> None:
    model, text = saved(tmp_path).eval(), tokens()
    loaded = from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert torch.equal(loaded(text), model(text))


def test_arguments_that_change_no_shape(tmp_path: Path) -> None:
    saved(tmp_path)
    loaded = PaLM.from_pretrained(tmp_path, attention_backend="reference", attn_dropout=0.1)
    assert loaded.config["attention_backend"] == "reference" and loaded.config["attn_dropout"] == 0.1


def test_a_subclass(tmp_path: Path) -> None:
    class Mine(PaLM):
        pass

    saved(tmp_path, kind=Mine)
    assert type(Mine.from_pretrained(tmp_path)) is Mine
    assert type(from_pretrained(tmp_path)) is PaLM
    with pytest.raises(ValueError, match="expected a LaMDA, got a PaLM"):
        LaMDA.from_pretrained(tmp_path)


def test_help_is_helpful() -> None:
    assert "safetensors" not in vars(nn.Module)
    for method in (PaLM.from_pretrained, PaLM.save_pretrained, PaLM.push_to_hub, from_pretrained):
        assert inspect.getdoc(method) and len(inspect.signature(method).parameters) > 1


# ------------------------------------------------------------------------------------------------ bad input


def test_a_flipped_bit(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert safetensors.torch.load_file(path)  # which sees nothing
    with pytest.raises(
        ValueError, match=r"model.safetensors: is damaged: its SHA-256 is not the one in config.json"
    ):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.99])
def test_a_truncated_file(kept: float, tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    with pytest.raises(ValueError, match=r"model.safetensors: is damaged"):
        from_pretrained(tmp_path)


def test_half_a_model(tmp_path: Path) -> None:
    saved(tmp_path / "missing", kind=LaMDA)
    (tmp_path / "missing" / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model.safetensors: expected the weights that config.json lists"
    ):
        from_pretrained(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"expected a saved model with a config.json, got none"):
        from_pretrained(tmp_path)
    build().save_pretrained(tmp_path / "shards", max_shard_size=10_000)
    config = json.loads((tmp_path / "shards" / "config.json").read_text())
    first, *_ = config["sha256"]
    del config["sha256"][first]
    edit_config(tmp_path / "shards", **config)
    with pytest.raises(ValueError, match=r"lacks tensors of its config: token_emb.weight"):
        from_pretrained(tmp_path / "shards")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"heads": 5},
            r"layers.0.attn_out.weight: the shapes differ: \(24, 80\) by its config, \(24, 48\) in ",
        ),
        (
            {"num_tokens": 38},
            r"token_emb.weight: the shapes differ: \(38, 24\) by its config, \(37, 24\) in ",
        ),
        ({"depth": 3}, r"lacks tensors of its config: layers.2.norm.weight"),
        ({"depth": 1}, r"holds tensors that its config has no place for: layers.1"),
        ({"tie_embeddings": False}, r"lacks tensors of its config: to_logits.weight"),
        ({"norm": "batchnorm"}, r"norm: expected one of"),
        ({"hedas": 3}, r"config: PaLM takes no hedas; it takes num_tokens, dim"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = saved(tmp_path)
    with pytest.raises(ValueError, match=says):
        from_pretrained(tmp_path, **change)
    edit_config(tmp_path, config=model.config | change)
    with pytest.raises(ValueError, match=says):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "GPT"},
        {"model": ["PaLM"]},
        {"config": None},
        {"sha256": {}},
        {"sha256": None},
        {"sha256": {"../model.safetensors": "0"}},
    ],
    ids=str,
)
def test_a_config_that_is_not_ours(change: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=r"config.json: expected what `save_pretrained` writes"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "tied",
    [
        {"to_logits.weight": "norm.weight"},
        {"to_logits.weight": "nowhere.weight"},
        {"nowhere.weight": "token_emb.weight"},
        {"to_logits.weight": "token_emb.weight", "token_emb.weight": "to_logits.weight"},
    ],
    ids=str,
)
def test_ties_that_cannot_be(tied: dict[str, str], tmp_path: Path) -> None:
    saved(tmp_path, tie_embeddings=False)
    edit_config(tmp_path, tied=tied)
    with pytest.raises(ValueError, match=r"cannot be tied to .* in such a model"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{}", "\x00"])
def test_a_config_that_is_no_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json: expected what `save_pretrained` writes"):
        from_pretrained(tmp_path)


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    edit_config(tmp_path, sha256={"model.safetensors": hashlib.sha256(b"x" * 100).hexdigest()})
    with pytest.raises(ValueError, match=r"model.safetensors: expected safetensors, and cannot be read"):
        from_pretrained(tmp_path)


def test_another_class(tmp_path: Path) -> None:
    saved(tmp_path, kind=LaMDA)
    with pytest.raises(ValueError, match="expected a PaLM, got a LaMDA"):
        PaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("path", ["no/such/folder", "no such", "/nowhere", Path("nowhere")], ids=repr)
def test_no_folder(path: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder, or the id of a model on the hub, got "):
        from_pretrained(path)


def test_a_file(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "older.pt")
    with pytest.raises(FileNotFoundError, match=r"`load_reference` reads files"):
        from_pretrained(str(tmp_path / "older.pt"))


@pytest.mark.parametrize("dtype", ["float32", torch.int32])
def test_no_dtype(dtype: Any, tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(TypeError, match=r"dtype: expected a floating-point torch.dtype, got "):
        from_pretrained(tmp_path, dtype=dtype)


def test_no_path() -> None:
    with pytest.raises(TypeError, match="folder_or_hub_id: expected a path or a string, got 3"):
        from_pretrained(3)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- interruptions


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, text = saved(tmp_path).eval(), tokens()
    (tmp_path / "notes.txt").write_text("mine")
    written = []

    def full_disk(tensors: Any, path: Path, **options: Any) -> None:
        if written:
            raise OSError("No space left on device")
        written.append(path)
        path.write_bytes(b"half")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        build().save_pretrained(tmp_path, max_shard_size=10_000)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", "notes.txt"}
    assert torch.equal(from_pretrained(tmp_path)(text), before(text))


def test_a_save_that_is_killed_is_never_taken_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the renames of two files there is a moment; what it leaves is refused."""
    whole, over = tmp_path / "new", tmp_path / "old"
    saved(over)
    model = build()
    rename = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if self.name == "config.json":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    for folder in (whole, over):
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"expected a saved model with a config.json"):
        from_pretrained(whole)
    with pytest.raises(ValueError, match="SHA-256"):
        from_pretrained(over)
    monkeypatch.undo()
    model.save_pretrained(over)
    from_pretrained(over)
