"""Any damage to any file of a folder is noticed and named; a file is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from palm_pytorch.data.durable import write_durably
from palm_pytorch.training.manifest import DamagedError, check_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    made.mkdir()
    (made / "tensors").write_bytes(bytes(range(256)) * 5)
    (made / ".hidden").write_bytes(b"x")
    (made / "empty").write_bytes(b"")
    write_manifest(made, {"step": 12})
    return made


def test_what_is_as_it_was_written_passes(folder: Path) -> None:
    check_manifest(folder)
    (folder / "a file that came later").write_bytes(b"does not matter")
    check_manifest(folder)


@pytest.mark.parametrize("name", ["tensors", ".hidden", "manifest.json"])
def test_a_flipped_bit_anywhere_is_named(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for place in range(0, len(whole), 17):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        (folder / name).write_bytes(changed)
        with pytest.raises(DamagedError, match=f"/{name} is (missing or )?damaged"):
            check_manifest(folder)
    (folder / name).write_bytes(whole)
    check_manifest(folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tensors", r"tensors is damaged: 1,279 bytes, expected 1,280"),
        (".hidden", r"\.hidden is damaged: 0 bytes, expected 1"),
        ("manifest.json", r"manifest\.json is missing or damaged"),
    ],
)
def test_a_file_cut_short_is_named(folder: Path, name: str, says: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size - 1 - (name == "manifest.json"))
    with pytest.raises(DamagedError, match=says):
        check_manifest(folder)


@pytest.mark.parametrize("name", ["tensors", "empty", "manifest.json"])
def test_a_lost_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DamagedError, match=f"{name} is missing"):
        check_manifest(folder)


@pytest.mark.parametrize("content", ["", "[]", "3", '{"files": {}}', '{"files": 3, "sha256": "0"}', "\0"])
def test_a_manifest_that_is_something_else(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DamagedError, match=r"manifest\.json is missing or damaged"):
        check_manifest(folder)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_durably(tmp_path / "config", "old")

    def fail(descriptor: int) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_durably(tmp_path / "config", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
