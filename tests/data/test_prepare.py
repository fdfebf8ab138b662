"""A prepared folder holds every document once, whatever happened while it was made."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_process
import tokenizers

import palm_pytorch
from palm_pytorch.data import blocks
from palm_pytorch.data import prepare as prepare_module
from palm_pytorch.data.corpus import open_corpus
from palm_pytorch.data.encoding import encode_blocks
from palm_pytorch.data.prepare import prepare
from palm_pytorch.data.shards import Manifest, PartWriter, read_manifest, verify
from palm_pytorch.data.sources import Document, open_source
from palm_pytorch.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

END = bytes([0xFF])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4096)


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """The file of a small BPE tokenizer."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stream(folder: Path, split: str) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob(f"{split}*.bin")))


def split_of(text: str, shares: tuple[float, float] = (0.05, 0.05)) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    place = int.from_bytes(digest[:8], "little") / 2**64
    return "valid" if place < shares[0] else "test" if place < sum(shares) else "train"


def test_bytes_and_ends_of_every_document(jsonl: Path, documents: list[str], tmp_path: Path) -> None:
    manifest = prepare(open_source(jsonl), tmp_path / "out", shard_tokens=9000)
    assert manifest == read_manifest(tmp_path / "out")
    verify(tmp_path / "out", manifest)
    assert len(manifest.train) > 3
    for split in ("train", "valid", "test"):
        chosen = [text.encode() for text in documents if split_of(text) == split]
        assert len(chosen) > 10
        assert stream(tmp_path / "out", split) == b"".join(text + END for text in chosen)
        totals = manifest.totals(split)
        assert totals == {
            "documents": len(chosen),
            "tokens": sum(map(len, chosen)) + len(chosen),
            "bytes": sum(map(len, chosen)),
        }
    tokens, ends = (
        np.fromfile(tmp_path / "out" / f"valid.{name}", kind)
        for name, kind in (("bin", "u1"), ("ends", "<i8"))
    )
    assert (tokens[ends - 1] == 0xFF).all() and len(ends) == (tokens == 0xFF).sum()
    assert manifest.valid.first_bytes == len(ends)


def test_duplicates_are_dropped_on_request(jsonl: Path, documents: list[str], tmp_path: Path) -> None:
    manifest = prepare(
        open_source(jsonl), tmp_path / "out", deduplicate=True, valid_share=0.3, test_share=0.2
    )
    assert manifest.dropped == {"empty": 0, "duplicates": 10}
    for split in ("train", "valid", "test"):
        chosen = [text for text in dict.fromkeys(documents) if split_of(text, (0.3, 0.2)) == split]
        assert stream(tmp_path / "out", split) == b"".join(text.encode() + END for text in chosen)


