"""Every kind of source, the download with all its accidents, and the corpus that is always there."""

from __future__ import annotations

import gzip
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from palm_pytorch.data import corpus as corpus_module
from palm_pytorch.data import streams
from palm_pytorch.data.corpus import ENWIK8, TEXT8, Published, find_or_download, fingerprint, open_corpus
from palm_pytorch.data.streams import Expected

TEXT = b"".join(b"line %d, which stands for some of Wikipedia\n" % i for i in range(20_000))


def expected(content: bytes) -> Expected:
    return Expected(len(content), hashlib.sha256(content).hexdigest())


@dataclass
class Mirrors:
    """A local server: `/good/text.zip` is whole, and other paths go wrong as their names say."""

    address: str
    archive: bytes
    requests: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def published(self, *kinds: str) -> Published:
        urls = tuple(f"{self.address}/{kind}/text.zip" for kind in kinds)
        return Published("text", urls, expected(self.archive), expected(TEXT))


@pytest.fixture
def mirrors(tmp_path: Path) -> Iterator[Mirrors]:
    packed = tmp_path / "served.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("text", TEXT)
    served = Mirrors("", packed.read_bytes())
    packed.unlink()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind = self.path.split("/")[1]
            served.requests.append(kind)
            if kind == "absent":
                return self.send_error(404)
            self.send_response(200)
            if kind not in ("no-length", "endless"):
                self.send_header("Content-Length", str(len(served.archive)))
            self.end_headers()
            half = len(served.archive) // 2
            if kind == "wrong":
                self.wfile.write(bytes(len(served.archive)))
            elif kind == "login-page":
                self.wfile.write(b"<html>Please log in</html>")
            elif kind == "cut-short":
                self.wfile.write(served.archive[:half])
            elif kind == "stalls":
                self.wfile.write(served.archive[:half])
                self.wfile.flush()
                served.released.wait(30)
            elif kind == "endless":
                with suppress(ConnectionError):
                    while True:
                        self.wfile.write(bytes(1 << 16))
            else:
                self.wfile.write(served.archive)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.released.set()
        server.shutdown()
        thread.join()


def test_downloads_and_unpacks_once(tmp_path: Path, mirrors: Mirrors) -> None:
    data = tmp_path / "data"
    published = mirrors.published("good", "absent")
    first = find_or_download(published, data)
    assert bytes(first.tokens) == TEXT
    assert (first.name, first.path, first.origin) == ("text", data / "text", published.urls[0])
    assert {path.name for path in data.iterdir()} == {"text", "text.zip"}
    assert (data / "text.zip").read_bytes() == mirrors.archive
    second = find_or_download(published, data)
    assert second.fingerprint == first.fingerprint == published.content.sha256
    assert mirrors.requests == ["good"]


@pytest.mark.parametrize(
    "kind", ["absent", "wrong", "login-page", "cut-short", "stalls", "no-server", "no-host"]
)
def test_goes_on_to_the_next_address(
    tmp_path: Path, mirrors: Mirrors, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "STALL_SECONDS", 0.3)
    published = mirrors.published(kind, "no-length")
    if kind == "no-server":
        published = replace(published, urls=("http://127.0.0.1:9/text.zip", published.urls[1]))
    if kind == "no-host":
        published = replace(published, urls=("http://nowhere.invalid/text.zip", published.urls[1]))
    found = find_or_download(published, tmp_path)
    assert bytes(found.tokens) == TEXT
    assert found.origin == published.urls[1]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("absent", "404"), ("wrong", "sha256"), ("cut-short", "bytes, expected"), ("stalls", "timed out")],
)
def test_says_what_was_tried_and_leaves_nothing(
    tmp_path: Path, mirrors: Mirrors, kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "STALL_SECONDS", 0.3)
    with pytest.raises(FileNotFoundError) as caught:
        find_or_download(mirrors.published(kind, "absent"), tmp_path)
    message = str(caught.value)
    for part in (reason, f"/{kind}/text.zip", "/absent/text.zip", str(tmp_path / "text.zip"), "--data"):
        assert part in message
    assert not list(tmp_path.iterdir())


