"""Conversations as text, for fine-tuning and for `palm chat`: the template, and how it becomes tokens.

A conversation is a list of messages, each of a role (system, user or assistant) and its content. Each is a
line of text, in which a backslash of the content becomes two, and a new line a backslash and an n:

    user: What is 2 + 3?
    assistant: 5
    user: And in words?\\nAs a list.
    assistant: - two\\n- three\\n- five

So a new line ends a turn and nothing else does, and everything else is the content's own. Role and colon are
encoded by themselves, then a space and the content, then the new line: however a tokenizer merges, the prompt
`assistant:` has the tokens that training saw. A model learns what is in an assistant's line after the colon,
its new line included, and writes until it writes that.

Shapes: n tokens of a turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from palm_pytorch.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
RESPONDER = "assistant"
ESCAPES = {"\\": "\\\\", "\n": "\\n"}
UNESCAPES = {escaped: character for character, escaped in ESCAPES.items()}


class Message(NamedTuple):
    """What one side says in one turn."""

    role: str
    content: str


class Turn(NamedTuple):
    """The tokens `(n,)` of a message, and which of them, `(n,)` bool, a model learns to write."""

    tokens: np.ndarray
    counts: np.ndarray


class DialogTemplate:
    """The template above in the tokens of a tokenizer.

    Raises:
        ValueError: the tokenizer has no token of its own for a new line.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        newline = tokenizer.encode("\n").tolist()
        if len(newline) != 1 or tokenizer.decode(newline) != "\n":
            raise ValueError(
                f"tokenizer is {tokenizer}, which makes {newline} of a new line, the end of a turn; expected "
                "one token, as that of bytes does or one of `palm tokenizer train`"
            )
        self.end_of_turn: int = newline[0]

    def turn(self, message: Message) -> Turn:
        """A message as tokens."""
        start = self.start(message.role)
        content = "".join(ESCAPES.get(character, character) for character in message.content)
        tokens = np.concatenate([start, self.tokenizer.encode(f" {content}"), [self.end_of_turn]])
        counts = np.zeros(len(tokens), dtype=bool)
        counts[len(start) :] = message.role == RESPONDER
        return Turn(tokens.astype(self.tokenizer.dtype), counts)

    def start(self, role: str) -> np.ndarray:
        """The tokens after which a turn of `role` is written."""
        return self.tokenizer.encode(f"{role}:")

    def content(self, tokens: Sequence[int] | np.ndarray) -> str:
        """What a model wrote after `start`, up to the end of its turn, as the content of a message."""
        written = np.asarray(tokens).tolist()
        if self.end_of_turn in written:
            written = written[: written.index(self.end_of_turn)]
        text = self.tokenizer.decode(written).removeprefix(" ")
        return re.sub(r"\\[\\n]", lambda found: UNESCAPES[found[0]], text)


def latest(turns: Sequence[Turn], room: int) -> Turn:
    """As many of the last turns as fit in `room` tokens, as one; the end of the last one if it does not."""
    first, length = len(turns) - 1, len(turns[-1].tokens)
    while first > 0 and (longer := length + len(turns[first - 1].tokens)) <= room:
        first, length = first - 1, longer
    tokens, counts = (np.concatenate(parts) for parts in zip(*turns[first:], strict=True))
    return Turn(tokens[-room:], counts[-room:])


def parse_conversation(record: Any) -> list[Message]:
    """The messages of a record `{"messages": [{"role": ..., "content": ...}, ...]}`.

    Raises:
        ValueError: it is no such record, or has no response to learn from.
    """
    if not isinstance(record, dict) or "messages" not in record:
        raise ValueError('expected an object with "messages"')
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages: expected a list that is not empty, got {str(messages)[:50]}")
    parsed = [parse_message(message, f"message {number}") for number, message in enumerate(messages, 1)]
    if all(message.role != RESPONDER for message in parsed):
        raise ValueError(f"none of its messages is of the {RESPONDER}, and nothing could be learned from it")
    return parsed


def parse_message(message: Any, where: str) -> Message:
    for key in Message._fields:
        if not isinstance(message, dict) or key not in message:
            raise ValueError(f'{where}: expected an object with "role" and "content", and it has no "{key}"')
        if not isinstance(message[key], str):
            raise ValueError(f"{where}: {key} is {message[key]!r}; expected text")
    role, content = cast(str, message["role"]), cast(str, message["content"])
    if role not in ROLES:
        raise ValueError(f"{where}: role is {role!r}; expected one of {', '.join(ROLES)}")
    # Half a surrogate pair stays, as in a text, as its bytes, which a tokenizer takes as "surrogateescape".
    kept = content.encode("utf-8", errors="surrogatepass").decode("utf-8", errors="surrogateescape")
    return Message(role, kept)
