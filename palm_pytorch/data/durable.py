"""Files that are whole after a crash at any moment, and what tells damaged ones."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any


def file_digest(path: Path, size: float = math.inf) -> Any:
    """The SHA-256 of a file, or of its first `size` bytes, to go on with."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(int(min(size, 1 << 20)))):
            digest.update(chunk)
            size -= len(chunk)
    return digest


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    if path.is_dir() and os.name != "posix":  # elsewhere folders cannot be opened, and need not be
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file that, after a crash at any moment, is the old one or the new one, and whole."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    write_durably(path, json.dumps(content, indent=indent) + "\n")