def test_stops_reading_what_is_longer_than_expected(tmp_path: Path, mirrors: Mirrors) -> None:
    with pytest.raises(FileNotFoundError, match="more than"):
        find_or_download(mirrors.published("endless"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(tmp_path: Path, mirrors: Mirrors) -> None:
    # The handler, because a process started in the background of a script has none.
    program = f"""
import signal
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from palm_pytorch.data.corpus import Expected, Published, find_or_download
find_or_download({mirrors.published("stalls")!r}, Path({str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size for path in tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(tmp_path.iterdir()), "the download did not begin"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert not list(tmp_path.iterdir())


def test_finds_it_compressed(tmp_path: Path) -> None:
    (tmp_path / "text.gz").write_bytes(gzip.compress(TEXT))
    found = find_or_download(Published("text", (), expected(b""), expected(TEXT)), tmp_path)
    assert bytes(found.tokens) == TEXT
    assert found.origin == str(tmp_path / "text.gz")


@pytest.mark.parametrize("name", ["text", "text.gz"])
def test_refuses_something_else_under_its_name(tmp_path: Path, name: str, mirrors: Mirrors) -> None:
    """Somebody's file: neither trained on as if it were Enwik8, nor overwritten."""
    half = TEXT[: len(TEXT) // 2]
    content = gzip.compress(half) if name.endswith(".gz") else half
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*remove it"):
        find_or_download(mirrors.published("good"), tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [content]
    assert not mirrors.requests


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "ENWIK8", replace(ENWIK8, urls=("http://127.0.0.1:9/enwik8.zip",)))


@pytest.mark.usefixtures("no_network")
def test_without_network_the_standard_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = open_corpus(None, tmp_path / "one")
    errors = capsys.readouterr().err
    assert errors.count("\n") > 5
    for part in ("WARNING", "does not train on Enwik8", "http://127.0.0.1:9/enwik8.zip", "standard library"):
        assert part in errors
    assert found.name.startswith("python-3.")
    assert len(found.tokens) > 5_000_000
    for module in (
        "argparse",
        "json/decoder",
        "zipfile/__init__" if sys.version_info >= (3, 12) else "zipfile",
    ):
        source = Path(os.__file__).parent.joinpath(f"{module}.py").read_bytes()
        assert bytes(found.tokens).count(source) == 1
    assert Path(pytest.__file__).read_bytes() not in bytes(found.tokens)
    again = open_corpus(None, tmp_path / "two")
    assert np.array_equal(found.tokens, again.tokens)
    assert open_corpus(found.path, tmp_path).fingerprint == found.fingerprint


@pytest.mark.usefixtures("no_network")
def test_enwik8_insists(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no address gave it"):
        open_corpus("enwik8", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", [None, "enwik8"])
def test_a_first_run_with_network(
    tmp_path: Path, mirrors: Mirrors, source: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "ENWIK8", replace(mirrors.published("good"), name="enwik8"))
    found = open_corpus(source, tmp_path)
    assert (found.name, found.path) == ("enwik8", tmp_path / "enwik8")
    assert bytes(found.tokens) == TEXT


def test_knows_enwik8_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "ENWIK8", replace(ENWIK8, content=expected(TEXT)))
    path = tmp_path / "some.gz"
    path.write_bytes(gzip.compress(TEXT))
    assert open_corpus(path, tmp_path).name == "enwik8"


def test_maps_a_plain_file_in_place(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    found = open_corpus(str(path), tmp_path / "data")
    assert isinstance(found.tokens, np.memmap)
    assert found.tokens.dtype == np.uint8
    assert not found.tokens.flags.writeable
    assert bytes(found.tokens) == TEXT
    assert (found.name, found.path) == ("text", path)
    assert found.fingerprint == hashlib.sha256(TEXT).hexdigest()
    assert not (tmp_path / "data").exists()


def test_unpacks_once_until_the_source_changes(tmp_path: Path) -> None:
    path, data = tmp_path / "text.gz", tmp_path / "data"
    path.write_bytes(gzip.compress(TEXT))
    first = open_corpus(path, data)
    assert bytes(first.tokens) == TEXT
    written = first.path.stat().st_mtime_ns
    assert open_corpus(path, data).path.stat().st_mtime_ns == written
    path.write_bytes(gzip.compress(TEXT.upper()))
    second = open_corpus(path, data)
    assert bytes(second.tokens) == TEXT.upper()
    assert bytes(first.tokens) == TEXT
    assert second.fingerprint != first.fingerprint


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path} is a folder; expected a file"):
        open_corpus(tmp_path, tmp_path)


def test_text8_is_known_by_its_length_and_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"".join(b"%c " % letter for letter in range(ord("a"), ord("z") + 1))
    monkeypatch.setattr(corpus_module, "TEXT8", replace(TEXT8, content=Expected(len(text))))
    (tmp_path / "text8").write_bytes(text)
    found = open_corpus("text8", tmp_path)
    assert found.name == "text8" and bytes(found.tokens) == text
    for wrong in (text[:-1], text.replace(b"q", b"Q"), text.replace(b"q", b"p")):
        (tmp_path / "text8").write_bytes(wrong)
        with pytest.raises(ValueError, match=r"text8 \(.*\) is not text8 \(52 bytes, of 27 different ones\)"):
            open_corpus("text8", tmp_path)


def test_letters_are_counted_in_little_memory(tmp_path: Path) -> None:
    size = 24 << 20
    (tmp_path / "text").write_bytes(b"a" * size)
    corpus = open_corpus(tmp_path / "text", tmp_path)
    published = replace(TEXT8, content=Expected(size), alphabet=b"a")
    tracemalloc.start()
    try:
        published.check(corpus)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size


@pytest.mark.parametrize("source", ["nowhere", "", "text9", Path("enwik8")])
def test_refuses_what_does_not_exist(
    tmp_path: Path, source: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"'{source}'"):
        open_corpus(source, tmp_path)


@pytest.mark.parametrize("content", [b"", gzip.compress(b"", mtime=0)])
def test_refuses_nothing_at_all(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "source"
    source.write_bytes(content)
    with pytest.raises(ValueError, match=r"source.* is empty"):
        open_corpus(source, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_refuses_what_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    path.chmod(0)
    with pytest.raises(PermissionError, match="text"):
        open_corpus(path, tmp_path)


def test_names_a_data_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(TEXT))
    with pytest.raises(OSError, match="data"):
        open_corpus(path, tmp_path / "data")


def test_fingerprint_of_a_long_corpus() -> None:
    """Beyond 128 MiB: another length or another end is seen, without reading everything."""
    tokens = np.zeros((128 << 20) + 1000, dtype=np.uint8)
    first = fingerprint(tokens)
    assert first == fingerprint(tokens.copy())
    assert first != fingerprint(tokens[:-1])
    for position in (0, -1):
        tokens[position] = 1
        assert first != fingerprint(tokens)
        tokens[position] = 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files and Linux's RLIMIT_DATA")
def test_a_10_gigabyte_file_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(10 << 30)
    if path.stat().st_blocks:
        pytest.skip("this file system has no sparse files")
    program = f"""
import resource
from palm_pytorch.data.corpus import open_corpus
resource.setrlimit(resource.RLIMIT_DATA, (256 << 20,) * 2)
print(len(open_corpus({str(path)!r}, "data").tokens))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == str(10 << 30), done.stderr
