"""A conversation with a trained model: what `palm chat` does."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch

from palm_pytorch.data.dialog import RESPONDER, DialogTemplate, Message, Turn, latest
from palm_pytorch.generation.ranking import sample_and_rank
from palm_pytorch.training.generating import visible
from palm_pytorch.training.options import POSITIVE, option
from palm_pytorch.training.trained import ModelOptions, load_trained

WINDOW = 1024  # tokens, for a model of which it is not known what it was trained on


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ModelOptions):
    """Options of `palm chat`."""

    top_k: int | None = option("text", "draw from the likeliest so many", default=40)
    num_candidates: int = option("text", "replies to choose the likeliest from", POSITIVE, default=16)
    window: int | None = option(
        "prompt",
        f"tokens of a conversation that it sees, its reply too (default: its run's --seq-len, or {WINDOW})",
        POSITIVE,
        default=None,
    )
    system: str | None = option("prompt", "a message of the system to begin with", default=None)


def chat(options: ChatOptions) -> None:
    """Answer each line of standard input with the likeliest of several replies, until it ends.

    Each reply is drawn and ranked as LaMDA's are (`sample_and_rank`), in the template of `data/dialog.py`,
    after as many of the latest turns as the window leaves room for beside it.

    Raises:
        ValueError: the window is too small for a word of each side, or the tokenizer does not suit.
    """
    trained = load_trained(options)
    if trained.dialog is False:
        print("palm: this model was not trained on conversations; do not expect answers", file=sys.stderr)
    template = DialogTemplate(trained.tokenizer)
    start = template.start(RESPONDER)
    window = options.window or trained.seq_len or WINDOW
    sampling = options.sampling(trained.device)
    sampling["max_new_tokens"] = min(options.max_new_tokens, window // 2)
    room = window - len(start) - sampling["max_new_tokens"]
    if room < 1:
        raise ValueError(f"window is {window}; expected at least {2 * len(start) + 2} tokens")
    turns: list[Turn] = []
    if options.system is not None:
        turns.append(template.turn(Message("system", options.system)))
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        turns.append(template.turn(Message("user", line.rstrip("\n"))))
        prompt = np.concatenate([latest(turns, room).tokens, start]).astype(np.int64)
        text = torch.from_numpy(prompt)[None].to(trained.device)
        ranked = sample_and_rank(trained.model, text, eos_token=template.end_of_turn, **sampling)
        reply = template.content(ranked.tokens[0, 0].tolist())
        print(visible(reply), flush=True)
        turns.append(template.turn(Message(RESPONDER, reply)))
