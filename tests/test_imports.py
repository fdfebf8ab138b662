"""The package's layout: which part may import which, what importing it loads, how files are named."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import palm_pytorch

ROOT = Path(palm_pytorch.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# Each part may import itself and those of a lower rank. "" is the package's own `__init__`, which names what
# stands below it.
RANKS = {
    "version": 0,
    "ops": 0,
    "data": 0,
    "layers": 1,
    "models": 2,
    "generation": 3,
    "checkpoints": 3,
    "": 4,
    "training": 5,
    "cli": 6,
}
LIGHT = {"palm_pytorch", "torch", "einops", "numpy"}


def part(module: str) -> str:
    """`palm_pytorch.ops.attention` belongs to "ops"."""
    return [*module.split("."), ""][1]


def module_of(file: Path) -> str:
    names = ["palm_pytorch", *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module imported in the tree; `from package import module` counts as that module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            in_package = source == "palm_pytorch"
            names = (f"{source}.{alias.name}" for alias in node.names)
            yield from (n if in_package and part(n) in RANKS else source for n in names)


def at_import(file: Path) -> Iterator[str]:
    """What the file imports when it is imported: not inside functions, nor for type checkers alone."""
    tree = ast.parse(file.read_text())
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            node.body = []
    yield from imports(
        tree, module_of(file) if file.name == "__init__.py" else module_of(file).rpartition(".")[0]
    )


def test_the_rules_see_what_they_should() -> None:
    code = "import a.b\nfrom .. import c\nfrom .d import e\nfrom palm_pytorch import training, PaLM\n"
    found = list(imports(ast.parse(code), "palm_pytorch.ops"))
    assert found == ["a.b", "palm_pytorch", "palm_pytorch.ops.d", "palm_pytorch.training", "palm_pytorch"]
    assert {part(module_of(file)) for file in FILES} <= set(RANKS), "a part of the package without a rank"


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_arrows_point_one_way(file: Path) -> None:
    """ops <- layers <- models <- {generation, checkpoints} <- training <- cli; data <- training"""
    own = part(module_of(file))
    package = module_of(file) if file.name == "__init__.py" else module_of(file).rpartition(".")[0]
    for name in imports(ast.parse(file.read_text()), package):
        if name.split(".")[0] == "palm_pytorch":
            assert part(name) == own or RANKS[part(name)] < RANKS[own], name


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_other_packages_are_imported_where_they_are_used(file: Path) -> None:
    if part(module_of(file)) in ("data", "training", "cli"):
        return
    for name in at_import(file):
        top = name.split(".")[0]
        if top == "triton":
            assert "triton_kernels" in file.parts or file.name == "triton_op.py"
        else:
            assert top in LIGHT | sys.stdlib_module_names, name


def test_importing_the_package_loads_torch_einops_and_numpy_only() -> None:
    code = """
import json, sys, torch, einops, numpy
before = set(sys.modules)
import palm_pytorch
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert set(json.loads(run.stdout)) - sys.stdlib_module_names == {"palm_pytorch"}
    assert run.stderr == ""


def test_no_basement() -> None:
    names = {part for file in FILES for part in file.relative_to(ROOT).with_suffix("").parts}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc"}


@pytest.mark.parametrize("name", ["palm", "palm_lite", "lamda", "perceiver_ar"])
def test_models_are_read_in_five_minutes(name: str) -> None:
    assert len((ROOT / "models" / f"{name}.py").read_text().splitlines()) < 200


def test_public_names() -> None:
    models = {"PaLM", "PaLMLite", "LaMDA", "PerceiverAR", "AutoregressiveWrapper", "preset"}
    assert models | {"from_pretrained", "load_reference"} <= set(palm_pytorch.__all__)
    assert all(hasattr(palm_pytorch, name) for name in palm_pytorch.__all__)
    assert (ROOT / "py.typed").exists()
