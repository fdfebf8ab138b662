"""`palm data prepare`: a corpus as tokens on the disk, made once, by several processes, and safe from kills.

All work is done in a hidden folder beside the wanted one, which gets its name when everything in it is there.
A shard is noted in a progress file when it is on the disk. Who goes on after a stop reads the source again,
from the start, but makes tokens only of what comes after the last shard that is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from palm_pytorch.data.blocks import SHARES, Block, character_start, document_blocks, few_splits, text_blocks
from palm_pytorch.data.corpus import Corpus
from palm_pytorch.data.durable import file_digest, write_json
from palm_pytorch.data.encoding import encode_blocks
from palm_pytorch.data.shards import HELD_OUT, Manifest, Part, PartWriter
from palm_pytorch.data.sources import Source
from palm_pytorch.data.tokenizer import ByteTokenizer, InvalidBytes, Tokenizer

SHARD_TOKENS = 1 << 27
SMALL = 1 << 30  # bytes of files, up to which `SHARES` are held out, and beyond that these:
SHARES_OF_MUCH = (0.005, 0.005)
SLICE = 1 << 20


@dataclass(frozen=True)
class Shard:
    """A shard that is on the disk, and how long the held-out parts were when it was.

    blocks: how many have been read, from the first on.
    """

    blocks: int
    train: Part
    valid: Part
    test: Part


def prepare(
    source: Source | Corpus,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    valid_share: float | None = None,
    test_share: float | None = None,
    deduplicate: bool = False,
    max_documents: int | None = None,
    invalid_bytes: InvalidBytes = "keep",
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Make tokens of `source` and store them in `folder`, which is made; gives its manifest.

    The documents of a `Source` are split by a hash of their bytes (a few: in the order of these, so that no
    split stays empty), and each ends in an end token.
    A `Corpus` is one running text: 90% to train on, then 5% to validate and 5% to test, and no end tokens.

    Args:
        tokenizer: bytes, if None.
        valid_share, test_share: of documents; 5% each for files of up to 1 GiB, and 0.5% beyond. Where it is
            not known how much there is, as on the hub, 5% of fewer than 200 documents, and 0.5% of more.
        deduplicate: drop all but the first of documents that are equal byte by byte.
        max_documents: read no more than so many.
        invalid_bytes: see `Tokenizer.encode`.
        workers: processes, each with a core to itself. Bytes need none.
        shard_tokens: a shard ends once it has so many. It is what a stop costs at most.

    Raises:
        FileExistsError: `folder` holds something.
        ValueError: there is no document, an option does not fit, or an unfinished preparation in the place of
            this one is of something else.
        OSError: the disk is full, or something cannot be read or written. What is done stays, and the same
            call goes on from there.
    """
    tokenizer, folder = tokenizer or ByteTokenizer(), Path(folder).resolve()  # "." has no name
    documents = isinstance(source, Source)
    given = (valid_share, test_share)
    _check_options(source, tokenizer, given, deduplicate, max_documents, workers, shard_tokens)
    shares, chosen = SHARES, None
    if isinstance(tokenizer, ByteTokenizer):
        workers = 1  # to hand a block to another process takes longer than to encode it

    with _exclusive(folder):
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} exists and is not empty; expected a new folder")
        partial, progress = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "progress"))
        if isinstance(source, Source):
            shares = _shares(source, given, few=True)
            chosen = few_splits(islice(source.documents(), max_documents), shares)
            if chosen is None:
                shares = _shares(source, given, few=False)
        options = {
            "valid_share": shares[0] if documents else None,
            "test_share": shares[1] if documents else None,
            "deduplicate": deduplicate,
            "max_documents": max_documents,
            "invalid_bytes": invalid_bytes,
            "shard_tokens": shard_tokens,
        }
        identity = source.identity if isinstance(source, Source) else source.fingerprint
        request = {"source": identity, "tokenizer": tokenizer.fingerprint, "options": options}
        done = _resume(partial, progress, json.loads(json.dumps(request)), tokenizer)
        dropped: Counter[str] = Counter({"empty": 0, "duplicates": 0})
        if isinstance(source, Source):
            found = islice(source.documents(), max_documents)
            blocks = document_blocks(found, shares, dropped, deduplicate=deduplicate, chosen=chosen)
        else:
            blocks = _corpus_blocks(source)
        try:
            shards = _write_shards(
                blocks, partial, progress, request, done, tokenizer, workers, invalid_bytes, shard_tokens
            )
        except OSError as error:
            if error.errno is not None and error.filename is None:  # a full disk does not say of which file
                error.filename = str(partial)
            raise
        finally:
            if not progress.exists():  # there is nothing to go on from
                shutil.rmtree(partial)
        manifest = Manifest(
            source.name,
            source.origin,
            tokenizer.fingerprint,
            tokenizer.num_tokens,
            tokenizer.dtype.newbyteorder("<").str,
            documents,
            options,
            dict(dropped),
            tuple(shard.train for shard in shards),
            shards[-1].valid,
            shards[-1].test,
        )
        if not sum(manifest.totals(split)["tokens"] for split in ("train", *HELD_OUT)):
            shutil.rmtree(partial)
            progress.unlink()
            raise ValueError(f"{source.origin} is empty: expected text in it")
        tokenizer.save(partial)
        manifest.write(partial)
        partial.replace(folder)
        progress.unlink()
    return manifest


