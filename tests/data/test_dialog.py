"""The template of conversations: its text, its tokens, what counts, what comes back, and what is refused."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_pytorch.data.dialog import DialogTemplate, Message, Turn, latest, parse_conversation
from palm_pytorch.data.tokenizer import ByteTokenizer, IntegerTokenizer
from palm_pytorch.data.tokenizer_files import SentencePieceTokenizer
from palm_pytorch.data.tokenizer_training import train_tokenizer

BYTES = DialogTemplate(ByteTokenizer())


def pieces() -> DialogTemplate:
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoins", k=draw.randint(2, 6))) for n in range(99)]
    text = "user: assistant: " + " ".join(draw.choices(words, k=400))
    return DialogTemplate(SentencePieceTokenizer(train_tokenizer([text], vocab_size=320)))


@pytest.mark.parametrize("make", [lambda: BYTES, pieces], ids=["bytes", "bpe"])
def test_the_text_is_that_of_the_template(make: Any) -> None:
    template = make()
    turns = [
        template.turn(Message("system", "Be brief.")),
        template.turn(Message("user", "As a list?\nIs \\n new?")),
        template.turn(Message("assistant", "- one\n- two")),
    ]
    tokens, counts = latest(turns, 1000)
    text = "system: Be brief.\nuser: As a list?\\nIs \\\\n new?\nassistant: - one\\n- two\n"
    assert template.tokenizer.decode(tokens) == text
    assert template.tokenizer.decode(tokens[counts]) == " - one\\n- two\n"
    assert not counts[: -counts.sum()].any()  # the response is the end of it
    assert tokens[-1] == template.end_of_turn and tokens.dtype == template.tokenizer.dtype


@pytest.mark.parametrize("make", [lambda: BYTES, pieces], ids=["bytes", "bpe"])
def test_any_content_comes_back_and_only_its_end_ends_it(make: Any) -> None:
    template = make()

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(st.text() | st.text(st.sampled_from("\\n\n a")))
    def check(content: str) -> None:
        tokens, counts = template.turn(Message("assistant", content))
        assert np.flatnonzero(tokens == template.end_of_turn).tolist() == [len(tokens) - 1]
        written = tokens[counts].tolist()
        assert template.content(written) == content
        assert template.content([*written, 0, 5, template.end_of_turn]) == content  # what comes after it
        assert template.content(written[:-1]) == content  # cut off before it
        start = template.start("assistant")
        assert tokens[: len(start)].tolist() == start.tolist()  # a prompt is what training saw

    check()


def turn(length: int, name: int) -> Turn:
    return Turn(np.full(length, name), np.full(length, name % 2 == 0))


@pytest.mark.parametrize(
    ("room", "kept"),
    [
        (9, [1, 1, 1, 2, 2, 3, 3, 3, 3]),
        (8, [2, 2, 3, 3, 3, 3]),
        (6, [2, 2, 3, 3, 3, 3]),
        (5, [3] * 4),
        (3, [3] * 3),
    ],
)
def test_the_latest_turns_are_kept(room: int, kept: list[int]) -> None:
    tokens, counts = latest([turn(3, 1), turn(2, 2), turn(4, 3)], room)
    assert tokens.tolist() == kept and counts.tolist() == [name == 2 for name in kept]


def test_a_tokenizer_without_new_lines() -> None:
    with pytest.raises(ValueError, match=r"tokenizer is integers below 300, which makes .* of a new line"):
        DialogTemplate(IntegerTokenizer(300))


def test_conversations_are_read() -> None:
    record = {
        "id": 7,
        "messages": [{"role": "user", "content": "a", "at": 1}, {"role": "assistant", "content": ""}],
    }
    assert parse_conversation(record) == [Message("user", "a"), Message("assistant", "")]


USER = {"role": "user", "content": "Hello!"}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ([], 'expected an object with "messages"'),
        ({"text": "a"}, 'expected an object with "messages"'),
        ({"messages": []}, r"messages: expected a list that is not empty, got \[\]"),
        ({"messages": "hello"}, "messages: expected a list that is not empty, got hello"),
        ({"messages": [USER]}, "none of its messages is of the assistant"),
        ({"messages": [USER, "hello"]}, 'message 2: .* it has no "role"'),
        ({"messages": [USER, {"content": "a"}]}, 'message 2: .* it has no "role"'),
        ({"messages": [USER, {"role": "assistant"}]}, 'message 2: .* it has no "content"'),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: content is None; expected text"),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            "role is 'bot'; expected one of system, user, assistant",
        ),
    ],
)
def test_what_is_no_conversation(record: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_conversation(record)
