"""Several files read as one stream, and damage found and named."""

from __future__ import annotations

import hashlib
import json
import pickle
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palm_pytorch.data.shards import Manifest, Part, PartWriter, TokenStream, read_manifest, verify

U16 = np.dtype("<u2")


def write_part(folder: Path, name: str, lengths: list[int], first: int = 0, parts: int = 1) -> Part:
    """Documents of these lengths, whose tokens count up from `first`."""
    writer = PartWriter(folder, name, U16)
    for some in np.array_split(np.array(lengths, dtype=np.int64), parts):
        writer.append(np.arange(first, first + some.sum()), np.cumsum(some), 2 * int(some.sum()), len(some))
        first += int(some.sum())
    part = writer.part()
    writer.close()
    return part


@given(
    shards=st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=4),
    start=st.integers(0, 100),
    length=st.integers(1, 40),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_stretch_of_the_stream(shards: list[list[int]], start: int, length: int, tmp_path: Path) -> None:
    """Empty shards included; after the last token comes the first, even more than once."""
    lengths = [length for shard in shards for length in shard]
    total = sum(lengths)
    if not total:
        return
    firsts = [sum(map(sum, shards[:number])) for number in range(len(shards))]
    parts = [
        write_part(tmp_path, f"train-{number}", shard, first)
        for number, (shard, first) in enumerate(zip(shards, firsts, strict=True))
    ]
    stream = pickle.loads(pickle.dumps(TokenStream(tmp_path, parts, U16)))
    start %= total
    assert len(stream) == total
    assert stream.read(start, length).tolist() == [at % total for at in range(start, start + length)]
    ends = {lap * total + end for end in accumulate(lengths) for lap in range(60)}
    assert stream.read_ends(start, length).tolist() == sorted(
        end - start for end in ends if start < end < start + length
    )


def test_a_part_is_continued_where_it_was_cut(tmp_path: Path) -> None:
    """What an earlier process had written beyond the noted part goes."""
    whole = write_part(tmp_path, "whole", [3, 4, 5, 1], parts=2)
    noted = write_part(tmp_path, "valid", [3, 4])
    (tmp_path / "valid.bin").open("ab").write(b"half a shard")
    writer = PartWriter(tmp_path, "valid", U16, noted)
    writer.append(np.arange(7, 13), np.array([5, 6]), 12, 2)
    part = writer.part()
    writer.close()
    assert (part.sha256, part.ends_sha256) == (whole.sha256, whole.ends_sha256)
    assert (part.tokens, part.documents, part.bytes, part.first_bytes) == (13, 4, 26, 4)
    for suffix in (".bin", ".ends"):
        assert (tmp_path / f"valid{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert part.sha256 == hashlib.sha256(np.arange(13, dtype="<u2").tobytes()).hexdigest()
    assert part.ends_sha256 == hashlib.sha256(np.array([3, 7, 12, 13], dtype="<i8").tobytes()).hexdigest()


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    shards = tuple(write_part(tmp_path, f"train-{number:05d}", [30, 20]) for number in range(4))
    held_out = [write_part(tmp_path, split, [7]) for split in ("valid", "test")]
    Manifest("poem", "poem.txt", "bytes", 256, "<u2", True, {}, {}, shards, *held_out).write(tmp_path)
    return tmp_path


def test_the_manifest_is_read_as_it_was_written(prepared: Path) -> None:
    manifest = read_manifest(prepared)
    assert manifest.totals("train") == {"documents": 8, "tokens": 200, "bytes": 400}
    assert json.loads((prepared / "manifest.json").read_text())["counts"]["valid"]["tokens"] == 7
    assert str(manifest) == (
        "tokens to train 200 in 8 documents, valid 7 in 1 documents, test 7 in 1 documents"
    )
    verify(prepared, manifest)


@pytest.mark.parametrize("name", ["train-00002.bin", "train-00000.ends", "valid.bin", "test.ends"])
def test_one_flipped_bit_is_found(name: str, prepared: Path) -> None:
    content = bytearray((prepared / name).read_bytes())
    content[len(content) // 2] ^= 4
    (prepared / name).write_bytes(content)
    says = rf"{name} is damaged: its sha256 is .*; remove {prepared} and prepare it again"
    with pytest.raises(ValueError, match=says):
        verify(prepared, read_manifest(prepared))


@pytest.mark.parametrize("limit", [None, 1])
def test_sizes_are_always_checked(limit: int | None, prepared: Path) -> None:
    (prepared / "train-00003.bin").write_bytes(bytes(98))
    with pytest.raises(ValueError, match=r"train-00003.bin is damaged: 98 bytes, expected 100"):
        verify(prepared, read_manifest(prepared), limit=limit)
    (prepared / "train-00003.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00003.bin is missing"):
        verify(prepared, read_manifest(prepared), limit=limit)


def test_beyond_the_limit_some_shards_are_read(prepared: Path) -> None:
    for number in (0, 1):
        (prepared / f"train-{number:05d}.bin").write_bytes(bytes(100))
        if number == 0:
            with pytest.raises(ValueError, match=r"train-00000\.bin is damaged"):
                verify(prepared, read_manifest(prepared), limit=300)
            write_part(prepared, "train-00000", [30, 20])
    verify(prepared, read_manifest(prepared), limit=300)
    with pytest.raises(ValueError, match=r"train-00001\.bin is damaged"):
        verify(prepared, read_manifest(prepared))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"tokens": 50', '"tokens": 51', None),  # the file's size tells
        ('"sha256": "', '"sha256": "0', "fingerprint is not that of what it lists"),
        ('"dtype": "<u2"', '"dtype": "<u4"', "fingerprint"),
        ('"version": 1', '"version": 2', "version 2, expected 1; remove .* and prepare it again"),
        ('"train":', '"trains":', "is damaged, or not a manifest"),
        ("{", "", "is damaged, or not a manifest"),
    ],
)
def test_a_damaged_manifest(old: str, new: str, complaint: str | None, prepared: Path) -> None:
    text = (prepared / "manifest.json").read_text()
    assert old in text
    (prepared / "manifest.json").write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=complaint or "expected 102"):
        verify(prepared, read_manifest(prepared))