def test_held_out_documents_stay_so_when_others_come(jsonl: Path, tmp_path: Path) -> None:
    lines = jsonl.read_text().splitlines(keepends=True)
    (tmp_path / "more.jsonl").write_text("".join([*reversed(lines), '{"text": "one more"}\n']))
    held_out = []
    for name, path in (("a", jsonl), ("b", tmp_path / "more.jsonl")):
        prepare(open_source(path), tmp_path / name)
        held_out.append(set(stream(tmp_path / name, "test").split(END)) - {b"one more"})
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_of_pieces(
    workers: int, jsonl: Path, documents: list[str], pieces: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(pieces)
    library = tokenizers.Tokenizer.from_file(str(pieces))
    manifest = prepare(open_source(jsonl), tmp_path / "out", tokenizer, workers=workers, shard_tokens=2000)
    assert manifest.dtype == "<u2" and manifest.tokenizer == hashlib.sha256(pieces.read_bytes()).hexdigest()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == pieces.read_bytes()
    for split in ("train", "valid", "test"):
        chosen = [library.encode(text).ids for text in documents if split_of(text) == split]
        found = np.frombuffer(stream(tmp_path / "out", split), "<u2").tolist()
        end = library.token_to_id("<|endoftext|>")
        assert found == [token for ids in chosen for token in [*ids, end]]
        parts = manifest.train if split == "train" else [getattr(manifest, split)]
        first_bytes = sum(len(library.decode(ids[:1]).encode()) for ids in chosen)
        assert sum(part.first_bytes for part in parts) == first_bytes


@pytest.mark.parametrize("compressed", [False, True])
def test_one_text_is_split_by_position_between_characters(
    compressed: bool, pieces: Path, tmp_path: Path
) -> None:
    text = ("\u00e9t\u00e9 \u20ac " * 3000).encode()
    path = tmp_path / ("text.gz" if compressed else "text.txt")
    path.write_bytes(gzip.compress(text) if compressed else text)
    tokenizer = load_tokenizer(pieces)
    manifest = prepare(open_corpus(path, tmp_path / "data"), tmp_path / "out", tokenizer)
    assert not manifest.documents
    parts = [
        tokenizer.decode_bytes(np.frombuffer(stream(tmp_path / "out", split), "<u2"))
        for split in ("train", "valid", "test")
    ]
    assert b"".join(parts) == text
    for part, share in zip(parts, (0.9, 0.05, 0.05), strict=True):
        part.decode()
        assert abs(len(part) - share * len(text)) < 4
    assert [manifest.totals(split)["bytes"] for split in ("train", "valid", "test")] == [*map(len, parts)]
    assert all((tmp_path / "out" / name).stat().st_size == 0 for name in ("train-00000.ends", "test.ends"))


def prepare_small(source: Path, folder: Path, tokenizer: str | Path = "bytes") -> None:
    prepare(open_source(source), folder, load_tokenizer(tokenizer), shard_tokens=9000, deduplicate=True)


def start_small(source: Path, folder: Path, told: Path, fatal_call: int = 0) -> ForkServerProcess:
    """The same in a process of its own."""
    options = {"shard_tokens": 9000, "workers": 1}
    return real_process.start(
        ["data", "prepare", str(source), str(folder), "--deduplicate", *real_process.flags(options)],
        told,
        fatal_call=fatal_call,
        constants={"palm_pytorch.data.blocks.BLOCK": 4096},
    )


def test_killed_at_any_moment_it_ends_with_the_same_bytes(jsonl: Path, tmp_path: Path) -> None:
    """Killed before one of its calls to the file system, whichever, again and again until it is done."""
    prepare_small(jsonl, tmp_path / "undisturbed")
    folder, told, draws, kills = tmp_path / "killed", tmp_path / "told", random.Random(3), 0
    while not folder.exists():
        process = start_small(jsonl, folder, told, fatal_call=draws.randrange(1, 30))
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL), told.read_text()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 3
    assert files(folder) == files(tmp_path / "undisturbed")
    left = {path.name for path in tmp_path.iterdir() if "killed" in path.name}
    assert left <= {"killed", ".killed.lock", ".killed.progress"}


PROGRAM = """
import sys
from palm_pytorch.data import blocks
from palm_pytorch.data.prepare import prepare
from palm_pytorch.data.sources import open_source
from palm_pytorch.data.tokenizer import load_tokenizer

if __name__ == "__main__":
    blocks.BLOCK = 4096
    source, folder, tokenizer = sys.argv[1:]
    prepare(
        open_source(source), folder, load_tokenizer(tokenizer), shard_tokens=9000, deduplicate=True, workers=2
    )
"""


def test_killed_with_its_workers(jsonl: Path, pieces: Path, tmp_path: Path) -> None:
    """They end with the process that started them, and do not hold up the next one."""
    program, folder, first = tmp_path / "program.py", tmp_path / "killed", tmp_path / ".killed.progress"
    program.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(program), str(jsonl), str(folder), str(pieces)],
        env={**os.environ, "PYTHONPATH": str(Path(palm_pytorch.__file__).parents[1])},
        start_new_session=True,
    )
    while process.poll() is None and not first.exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.02)
    if not folder.exists():
        prepare_small(jsonl, folder, pieces)
    prepare_small(jsonl, tmp_path / "undisturbed", pieces)
    assert files(folder) == files(tmp_path / "undisturbed")


class Stop(Exception):
    pass


def stopped(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int = 3) -> None:
    """A preparation that ends with an exception once it has written so many shards."""
    count = 0

    def write_json(*arguments: Any) -> None:
        nonlocal count
        count += 1
        real(*arguments)
        if count == after:
            raise Stop

    real = prepare_module.write_json
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_json", write_json)
        with pytest.raises(Stop):
            prepare(open_source(path), folder, shard_tokens=9000)
    assert not folder.exists()


