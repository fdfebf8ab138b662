"""Conversations in rows: every label is a response's token after the right ones, whatever else is packed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palm_pytorch.data.batch import IGNORED
from palm_pytorch.data.dialog_dataset import LOOK_AHEAD, DialogDataset, is_dialog, pack_rows
from palm_pytorch.data.opening import open_dataset
from palm_pytorch.data.tokenizer import ByteTokenizer, InvalidBytes


def conversation(n: int, turns: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": ("user", "assistant")[k % 2], "content": f"{n}.{k} " + "xy\n"[k % 2] * (n % 7)}
            for k in range(2 * turns)
        ]
    }


def text_of(record: dict[str, Any]) -> str:
    """The template, written down once more."""
    return "".join(
        f"{message['role']}: " + message["content"].replace("\\", "\\\\").replace("\n", "\\n") + "\n"
        for message in record["messages"]
    )


RECORDS = [conversation(n, 1 + n % 3) for n in range(300)]
TEXTS = {text_of(record) for record in RECORDS}
SEQ_LEN = 150


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    lines = [json.dumps(record) for record in RECORDS]
    (tmp_path / "chats.jsonl").write_text("\n".join([*lines[:100], "", *lines[100:]]) + "\n")
    return tmp_path / "chats.jsonl"


@pytest.fixture
def data(chats: Path) -> DialogDataset:
    return DialogDataset(chats, ByteTokenizer(), SEQ_LEN)


def test_rows_hold_whole_conversations_and_only_responses_count(data: DialogDataset) -> None:
    batch = data.batch(seed=1, index=3, rows=range(20))
    assert batch.document_ids is not None and batch.tokens.shape == batch.labels.shape == (20, SEQ_LEN)
    filled = 0
    for tokens, labels, ids in zip(*(array.tolist() for array in batch[:3]), strict=True):
        assert ids == sorted(ids)
        documents = [[at for at, each in enumerate(ids) if each == number] for number in range(ids[-1] + 1)]
        if bytes(tokens[at] for at in documents[-1]).strip(b"\0") == b"":
            padding = documents.pop()
            assert all(labels[at] == IGNORED for at in padding)
        for places in documents:
            text = bytes(tokens[at] for at in places).decode() + "\n"
            assert text in TEXTS
            expected = "".join(
                line if line.startswith("a") else "." * len(line) for line in text.splitlines(keepends=True)
            ).replace("assistant:", "." * len("assistant:"))
            found = "".join("." if labels[at] == IGNORED else chr(labels[at]) for at in places)
            assert "." + found == expected
        filled += sum(map(len, documents))
    assert filled > 0.9 * batch.tokens.numel()  # they are a third of a row long, on average


def test_a_row_is_a_function_of_seed_index_and_row(data: DialogDataset) -> None:
    whole = data.batch(seed=1, index=3, rows=range(8))
    part = data.batch(seed=1, index=3, rows=range(5, 7))
    for all_rows, some in zip(whole[:3], part[:3], strict=True):
        assert torch.equal(all_rows[5:7], some)
    assert not torch.equal(whole.tokens, data.batch(seed=1, index=4, rows=range(8)).tokens)
    assert not torch.equal(whole.tokens, data.batch(seed=2, index=3, rows=range(8)).tokens)


def test_held_out_conversations_are_never_trained_on(data: DialogDataset, chats: Path) -> None:
    texts: dict[str, set[str]] = {}
    for split, packed in data.splits.items():
        parts = np.split(packed.tokens, packed.ends[:-1])
        texts[split] = {bytes(part.tolist()).decode() for part in parts}
    assert texts["train"] | texts["valid"] | texts["test"] == TEXTS
    assert sum(map(len, texts.values())) == len(TEXTS) == 300
    assert 4 <= len(texts["valid"]) <= 30 and 4 <= len(texts["test"]) <= 30
    chats.write_text("".join(chats.read_text().splitlines(keepends=True)[::-1]))  # wherever they are
    again = DialogDataset(chats, ByteTokenizer(), SEQ_LEN)
    for split in ("valid", "test"):
        assert sorted(again.splits[split].tokens) == sorted(data.splits[split].tokens)


def test_bytes_are_those_of_responses(data: DialogDataset) -> None:
    held_out = data.held_out("valid")
    text = bytes(held_out.tokens.tolist()).decode()
    responses = [line.removeprefix("assistant:") for line in text.splitlines(keepends=True) if line[0] == "a"]
    assert held_out.num_bytes == held_out.num_labels == len("".join(responses))


def test_bytes_are_those_of_labels_where_the_last_turn_is_too_long(chats: Path) -> None:
    """Of such a turn the first token that is kept has nothing before it in its row."""
    for seq_len in (1, 5, 16):
        held_out = DialogDataset(chats, ByteTokenizer(), seq_len).held_out("valid")
        labels = torch.cat([batch.labels.flatten() for batch in held_out.batches(seq_len, 3)])
        assert held_out.num_bytes == held_out.num_labels == int((labels != IGNORED).sum()) > 0


def test_windows_to_score_hold_whole_conversations(data: DialogDataset) -> None:
    held_out = data.held_out("valid")
    batches = [*held_out.batches(SEQ_LEN, 3)]
    assert sum(len(batch.tokens) for batch in batches) == len(held_out.positions(SEQ_LEN)) > 3
    parts = []
    for batch in batches:
        assert batch.document_ids is not None
        for tokens, labels, ids in zip(*batch[:3], strict=True):
            parts += [(tokens[ids == n].tolist(), labels[ids == n].tolist()) for n in range(int(ids[-1]) + 1)]
    texts = [bytes(tokens).decode() + "\n" for tokens, _ in parts if any(tokens)]
    assert "".join(texts) == bytes(held_out.tokens.tolist()).decode() and set(texts) <= TEXTS
    counted = [label for _, labels in parts for label in labels if label != IGNORED]
    assert held_out.counts is not None and counted == held_out.tokens[held_out.counts].tolist()
    assert len(held_out.positions(SEQ_LEN, 3)) == 3
    short = next(iter(held_out.batches(20, 1)))  # not even one fits: its end
    assert bytes(short.labels[0][short.labels[0] != IGNORED].tolist()) != b"" and short.tokens.shape == (
        1,
        20,
    )


def test_long_conversations_keep_their_latest_turns(chats: Path) -> None:
    data = DialogDataset(chats, ByteTokenizer(), 60)
    longer = sum(len(text) > 61 for text in TEXTS)
    assert data.cut == longer > 100
    assert f"; {longer} cut to their latest turns" in str(data)
    packed = data.splits["train"]
    for part, counts in zip(*(np.split(array, packed.ends[:-1]) for array in packed[:2]), strict=True):
        text = bytes(part.tolist()).decode()
        assert len(text) <= 61 and counts.any()
        assert any(whole.endswith(text) for whole in TEXTS)
    assert DialogDataset(chats, ByteTokenizer(), SEQ_LEN).cut == 0


def test_what_follows_the_last_response_is_left_out(tmp_path: Path) -> None:
    records = [conversation(n, 1) for n in range(200)]
    for record in records:
        record["messages"].append({"role": "user", "content": "Bye."})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    packed = DialogDataset(tmp_path / "a.jsonl", ByteTokenizer(), 20).splits["train"]
    assert b"Bye" not in bytes(packed.tokens.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_packing(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 16, 200)
    rows = pack_rows(lengths, 30, seed, 0, range(60))
    packed = [number for row in rows for number in row]
    assert all(sum(lengths[row]) <= 30 for row in rows)
    assert sum(lengths[packed]) > 0.97 * 60 * 30
    # Each once before any again, but for what waits its turn.
    assert len(set(packed[: 200 - LOOK_AHEAD])) == 200 - LOOK_AHEAD and max(np.bincount(packed)) <= 3


def test_recognised_and_opened_from_any_kind_of_file(
    chats: Path, tmp_path: Path, data: DialogDataset
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = chats.read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join(lines[:70]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[70:]).encode()))
    for path in (chats, folder):
        found = open_dataset(path, data_dir=tmp_path / "data", seq_len=SEQ_LEN)
        assert isinstance(found, DialogDataset)
        assert found.fingerprint == data.fingerprint
        assert torch.equal(
            found.batch(seed=0, index=0, rows=range(2)).tokens,
            data.batch(seed=0, index=0, rows=range(2)).tokens,
        )
    (tmp_path / "text.jsonl").write_text('{"text": "messages"}\n')
    (tmp_path / "text.txt").write_text(lines[0])
    assert not is_dialog(tmp_path / "text.jsonl") and not is_dialog(tmp_path / "text.txt")
    assert not is_dialog(tmp_path / "nowhere")


def test_other_files_of_a_folder_are_passed_over(chats: Path, tmp_path: Path, data: DialogDataset) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("# Chats\n")
    (folder / "about.json").write_text('{\n"messages": 300\n}\n')
    (folder / "an-empty.jsonl").touch()
    (folder / "chats.jsonl").write_bytes(chats.read_bytes())
    found = open_dataset(folder, data_dir=tmp_path / "data", seq_len=SEQ_LEN)
    assert isinstance(found, DialogDataset) and found.fingerprint == data.fingerprint
    assert "; 3 other files passed over; " in str(found) and "passed over" not in str(data)


def test_a_first_line_in_small_pieces(chats: Path, tmp_path: Path) -> None:
    """An unpacker may give the first bytes late: zstandard does, block by block."""
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    noise = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9FFF, 40_000)))
    line = json.dumps({"messages": [{"role": "user", "content": noise}]}, ensure_ascii=False)
    path = tmp_path / "chats.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(line.encode()))
    assert is_dialog(path)


def test_half_a_surrogate_is_kept_as_bytes(chats: Path) -> None:
    """As in other JSON lines, see `sources`."""
    turns = [{"role": "user", "content": "hi \ud83d"}, {"role": "assistant", "content": "\ude00"}]
    chats.write_text(f"{json.dumps({'messages': turns})}\n" * 3 + chats.read_text())
    text = bytes(DialogDataset(chats, ByteTokenizer(), SEQ_LEN).splits["train"].tokens.tolist())
    assert text.count(b"user: hi \xed\xa0\xbd\nassistant: \xed\xb8\x80\n") == 3


class Refusing(ByteTokenizer):
    def encode(self, text: str | bytes, invalid_bytes: InvalidBytes = "keep") -> np.ndarray:
        return super().encode(text, "refuse")


def test_what_a_tokenizer_refuses_is_named(chats: Path) -> None:
    lines = chats.read_text().splitlines()
    lines[1] = lines[1].replace('"1.', '"\\udfff1.')
    chats.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 2: text: byte 0xed at 1 is not UTF-8"):
        DialogDataset(chats, Refusing(), SEQ_LEN)


def test_a_damaged_first_line_is_named(chats: Path, tmp_path: Path) -> None:
    chats.write_text('{"messages": [\n' + chats.read_text())
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 1: "):
        open_dataset(chats, data_dir=tmp_path / "data", seq_len=SEQ_LEN)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", r"chats.jsonl, line 2: "),
        ('{"messages": []}', r"chats.jsonl, line 2: messages: expected a list that is not empty"),
        ('{"messages": [{"role": "user"}]}', r'chats.jsonl, line 2: message 1: .* no "content"'),
    ],
)
def test_a_bad_line_is_named(line: str, says: str, chats: Path) -> None:
    lines = chats.read_text().splitlines()
    chats.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(ValueError, match=says):
        DialogDataset(chats, ByteTokenizer(), SEQ_LEN)


def test_too_few_conversations(chats: Path) -> None:
    with pytest.raises(ValueError, match=r"too small: \d+ of its conversations, .* tokens, fall to valid"):
        DialogDataset(chats, ByteTokenizer(), 5000)
