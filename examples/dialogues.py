"""Makes small talk to fine-tune a model on: greetings, sums, words to repeat, to spell and to contradict.

    python examples/dialogues.py chats.jsonl
    python train.py --model lamda --data chats.jsonl --dim 128 --batch-size 8 --steps 800 --out runs/chats
    palm chat --checkpoint runs/chats

Each line of the file is a conversation: {"messages": [{"role": "user", "content": ...}, ...]}.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

NAMES = ["Ada", "Alan", "Barbara", "Edsger", "Emmy", "Grace", "Hedy", "John", "Kurt", "Mary", "Rosa", "Tim"]
WORDS = ["apple", "bread", "cloud", "dream", "eagle", "grape", "house", "juice", "lemon", "ocean", "piano"]
OPPOSITES = [
    ("hot", "cold"),
    ("big", "small"),
    ("up", "down"),
    ("day", "night"),
    ("old", "new"),
    ("wet", "dry"),
]
GREETINGS = ["Hello!", "Hi there!", "Good morning!", "Hey!"]


def exchange(draw: Random) -> tuple[str, str]:
    """A question and its answer."""
    kind = draw.choice(["sum", "sum", "repeat", "spell", "opposite", "name"])
    word = draw.choice(WORDS)
    if kind == "sum":
        a, b = draw.randint(0, 9), draw.randint(0, 9)
        return f"What is {a} + {b}?", f"{a} + {b} is {a + b}."
    if kind == "repeat":
        return f"Say {word}.", f"{word.capitalize()}!"
    if kind == "spell":
        return f"Spell {word}.", "-".join(word)
    if kind == "opposite":
        one, other = draw.choice(OPPOSITES)
        if draw.random() < 0.5:
            one, other = other, one
        return f"What is the opposite of {one}?", f"The opposite of {one} is {other}."
    name = draw.choice(NAMES)
    return f"My name is {name}.", f"Nice to meet you, {name}."


def conversation(draw: Random) -> list[dict[str, str]]:
    """One to four exchanges, of which the first may be a greeting and the last a good-bye."""
    turns = [exchange(draw) for _ in range(draw.randint(1, 3))]
    if draw.random() < 0.4:
        turns.insert(0, (draw.choice(GREETINGS), "Hello! How can I help you?"))
    if draw.random() < 0.3:
        turns.append(("Bye.", "Good-bye!"))
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="to write")
    parser.add_argument("--count", type=int, default=4000, help="of conversations (default: 4000)")
    parser.add_argument("--seed", type=int, default=0, help="decides them (default: 0)")
    options = parser.parse_args()
    draw = Random(options.seed)
    lines = (json.dumps({"messages": conversation(draw)}) for _ in range(options.count))
    options.file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{options.file}: {options.count:,} conversations")


if __name__ == "__main__":
    main()