@pytest.mark.parametrize("damage", [None, "train-00001.bin", "train-00000.ends", "valid.bin"])
def test_finished_shards_are_kept_if_they_are_whole(
    damage: str | None,
    jsonl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(open_source(jsonl), tmp_path / "undisturbed", shard_tokens=9000)
    stopped(jsonl, tmp_path / "out", monkeypatch)
    if damage:
        path = tmp_path / ".out.partial" / damage
        path.write_bytes(b"\0" + path.read_bytes()[1:])
    written = []
    real = PartWriter.__init__
    monkeypatch.setattr(
        PartWriter,
        "__init__",
        lambda self, folder, name, *rest: written.append(name) or real(self, folder, name, *rest),
    )
    prepare(open_source(jsonl), tmp_path / "out", shard_tokens=9000)
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    kept = {None: 3, "train-00001.bin": 1, "train-00000.ends": 0, "valid.bin": 0}[damage]
    assert f"train-{kept:05d}" in written and f"train-{kept - 1:05d}" not in written
    assert ("is damaged, and is made again" in capsys.readouterr().out) == (damage is not None)
    assert {path.name for path in tmp_path.iterdir()} == {"undisturbed", "out"}


def test_what_was_stopped_is_not_continued_as_something_else(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(jsonl, tmp_path / "out", monkeypatch)
    with pytest.raises(ValueError, match=r"\.out\.partial is an unfinished preparation of another options;"):
        prepare(open_source(jsonl), tmp_path / "out", shard_tokens=9001)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f'{{"text": "other {number}"}}\n' for number in range(3)))
    with pytest.raises(ValueError, match="of another source"):
        prepare(open_source(other), tmp_path / "out", shard_tokens=9000)
    assert (tmp_path / ".out.partial" / "train-00002.bin").exists()


def test_a_full_disk_is_named_and_survived(jsonl: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the write that goes beyond fails half-way."""
    prepare(open_source(jsonl), tmp_path / "undisturbed", shard_tokens=30_000)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(OSError, match=r"\.out\.partial") as caught:
            prepare(open_source(jsonl), tmp_path / "out", shard_tokens=30_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "out").exists()
    prepare(open_source(jsonl), tmp_path / "out", shard_tokens=30_000)
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_another_process_is_waited_for(jsonl: Path, tmp_path: Path) -> None:
    """All want the same folder; one makes it, the others find it there."""
    told = [tmp_path / f"told-{number}" for number in range(3)]
    processes = [start_small(jsonl, tmp_path / "out", each) for each in told]
    for process in processes:
        process.join(120)
    assert sorted(process.exitcode or 0 for process in processes) == [0, 2, 2]
    for process, each in zip(processes, told, strict=True):
        assert (
            process.exitcode == 0 or "out exists and is not empty; expected a new folder" in each.read_text()
        )
    verify(tmp_path / "out", read_manifest(tmp_path / "out"))


class Endless(ByteTokenizer):
    eos_token = None


class Deadly(Tokenizer):
    num_tokens, fingerprint, eos_token = 256, "deadly", 0

    def encode(self, text: str | bytes, invalid_bytes: str = "keep") -> np.ndarray:
        os._exit(9)

    def decode_bytes(self, tokens: Any) -> bytes:
        return bytes(tokens)


def test_a_worker_that_dies_is_said() -> None:
    found = [[blocks.Piece(b"a", 0, True, True, "a.txt")]] * 3
    with pytest.raises(ChildProcessError, match="one of 2 workers died"):
        list(encode_blocks(found, Deadly(), workers=2, invalid_bytes="keep"))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"workers": 0}, "workers=0"),
        ({"shard_tokens": 0}, "shard_tokens=0"),
        ({"max_documents": 0}, "max_documents=0"),
        ({"valid_share": 0.0}, "valid_share=0.0, test_share=0.05: expected above 0"),
        ({"valid_share": 0.5, "test_share": 0.5}, "below 1 together"),
        ({"tokenizer": Endless()}, "has no end token"),
    ],
)
def test_options_that_do_not_fit(
    options: dict[str, Any], complaint: str, jsonl: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=complaint):
        prepare(open_source(jsonl), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_one_text_has_no_documents_to_choose(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text " * 100)
    corpus = open_corpus(tmp_path / "text.txt", tmp_path)
    with pytest.raises(ValueError, match=r"valid_share=0.1: .*text\.txt is one text"):
        prepare(corpus, tmp_path / "out", valid_share=0.1)
    with pytest.raises(ValueError, match=r"deduplicate=True: .*text\.txt is one text"):
        prepare(corpus, tmp_path / "out", deduplicate=True)


def counts_of(manifest: Manifest) -> list[int]:
    return [manifest.totals(split)["documents"] for split in ("train", "valid", "test")]


def test_no_more_documents_than_asked_for(jsonl: Path, tmp_path: Path) -> None:
    manifest = prepare(open_source(jsonl), tmp_path / "out", max_documents=50)
    assert sum(counts_of(manifest)) == 50


def test_a_few_files_are_enough(tmp_path: Path) -> None:
    texts = {f"{number}.txt": f"text {number}\n" * 100 for number in range(4)}
    (tmp_path / "texts").mkdir()
    for name, text in texts.items():
        (tmp_path / "texts" / name).write_text(text)
    manifest = prepare(open_source(tmp_path / "texts"), tmp_path / "out")
    assert counts_of(manifest) == [2, 1, 1]
    found = b"".join(stream(tmp_path / "out", split) for split in ("train", "valid", "test"))
    assert sorted(found.split(END)) == sorted([b"", *(text.encode() for text in texts.values())])


@pytest.mark.parametrize(("documents", "most"), [(60, None), (400, 60), (150, 1000)])
def test_few_documents_of_unknown_size(documents: int, most: int | None, tmp_path: Path) -> None:
    """As those of the hub are: streamed, and read ahead until there are many."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(f'{{"text": "text {n:03d}"}}\n' for n in range(documents)))
    source = replace(open_source(folder), num_bytes=None)
    count = min(documents, most or documents)
    manifest = prepare(source, tmp_path / "out", max_documents=most)
    held_out = -(-count // 20)  # a twentieth, or a document more
    assert counts_of(manifest) == [count - 2 * held_out, held_out, held_out]
    assert manifest.options["valid_share"] == manifest.options["test_share"] == 0.05


def test_many_documents_of_unknown_size(jsonl: Path, documents: list[str], tmp_path: Path) -> None:
    read: list[str] = []

    def noted() -> Iterator[Document]:
        for document in known.documents():
            read.append(document.where)
            yield document

    known = open_source(jsonl)
    manifest = prepare(replace(known, num_bytes=None, documents=noted), tmp_path / "out")
    splits = [split_of(text, (0.005, 0.005)) for text in documents]
    assert counts_of(manifest) == [splits.count(split) for split in ("train", "valid", "test")]
    assert manifest.options["valid_share"] == 0.005
    assert len(read) == blocks.FEW + len(documents)  # no more of them ahead than that


def test_a_few_large_files_leave_no_split_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SMALL", 1000)
    (tmp_path / "texts").mkdir()
    for number in range(5):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number}\n" * 100)
    manifest = prepare(open_source(tmp_path / "texts"), tmp_path / "out")
    assert counts_of(manifest) == [3, 1, 1] and manifest.options["valid_share"] == 0.005


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("b.txt", b"ab\xff", r"many/b\.txt: text: byte 0xff at"),
        ("b.txt", b"a" * 4096 + b"ab\xff", r"many/b\.txt, from byte 4,096 on: text: byte 0xff at"),
        ("b.jsonl", b'{"text": "a"}\n{"text": "ab\\ud83d"}\n', r"many/b\.jsonl, line 2: text: byte 0xed at"),
    ],
)
def test_refused_bytes_are_said_with_their_place(
    name: str, content: bytes, place: str, pieces: Path, tmp_path: Path
) -> None:
    (tmp_path / "many").mkdir()
    for other in "acd":
        (tmp_path / "many" / f"{other}.txt").write_text(f"text {other}")
    (tmp_path / "many" / name).write_bytes(content)
    source = open_source(tmp_path / "many")
    with pytest.raises(ValueError, match=f"{place} 2 is not UTF-8"):
        prepare(source, tmp_path / "out", invalid_bytes="refuse")
    with pytest.raises(ValueError, match=f"{place} character 2 is not UTF-8, and this tokenizer cannot keep"):
        prepare(source, tmp_path / "out", load_tokenizer(pieces), workers=2)