def _check_options(
    source: Source | Corpus,
    tokenizer: Tokenizer,
    shares: tuple[float | None, float | None],
    deduplicate: bool,
    max_documents: int | None,
    workers: int,
    shard_tokens: int,
) -> None:
    counts = {"max_documents": max_documents, "workers": workers, "shard_tokens": shard_tokens}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count}: expected at least 1")
    if isinstance(source, Corpus):
        of_documents = {
            **{"valid_share": shares[0], "test_share": shares[1]},
            **{"deduplicate": deduplicate or None, "max_documents": max_documents},
        }
        for name, value in of_documents.items():
            if value is not None:
                raise ValueError(f"{name}={value}: {source.origin} is one text, and is split 90%, 5%, 5%")
    else:
        _shares(source, shares, few=True)
        if tokenizer.eos_token is None:
            raise ValueError(
                f"tokenizer: {tokenizer} has no end token, and documents are to be kept apart by it"
            )


def _shares(source: Source, given: tuple[float | None, float | None], few: bool) -> tuple[float, float]:
    """What is held out of documents, `given` or usual; `few` counts where their size is not known."""
    small = few if source.num_bytes is None else source.num_bytes <= SMALL
    usual = SHARES if small else SHARES_OF_MUCH
    valid, test = (share if asked is None else asked for asked, share in zip(given, usual, strict=True))
    if not (valid > 0 and test > 0 and valid + test < 1):
        raise ValueError(f"valid_share={valid}, test_share={test}: expected above 0, and below 1 together")
    return valid, test


def _corpus_blocks(corpus: Corpus) -> Iterator[Block]:
    """The three parts of a text, as `split_corpus` cuts them but between characters."""
    tokens, length = corpus.tokens, len(corpus.tokens)
    edges = [0, length * 90 // 100, length * 95 // 100, length]
    for number in (1, 2):
        near = bytes(tokens[max(0, edges[number] - 4) : edges[number] + 1])
        if edges[number] >= 4:
            edges[number] += character_start(near, 4) - 4

    def read(start: int, end: int) -> Iterator[bytes]:
        return (bytes(tokens[at : min(at + SLICE, end)]) for at in range(start, end, SLICE))

    return text_blocks((read(start, end) for start, end in pairwise(edges)), corpus.origin)


def _write_shards(
    blocks: Iterator[Block],
    folder: Path,
    progress: Path,
    request: dict[str, Any],
    done: list[Shard],
    tokenizer: Tokenizer,
    workers: int,
    invalid_bytes: InvalidBytes,
    shard_tokens: int,
) -> list[Shard]:
    """Write the shards that are not `done`; gives all of them."""
    shards, read = list(done), done[-1].blocks if done else 0
    earlier: list[Part | None] = [done[-1].valid, done[-1].test] if done else [None, None]
    held_out = [
        PartWriter(folder, name, tokenizer.dtype, part) for name, part in zip(HELD_OUT, earlier, strict=True)
    ]
    train: PartWriter | None = None

    def publish(writer: PartWriter) -> None:
        shards.append(Shard(read, writer.part(), *(part.part() for part in held_out)))
        writer.close()
        write_json(progress, {"request": request, "shards": [asdict(shard) for shard in shards]})

    todo = islice(blocks, read, None)
    with tqdm(desc="tokens", unit=" tokens", unit_scale=True, leave=False) as bar:
        for encoded in encode_blocks(todo, tokenizer, workers=workers, invalid_bytes=invalid_bytes):
            read += 1
            if train is None:
                train = PartWriter(folder, f"train-{len(shards):05d}", tokenizer.dtype)
            for writer, part in zip((train, *held_out), encoded, strict=True):
                writer.append(*part)
                bar.update(len(part.tokens))
            if train.tokens >= shard_tokens:
                publish(train)
                train = None
    if train is not None or not shards:
        publish(train or PartWriter(folder, "train-00000", tokenizer.dtype))
    for writer in held_out:
        writer.close()
    return shards


def _resume(folder: Path, progress: Path, request: dict[str, Any], tokenizer: Tokenizer) -> list[Shard]:
    """The shards in `folder` that are noted in `progress` and whole, which must be of the same `request`.

    Raises:
        ValueError: they are of another.
    """
    done: list[Shard] = []
    noted: list[Any] = []
    if folder.is_dir() and progress.is_file():
        saved = json.loads(progress.read_text(encoding="utf-8"))
        if saved["request"] != request:
            differing = [name for name in request if saved["request"].get(name) != request[name]]
            raise ValueError(
                f"{folder} is an unfinished preparation of another {' and '.join(differing)}; remove it, or "
                "choose another folder"
            )
        noted = saved["shards"]
    for entry in noted:
        shard = Shard(entry["blocks"], *(Part(**entry[split]) for split in ("train", *HELD_OUT)))
        files = [
            file for part in (shard.train, shard.valid, shard.test) for file in part.files(tokenizer.dtype)
        ]
        if not all(_holds(folder / name, size, expected) for name, size, expected in files):
            print(f"{folder}: {shard.train.name} is damaged, and is made again, and what comes after it")
            break
        done.append(shard)
    if not done:
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    else:
        print(f"{folder}: going on after {len(done)} shards")
    return done


def _holds(path: Path, size: int, expected: str) -> bool:
    return path.is_file() and path.stat().st_size >= size and file_digest(path, size).hexdigest() == expected


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One process at a time; the others wait until it is done, and find the folder there.

    Windows has no such locks, and there nothing is locked.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    path = folder.with_name(f".{folder.name}.lock")
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder}: waiting for another process that prepares it")
                fcntl.flock(file, fcntl.LOCK_EX)
            if not (path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino):
                continue  # the other one has removed it, and somebody may hold a new one
            try:
                yield
            finally:
                path.unlink()
            return
