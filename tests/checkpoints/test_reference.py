"""Weights of the older projects compute here what their own code computed; what is not whole is refused."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from definitions import error
from goldens import FOLDER, Golden, golden
from safetensors.torch import save_file
from torch import Tensor

from palm_pytorch import LaMDA, PaLM, PaLMLite, PerceiverAR, load_reference, preset
from palm_pytorch.checkpoints.reference import LAYOUTS
from palm_pytorch.checkpoints.reference.sequential import dim_head_of
from palm_pytorch.models.language_model import LanguageModel

PERCEIVER = {"cross_attn_seq_len": 25, "dim_head": 36}
FLAX = FOLDER / "palm_flax.msgpack"
# The golden, the class it is, and what its tensors do not tell.
CASES: dict[str, tuple[type[LanguageModel], dict[str, Any]]] = {
    "palm_pytorch": (PaLM, {}),
    "palm_lite": (PaLMLite, {}),
    "palm_rlhf_0_2_1": (PaLM, {}),
    "palm_rlhf_qk_norm": (PaLM, {}),
    "palm_rlhf_0_2_4": (PaLM, {}),
    "palm_rlhf_0_2_0": (PaLM, {}),
    "palm_rlhf_qk_scale": (PaLM, {"qk_scale": 8, "final_norm": False}),
    "lamda": (LaMDA, {}),
    "perceiver_ar": (PerceiverAR, PERCEIVER),
    "perceiver_ar_masked": (PerceiverAR, PERCEIVER),
    "palm_flax": (PaLM, {}),
}


def source_of(name: str, older: Golden) -> dict[str, Tensor] | Path:
    return FLAX if name == "palm_flax" else older.state


def ours_of(older: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by our names. A wrong table would show in the logits."""
    return next(layout for layout in LAYOUTS if layout.fits(older)).convert(older)


# --------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_the_older_code(name: str) -> None:
    older, (kind, given) = golden(name), CASES[name]
    model = load_reference(source_of(name, older), **given)
    assert type(model) is kind and not model.training
    assert older.config.items() <= model.config.items()

    logits = model(older.tokens, **older.inputs)
    assert logits.dtype == torch.float32
    assert error(logits, older.logits) <= 1e-5
    assert (logits - older.logits).abs().max() <= 1e-5 * older.logits.abs().max()

    model(older.tokens, labels=older.labels, **older.inputs).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    prefix = "params/" if name == "palm_flax" else ""
    wanted = (
        ours_of({k.removeprefix(prefix): g for k, g in older.gradients.items()}) if older.gradients else {}
    )
    assert wanted.keys() == found.keys() or not wanted
    for name, gradient in wanted.items():
        assert error(found[name], gradient) <= 1e-4, name


def test_every_golden_is_used() -> None:
    assert {file.stem for file in FOLDER.glob("*.safetensors")} == {*CASES}


def test_a_model_of_its_own(tmp_path: Path) -> None:
    """Training it leaves the older weights alone."""
    older = golden("perceiver_ar")
    before = copy.deepcopy(older.state)
    model = load_reference(older.state, **PERCEIVER)
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.is_contiguous() and parameter.requires_grad
            parameter.zero_()
    assert all(torch.equal(older.state[name], tensor) for name, tensor in before.items())
    model.save_pretrained(tmp_path)  # no two of them share memory


def test_dtype_is_kept_or_chosen() -> None:
    half = {name: tensor.half() for name, tensor in golden("palm_pytorch").state.items()}
    assert {p.dtype for p in load_reference(half).parameters()} == {torch.float16}
    assert {p.dtype for p in load_reference(half, dtype=torch.float32).parameters()} == {torch.float32}


# --------------------------------------------------------------------------------------- where they come from


def prefixed(*prefixes: str) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    return lambda state: {"".join(prefixes) + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        prefixed("net."),
        prefixed("module.", "net."),
        prefixed("_orig_mod.", "module."),
        prefixed("net.", "_orig_mod."),
        lambda state: {"model": prefixed("module.")(state), "step": 3, "optimizer": {}},
        lambda state: {"state_dict": state},
        lambda state: {name: tensor.numpy() for name, tensor in state.items()},
        lambda state: {
            name: tensor for name, tensor in state.items() if "beta" not in name and "inv" not in name
        },
        lambda state: {**state, "4.weight": state["0.weight"]},
    ],
    ids=[
        "wrapper",
        "parallel",
        "compiled",
        "compiled inside",
        "training",
        "nested",
        "arrays",
        "bare",
        "with head",
    ],
)
def test_wrappers_are_seen_through(wrap: Callable[[dict[str, Tensor]], dict[str, Any]]) -> None:
    older = golden("palm_pytorch")
    assert error(load_reference(wrap(older.state))(older.tokens), older.logits) <= 1e-5


