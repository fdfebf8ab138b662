"""A folder's manifest: the size and the SHA-256 of each of its files, so that damage does not pass for data.

One flipped byte loads silently in torch's own reader and in safetensors'.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from palm_pytorch.data.durable import file_digest, sync, write_json

FILE = "manifest.json"


class DamagedError(ValueError):
    """A file is missing, cut short or changed."""


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """Make every file of `folder` durable, and then the manifest, which has `about` for people too.

    Raises:
        OSError: a file could not be read or written.
    """
    files = {}
    for path in sorted(path for path in folder.iterdir() if path.name != FILE):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": file_digest(path).hexdigest()}
    content = {**about, "files": files}
    write_json(folder / FILE, {**content, "sha256": digest_json(content)})


def check_manifest(folder: Path) -> None:
    """Compare every file of `folder` with its manifest.

    Raises:
        DamagedError: one differs, or the manifest itself is missing or damaged. The message names it.
    """
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if content.pop("sha256") != digest_json(content):
            raise ValueError("it is not what was written")
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in content["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder / FILE} is missing or damaged ({error})") from error
    for name, (size, _) in expected.items():  # quick ones first
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path} is missing")
        if path.stat().st_size != size:
            raise DamagedError(f"{path} is damaged: {path.stat().st_size:,} bytes, expected {size:,}")
    for name, (_, expected_sum) in expected.items():
        if file_digest(folder / name).hexdigest() != expected_sum:
            raise DamagedError(f"{folder / name} is damaged: its SHA-256 is not that of the manifest")


def digest_json(content: dict[str, Any]) -> str:
    """The SHA-256 of plain values, however a file spaces them."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
