"""Streams of bytes, from files, archives and addresses, into files that are whole or absent."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import queue
import re
import stat
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.request import Request, urlopen
from uuid import uuid4

from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

# A file's first bytes decide, not its name: compressed bytes that lost their suffix must not pass for text.
MAGIC = {
    ".gz": rb"\x1f\x8b",
    ".bz2": rb"BZh[1-9]",  # a text may well begin with the letters alone
    ".xz": rb"\xfd7zXZ\0",
    ".zip": rb"PK\x03\x04",
    ".zst": rb"\x28\xb5\x2f\xfd",
}
MAGIC_BYTES = 6  # of the longest
CHUNK = 1 << 16
CONNECT_SECONDS = 6  # for an address to answer, name look-up included
STALL_SECONDS = 20  # without a byte, after which a download that had begun is given up
ABANDONED_SECONDS = 3600  # without a byte, after which a half-written file is nobody's


@dataclass(frozen=True)
class Expected:
    """What a file must hold: its length in bytes and its SHA-256 in hexadecimal, if that is known."""

    size: int
    sha256: str | None = None


def list_files(source: Path, leave_out: Collection[str] = ()) -> list[Path]:
    """`source` itself, or all files of a folder, sorted by path.

    Passed over are hidden files and folders, folders named in `leave_out`, and links to folders, which may
    lead in circles.

    Raises:
        OSError: something cannot be listed, or is a link to nowhere.
        ValueError: something is a device, a pipe or a socket, which may never end.
    """

    def fail(error: OSError) -> None:
        raise error

    paths = [source]
    if source.is_dir():
        paths = []
        for folder, subfolders, names in os.walk(source, onerror=fail):
            subfolders[:] = [
                name for name in subfolders if not name.startswith(".") and name not in leave_out
            ]
            paths += [Path(folder, name) for name in names if not name.startswith(".")]
    for path in paths:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} is not an ordinary file, but a device, a pipe or a socket")
    return sorted(paths, key=lambda path: path.relative_to(source).parts)


def compression(path: Path) -> str:
    """The suffix in `MAGIC` that stands for how a file is compressed, or "" if it is not.

    Raises:
        ValueError: the file's own suffix says otherwise.
    """
    with path.open("rb") as file:
        head = file.read(MAGIC_BYTES)
    kind = next((suffix for suffix, magic in MAGIC.items() if re.match(magic, head)), "")
    named = path.suffix.lower()
    if named in MAGIC and named != kind:
        raise ValueError(f"{path} is damaged or not a {named} file: it begins with {head!r}")
    return kind


def read_files(paths: list[Path], *, show: bool = True) -> Generator[bytes, None, None]:
    """The plain bytes of files, one file after the other, in chunks; `show` draws one progress bar.

    Raises:
        ValueError: a file is damaged or cut short.
        ModuleNotFoundError: a `.zst` file, and nothing is installed that reads it.
        OSError: a file cannot be read. Every message names the file.
    """
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, desc="reading", unit="B", unit_scale=True, leave=False, disable=not show) as bar:
        for path in paths:
            try:
                kind = compression(path)
                with path.open("rb") as file:
                    yield from _decompress(CallbackIOWrapper(bar.update, file, "read"), kind)
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    f"{path} can be read with zstandard only: pip install zstandard"
                ) from error
            except EOFError as error:
                raise ValueError(f"{path} is cut short: {error}") from error
            except OSError as error:
                if error.errno is None:  # how gzip and bz2 report bad data
                    raise ValueError(f"{path} is damaged: {error}") from error
                error.filename = error.filename or str(path)
                raise
            # RuntimeError: a zip archive with a password; NotImplementedError: one in an uncommon compression
            except (
                zlib.error,
                lzma.LZMAError,
                zipfile.BadZipFile,
                RuntimeError,
                NotImplementedError,
            ) as error:
                raise ValueError(f"{path} is damaged or cannot be unpacked: {error}") from error


def download(url: str, size: int) -> Iterator[bytes]:
    """The bytes at an address, in chunks, under a progress bar that expects `size` of them.

    Raises:
        OSError, http.client.HTTPException: it does not answer, refuses, or goes silent.
    """
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def connect() -> None:
        try:
            answers.put(urlopen(Request(url, headers={"User-Agent": "palm_pytorch"}), timeout=STALL_SECONDS))
        except Exception as error:
            answers.put(error)

    # In a thread, because looking up a name has no time-out of its own, and takes a minute on some networks.
    threading.Thread(target=connect, daemon=True).start()
    try:
        answer = answers.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {CONNECT_SECONDS} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    with answer, tqdm(total=size, desc=url, unit="B", unit_scale=True, leave=False) as bar:
        while chunk := answer.read(CHUNK):
            bar.update(len(chunk))
            yield chunk


def publish(chunks: Iterable[bytes], target: Path, expected: Expected | None = None) -> None:
    """Writes `chunks` to the file `target`: whole, on the disk and as `expected`, or not at all.

    Raises:
        ValueError: the bytes are not the expected ones.
        OSError: `target` cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    partial = target.with_name(f".{target.name}.{uuid4().hex}.partial")
    digest, size = hashlib.sha256(), 0
    try:
        with partial.open("xb") as file:
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
                if expected and size > expected.size:
                    raise ValueError(f"more than the expected {expected.size:,} bytes")
            file.flush()
            os.fsync(file.fileno())
        if expected and size != expected.size:
            raise ValueError(f"{size:,} bytes, expected {expected.size:,}")
        if expected and expected.sha256 and digest.hexdigest() != expected.sha256:
            raise ValueError(f"its sha256 is {digest.hexdigest()}, expected {expected.sha256}")
        partial.replace(target)
    except OSError as error:
        if error.errno is not None:  # a write to a full disk names no file by itself
            error.filename = error.filename or str(target)
        raise
    finally:
        partial.unlink(missing_ok=True)


def _remove_abandoned(target: Path) -> None:
    """Removes what processes that were killed outright had written of `target`."""
    for path in target.parent.iterdir():
        if path.name.startswith(f".{target.name}.") and path.suffix == ".partial":
            with suppress(FileNotFoundError):  # another process removed or published it
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()


def _decompress(file: IO[bytes], kind: str) -> Iterator[bytes]:
    if kind == ".zst":
        yield from _decompress_zstd(file)
    elif kind == ".zip":
        with zipfile.ZipFile(file) as archive:
            for name in sorted(archive.namelist()):
                hidden = any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)
                if not hidden and not name.endswith("/"):
                    with archive.open(name) as member:
                        yield from iter(lambda: member.read(CHUNK), b"")
    else:
        openers: dict[str, Any] = {
            "": lambda plain: plain,
            ".gz": gzip.open,
            ".bz2": bz2.open,
            ".xz": lzma.open,
        }
        opened = openers[kind](file)
        yield from iter(lambda: opened.read(CHUNK), b"")


def _decompress_zstd(file: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame, because zstandard's own file reader takes a file that is cut short for a whole one."""
    new_frame: Any
    failure: type[Exception]
    if sys.version_info >= (3, 14):
        from compression import zstd

        new_frame, failure = zstd.ZstdDecompressor, zstd.ZstdError
    else:
        import zstandard

        new_frame, failure = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
    frame = None
    # In small pieces: what a piece unpacks to is in memory all at once, and may be 32,768 times as long.
    while piece := file.read(1 << 12):
        while piece:
            frame = frame or new_frame()
            try:
                yield frame.decompress(piece)
            except failure as error:
                raise RuntimeError(str(error)) from error
            piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("its last frame has no end")