def legacy(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


FILES: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "weights.pt": torch.save,
    "weights": torch.save,
    "old.pth": legacy,
    "weights.safetensors": lambda state, path: save_file(state, path),
    "weights.npz": lambda state, path: np.savez(path, **{name: t.numpy() for name, t in state.items()}),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("as_string", [True, False])
def test_files(file: str, as_string: bool, tmp_path: Path) -> None:
    older = golden("palm_lite")
    FILES[file](older.state, tmp_path / file)
    model = load_reference(str(tmp_path / file) if as_string else tmp_path / file)
    assert error(model(older.tokens), older.logits) <= 1e-5


def flax_tree() -> dict[str, Any]:
    """Parameters as nested arrays of NumPy, from our reader's flat ones."""
    from palm_pytorch.checkpoints.reference.source import read_tensors

    tree: dict[str, Any] = {}
    for name, tensor in read_tensors(FLAX).items():
        *above, last = ["params", *name.split("/")]
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = tensor.numpy()
    return tree


@pytest.mark.parametrize("params", [True, False])
def test_flax_parameters_as_a_tree_or_flat(params: bool, tmp_path: Path) -> None:
    older, tree = golden("palm_flax"), flax_tree()
    assert error(load_reference(tree if params else tree["params"])(older.tokens), older.logits) <= 1e-5
    flat = {name: tensor.numpy() for name, tensor in older_names(tree).items()}
    np.savez(tmp_path / "flat.npz", **flat)
    assert error(load_reference(tmp_path / "flat.npz")(older.tokens), older.logits) <= 1e-5


def older_names(tree: dict[str, Any], above: str = "") -> dict[str, Tensor]:
    names: dict[str, Tensor] = {}
    for name, value in tree.items():
        path = f"{above}{name}"
        names |= (
            older_names(value, path + "/") if isinstance(value, dict) else {path: torch.from_numpy(value)}
        )
    return names


def test_flax_arrays_in_chunks_and_in_bfloat16() -> None:
    """The same weights, which bfloat16 has, as flax writes arrays that are too large for one piece."""
    whole, chunked = load_reference(FLAX), load_reference(FOLDER / "palm_flax_bf16_in_chunks.msgpack")
    for (name, a), b in zip(whole.named_parameters(), chunked.parameters(), strict=True):
        assert b.dtype == torch.bfloat16 and torch.equal(a, b.float()), name


# ------------------------------------------------------------------------------- what tensors do not tell


def test_gains_that_could_be_either_are_asked_for() -> None:
    state = golden("palm_rlhf_0_2_1").state
    unclear = {name: t * 0.4 if name.endswith("gamma") else t for name, t in state.items()}
    with pytest.raises(ValueError, match=r"gain: expected it to be given.*'gamma'.*'gamma\+1'"):
        load_reference(unclear)
    one, two = (load_reference(unclear, gain=gain) for gain in ("gamma", "gamma+1"))
    assert torch.equal(one.norm.weight + 1, two.norm.weight)
    assert torch.equal(one.norm.weight, unclear["norm.gamma"])
    with pytest.raises(ValueError, match=r"gain: expected one of .*, got 'weight'"):
        load_reference(unclear, gain="weight")


def test_fresh_gains_are_told_apart() -> None:
    state = golden("palm_rlhf_0_2_1").state
    for value in (0.0, 1.0):
        fresh = {name: torch.full_like(t, value) if "gamma" in name else t for name, t in state.items()}
        model = load_reference(fresh)
        assert (model.norm.weight == 1).all() and model.config["final_norm"]


def test_a_last_norm_that_was_never_trained_is_skipped() -> None:
    """Up to PaLM-rlhf-pytorch 0.2.0 logits came from the stream before it; the user may know better."""
    state = golden("palm_rlhf_0_2_0").state
    assert not load_reference(state).config["final_norm"]
    assert load_reference(state, final_norm=True).config["final_norm"]
    assert load_reference(golden("palm_rlhf_0_2_1").state).config["final_norm"]


@pytest.mark.parametrize("name", ["palm_pytorch", "palm_rlhf_0_2_1", "perceiver_ar"])
def test_the_default_device_does_not_matter(name: str) -> None:
    older = golden(name)
    with torch.device("meta"):
        model = load_reference(older.state, **CASES[name][1], device="cpu")
    assert error(model(older.tokens), older.logits) <= 1e-5


def test_xpos_is_asked_for_without_the_buffers() -> None:
    older = golden("palm_rlhf_0_2_1")
    bare = {name: tensor for name, tensor in older.state.items() if "rotary" not in name}
    with pytest.raises(ValueError, match="xpos: expected it to be given"):
        load_reference(bare)
    assert error(load_reference(bare, xpos=True)(older.tokens), older.logits) <= 1e-5
    early = {name: tensor for name, tensor in older.state.items() if not name.endswith("rotary_emb.scale")}
    assert not load_reference(early).config["xpos"]
    assert load_reference(older.state, xpos_scale_base=256).config["xpos_scale_base"] == 256


def test_a_perceiver_needs_its_prefix_and_sometimes_its_heads() -> None:
    state = golden("perceiver_ar").state
    with pytest.raises(ValueError, match="cross_attn_seq_len: expected it to be given"):
        load_reference(state, dim_head=36)
    with pytest.raises(ValueError, match=r"dim_head: expected it to be given.*108 wide.*\[36, 54\]"):
        load_reference(state, cross_attn_seq_len=25)
    with pytest.raises(ValueError, match=r"dim_head: expected one of \[36, 54\].*, got 27"):
        load_reference(state, cross_attn_seq_len=25, dim_head=27)


@pytest.mark.parametrize(
    ("h_d", "rotated", "d"), [(216, 36, 72), (512, 64, 128), (512, 32, None), (64, 32, None)]
)
def test_head_size_from_the_rotated_dims(h_d: int, rotated: int, d: int | None) -> None:
    inv_freq = 10000 ** (-torch.arange(0, rotated, 2) / rotated)
    if d:
        assert dim_head_of(h_d, inv_freq, {}) == d
    else:
        with pytest.raises(ValueError, match=r"dim_head: .*\[32, 64\]"):
            dim_head_of(h_d, inv_freq, {})


def test_other_arguments_of_the_constructor_are_taken() -> None:
    model = load_reference(golden("palm_pytorch").state, attn_dropout=0.1, attention_backend="reference")
    assert model.config["attn_dropout"] == 0.1 and model.config["attention_backend"] == "reference"


COUNTS = {"150m": 144_811_776, "410m": 410_149_888, "1b": 983_861_248, "2b": 2_157_836_800}


@pytest.mark.parametrize("size", COUNTS)
def test_public_checkpoints_have_the_published_counts(size: str) -> None:
    """Tensors of the names and shapes of the files, without memory."""
    shape = preset(f"palm-{size}")
    c, d, fused = shape["dim"], 128, 8 * 128 + 2 * 128 + 8 * shape["dim"]
    shapes: dict[str, tuple[int, ...]] = {"token_emb.weight": (50_304, c), "to_logits.weight": (50_304, c)}
    for i in range(shape["depth"]):
        block = f"layers.{i}.fn."
        shapes |= {block + "norm.gamma": (c,), block + "norm.beta": (c,)}
        shapes |= {block + "rotary_emb.inv_freq": (d // 2,), block + "rotary_emb.scale": (d // 2,)}
        shapes |= {block + "fused_attn_ff_proj.weight": (fused, c), block + "attn_out.weight": (c, 8 * d)}
        shapes |= {block + "ff_out.2.weight": (c, 4 * c)}
    shapes |= {"norm.gamma": (c,), "norm.beta": (c,)}
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    model = load_reference(state, gain="gamma", device="meta")
    assert shape.items() <= model.config.items()
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[size]


# ---------------------------------------------------------------------------------------------- bad input


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: t for name, t in state.items() if not name.startswith(names)}


def with_tensor(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {**state, name: tensor}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_tensor("5.weight", torch.ones(3)), r"holds tensors that PaLM-pytorch does not have: 5.weight"),
        (without("2.fn.attn_out"), r"lacks tensors of PaLM-pytorch: 2.fn.attn_out.weight"),
        (without("0.", "3."), r"lacks tensors of PaLM-pytorch: 0.weight, 3.gamma"),
        (without("2.", "3."), r"lacks tensors of PaLM-pytorch: 2.gamma"),
        (without("1."), r"lacks tensors of PaLM-pytorch: 1.fn.norm.gamma, 1.fn.fused.*"),
        (with_tensor("999999999.fn.norm.gamma", torch.ones(16)), r"lacks tensors of PaLM-pytorch: 3.fn.norm"),
        (
            with_tensor("0.weight", torch.ones(29, 16).int()),
            r"expected a floating-point dtype of 0.weight, got torch.int32",
        ),
        (with_tensor("0.weight", torch.ones(29)), r"token_emb.weight: expected a matrix, got shape \(29,\)"),
        (with_tensor("2.fn.norm.beta", torch.ones(16)), r"the buffer layers.1.beta is not what"),
        (with_tensor("1.fn.rotary_emb.inv_freq", torch.ones(4)), r"the buffer layers.0.inv_freq is not what"),
        (with_tensor("4.weight", torch.ones(29, 16)), r"the head is not the token embedding"),
        (with_tensor("4.weight", torch.ones(29, 17)), r"the head is not the token embedding"),
        (
            with_tensor("2.fn.attn_out.weight", torch.ones(16, 23)),
            r"layers.1.attn_out.weight: the shapes differ: \(16, 24\) by its config, \(16, 23\) in the PaLM",
        ),
        (
            with_tensor("1.fn.ff_out.1.weight", torch.ones(16, 33)),
            r"24, is no multiple of 7, so there is no heads",
        ),
        (
            with_tensor("1.fn.attn_out.weight", torch.ones(16)),
            r"attn_out.weight: expected a matrix, got shape \(16,\)",
        ),
        (with_tensor("2.fn.attn_out.weight", torch.ones(16)), r"attn_out.weight: the shapes differ"),
    ],
)
def test_tensors_that_are_not_the_format_s(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        load_reference(change(golden("palm_pytorch").state))


@pytest.mark.parametrize("name", ["heads", "dim_head", "dim", "depth", "num_tokens", "ff_mult"])
@pytest.mark.parametrize("case", ["palm_pytorch", "palm_lite", "lamda"])
def test_a_size_that_is_not_so(case: str, name: str) -> None:
    older = golden(case)
    right = older.config[name]
    load_reference(older.state, **{name: right})
    with pytest.raises(ValueError, match=f"{name}: expected {right}, .* got {right + 1}"):
        load_reference(older.state, **{name: right + 1})


def test_an_argument_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="config: PaLM takes no gain; it takes num_tokens"):
        load_reference(golden("palm_pytorch").state, gain="gamma")
    with pytest.raises(ValueError, match=r"qk_scale: expected None, .* no query-key norm"):
        load_reference(golden("palm_rlhf_0_2_1").state, qk_scale=8)


