"""What is written is whole or absent, whatever happens to the disk, the network or the process."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import lzma
import os
import socket
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from palm_pytorch.data import streams
from palm_pytorch.data.streams import Expected, compression, download, list_files, publish, read_files

TEXT = b"".join(b"line %d of a text that compresses, but not to nothing\n" % i for i in range(4_000))


def zipped(path: Path, text: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text", text)


def zstandard_file(path: Path, text: bytes) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(text))


WRITERS: dict[str, Callable[[Path, bytes], object]] = {
    "": Path.write_bytes,
    ".gz": lambda path, text: path.write_bytes(gzip.compress(text)),
    ".bz2": lambda path, text: path.write_bytes(bz2.compress(text)),
    ".xz": lambda path, text: path.write_bytes(lzma.compress(text)),
    ".zip": zipped,
    ".zst": zstandard_file,
}
compressed = pytest.mark.parametrize("suffix", [suffix for suffix in WRITERS if suffix])


@pytest.mark.parametrize("suffix", WRITERS)
def test_reads_every_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text{suffix}"
    WRITERS[suffix](path, TEXT)
    assert compression(path) == suffix
    assert b"".join(read_files([path, path])) == TEXT + TEXT


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_reads_files_of_several_parts(tmp_path: Path, suffix: str) -> None:
    """All of these formats allow files to be simply joined, and tools do so."""
    path = tmp_path / f"text{suffix}"
    WRITERS[suffix](path, TEXT)
    path.write_bytes(path.read_bytes() * 2)
    assert b"".join(read_files([path])) == TEXT + TEXT


@compressed
def test_knows_compressed_bytes_without_their_suffix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "text"
    WRITERS[suffix](path, TEXT)
    assert b"".join(read_files([path])) == TEXT


@pytest.mark.parametrize("text", [b"BZh", b"BZh is short for bzip", b"BZh0", b""])
def test_a_text_may_begin_as_bzip2_does(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "text").write_bytes(text)
    assert b"".join(read_files([tmp_path / "text"])) == text


@compressed
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_refuses_what_is_cut_short(tmp_path: Path, suffix: str, share: float) -> None:
    """zstandard's stream reader, for one, returns the part before the cut as if it were all."""
    path = tmp_path / f"text{suffix}"
    WRITERS[suffix](path, TEXT)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=f"text{suffix}"):
        list(read_files([path]))


@compressed
def test_refuses_a_flipped_bit(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text{suffix}"
    WRITERS[suffix](path, TEXT)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"text{suffix}"):
        list(read_files([path]))


def test_refuses_a_zip_whose_checksum_is_wrong(tmp_path: Path) -> None:
    """Stored, not deflated, so that nothing but the checksum tells."""
    path = tmp_path / "text.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("text", TEXT)
    path.write_bytes(path.read_bytes().replace(b"line 7 of", b"line 8 of"))
    with pytest.raises(ValueError, match=r"text\.zip.*CRC"):
        list(read_files([path]))


def test_refuses_a_zip_with_a_password(tmp_path: Path) -> None:
    path = tmp_path / "text.zip"
    zipped(path, TEXT)
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    locked = bytearray(path.read_bytes())
    locked[6] |= 1  # the "encrypted" flag, of the file and in the directory
    locked[directory + 8] |= 1
    path.write_bytes(locked)
    with pytest.raises(ValueError, match=r"text\.zip.*password"):
        list(read_files([path]))


@compressed
def test_refuses_text_that_is_called_compressed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text{suffix.upper()}"
    path.write_bytes(TEXT)
    with pytest.raises(ValueError, match=f"not a {suffix} file"):
        list(read_files([path]))


def test_reads_a_zip_in_the_order_of_its_names(tmp_path: Path) -> None:
    path = tmp_path / "texts.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("b.txt", "a/", "a/2", "a/1", ".hidden", "a/.hidden/1", "__MACOSX/a"):
            archive.writestr(name, "" if name.endswith("/") else f"[{name}]")
    assert b"".join(read_files([path])) == b"[a/1][a/2][b.txt]"


def test_says_what_to_install_for_zst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    for module in ("zstandard", "compression.zstd"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"text\.zst.*pip install zstandard"):
        list(read_files([path]))


@pytest.mark.parametrize("suffix", [suffix for suffix in WRITERS if suffix != ".bz2"])  # too slow to write
def test_memory_is_bounded(tmp_path: Path, suffix: str) -> None:
    source, target = tmp_path / f"text{suffix}", tmp_path / "copy"
    text = os.urandom(1 << 16) * 512  # 32 MiB that compress to little
    WRITERS[suffix](source, text)
    tracemalloc.start()
    try:
        publish(read_files([source]), target)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(text).digest()
    assert peak < 12 << 20  # xz alone takes 8 MiB, its dictionary


def test_lists_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a/z", "a/y/x", "a.txt", ".git/config", "a/.cache/x", "skipped/x", "A"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path, leave_out={"skipped"})]
    assert found == ["A", "a/y/x", "a/z", "a.txt", "b"]
    assert list_files(tmp_path / "b") == [tmp_path / "b"]


def test_lists_no_pipes_devices_and_dead_links(tmp_path: Path) -> None:
    """Opening a pipe waits for its other end, and /dev/zero has no end."""
    with pytest.raises(ValueError, match="/dev/zero"):
        list_files(Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe"):
        list_files(tmp_path)
    (tmp_path / "pipe").unlink()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="link"):
        list_files(tmp_path)


EXPECTED = Expected(len(TEXT), hashlib.sha256(TEXT).hexdigest())


def test_publishes_what_is_expected(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "text"
    publish([TEXT[:1000], b"", TEXT[1000:]], target, EXPECTED)
    assert list(target.parent.iterdir()) == [target]
    assert target.read_bytes() == TEXT


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (TEXT[:-1], rf"{len(TEXT) - 1:,} bytes, expected {len(TEXT):,}"),
        (b"", "0 bytes, expected"),
        (TEXT + b"x", "more than"),
        (TEXT[:-1] + b"x", "sha256"),
    ],
)
def test_publishes_nothing_else(tmp_path: Path, wrong: bytes, complaint: str) -> None:
    target = tmp_path / "text"
    with pytest.raises(ValueError, match=complaint):
        publish([wrong], target, EXPECTED)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error"), SystemExit])
def test_publishes_no_part(tmp_path: Path, failure: BaseException | type[BaseException]) -> None:
    def chunks() -> Iterator[bytes]:
        yield TEXT
        raise failure

    target = tmp_path / "text"
    target.write_bytes(b"from before")
    with pytest.raises(failure if isinstance(failure, type) else type(failure)):
        publish(chunks(), target)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"from before"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args: real_open(Path("/dev/full"), "wb"))
    with pytest.raises(OSError, match=r"No space left on device: '.*text'"):
        publish([TEXT], tmp_path / "text")


def test_removes_what_killed_processes_left(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (".text.1.partial", ".text.2.partial", ".texts.1.partial"))
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 4000,) * 2)
    publish([TEXT], tmp_path / "text")
    assert set(tmp_path.iterdir()) == {new, other, tmp_path / "text"}


@pytest.fixture
def silent_address() -> Iterator[str]:
    """An address that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/text"


def test_a_silent_address_is_given_up(silent_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CONNECT_SECONDS", 0.2)
    with pytest.raises(TimeoutError, match=r"0\.2 seconds"):
        list(download(silent_address, 1))


def test_an_endless_name_look_up_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(2))
    with pytest.raises(TimeoutError, match=r"0\.2 seconds"):
        list(download("http://localhost/text", 1))