def test_refused_bytes_of_one_text_are_said_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"a" * 4098 + b"\xff")
    corpus = open_corpus(tmp_path / "text.txt", tmp_path)
    with pytest.raises(ValueError, match=r"text\.txt, from byte 3,894 on: text: byte 0xff at 204 is not"):
        prepare(corpus, tmp_path / "out", invalid_bytes="refuse")


def test_the_current_folder_can_be_prepared_into(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    manifest = prepare(open_source(jsonl), ".")
    assert read_manifest(tmp_path / "out") == manifest


def test_nothing_is_written_over_and_nothing_comes_of_nothing(jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="mine exists and is not empty"):
        prepare(open_source(jsonl), tmp_path / "mine")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        prepare(open_source(tmp_path / "empty.jsonl"), tmp_path / "out")
    with pytest.raises(ValueError, match="has no column 'body'"):
        prepare(open_source(jsonl, text_column="body"), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "empty.jsonl"}


def test_the_manifest_says_what_it_was_made_of(jsonl: Path, tmp_path: Path) -> None:
    prepare(open_source(jsonl), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert content["source"] == str(jsonl) and content["tokenizer"] == "bytes"
    assert content["options"]["valid_share"] == 0.05 and content["version"] == 1
    for part in (*content["train"], content["valid"], content["test"]):
        path = tmp_path / "out" / f"{part['name']}.bin"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == part["sha256"]
    assert isinstance(read_manifest(tmp_path / "out"), Manifest)