@pytest.mark.parametrize(
    ("source", "raised", "says"),
    [
        ({}, ValueError, "expected the tensors of PaLM-pytorch, .*, got none"),
        ({"weight": torch.ones(2)}, ValueError, "expected the tensors of .* PaLM-flax, got weight"),
        ({"0.fn.norm.gamma": torch.ones(2)}, ValueError, "lacks tensors of PaLM-pytorch: 0.weight, 1"),
        ({"1.fn.norm.gamma": "ones"}, TypeError, "expected tensors only, got a str for '1.fn.norm.gamma'"),
        ({"a": np.array(["x"])}, ValueError, "expected numbers for 'a', got dtype <U1"),
        (torch.ones(2), TypeError, "expected a path or names and tensors, got Tensor"),
        (None, TypeError, "got NoneType"),
        ("nowhere.pt", FileNotFoundError, "expected a file, and 'nowhere.pt' is none"),
    ],
)
def test_what_holds_no_weights(source: Any, raised: type[Exception], says: str) -> None:
    with pytest.raises(raised, match=says):
        load_reference(source)


@pytest.mark.parametrize("file", [*FILES, "weights.msgpack"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_truncated_files(file: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / file
    if file.endswith("msgpack"):
        path.write_bytes(FLAX.read_bytes())
    else:
        FILES[file](golden("palm_lite").state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    with pytest.raises(ValueError, match=f"{file}: is damaged"):
        load_reference(path)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("way", ["torch", "legacy", "pickle", "npz"])
def test_code_in_a_file_is_not_run(way: str, tmp_path: Path) -> None:
    path, made = tmp_path / ("weights.npz" if way == "npz" else "weights.pt"), tmp_path / "made"
    state = {**golden("palm_lite").state, "extra": Touch(made)}
    if way == "torch":
        torch.save(state, path)
    elif way == "legacy":
        legacy(state, path)
    elif way == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        np.savez(path, extra=np.array(Touch(made), dtype=object))
    with pytest.raises(ValueError, match="is damaged"):
        load_reference(path)
    assert not made.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (msgpack.packb([1, 2]), "expected names and tensors, got a list"),
        (msgpack.packb({"a": msgpack.ExtType(2, b"")}), "extension type 2"),
        (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[1], "float17", b"x"]))}), "got 'float17'"),
        (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[9], "float32", b"xxxx"]))}), "is damaged"),
        (msgpack.packb({"__msgpack_chunked_array__": True}), "is damaged"),
    ],
)
def test_msgpack_that_flax_does_not_write(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "weights.msgpack").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_reference(tmp_path / "weights.msgpack")
