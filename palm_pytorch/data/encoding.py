"""Blocks of text to tokens, by several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np

from palm_pytorch.data.blocks import SPLITS, Block
from palm_pytorch.data.tokenizer import InvalidBytes, Tokenizer

AHEAD = 3  # blocks under way for each process, so that none waits and memory stays flat


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Encoded(NamedTuple):
    """What a block adds to a split; see `PartWriter.append`."""

    tokens: np.ndarray
    ends: np.ndarray
    num_bytes: int
    first_bytes: int


def encode_block(block: Block, tokenizer: Tokenizer, invalid_bytes: InvalidBytes) -> list[Encoded]:
    """The tokens of a block, for each of `SPLITS`. A document that ends in it gets an end token."""
    try:
        encoded = tokenizer.encode_batch([piece.text for piece in block], invalid_bytes)
    except ValueError:
        _name_refused(block, tokenizer, invalid_bytes)
        raise
    end_token = np.array([] if tokenizer.eos_token is None else [tokenizer.eos_token], dtype=tokenizer.dtype)
    result = []
    for split in range(len(SPLITS)):
        arrays: list[np.ndarray] = [end_token[:0]]
        ends: list[int] = []
        firsts: list[int] = []
        length = num_bytes = 0
        for piece, tokens in zip(block, encoded, strict=True):
            if piece.split != split:
                continue
            num_bytes += len(piece.text)
            arrays.append(tokens)
            length += len(tokens)
            if piece.begins:
                firsts.extend(tokens[:1])
            if piece.ends:
                arrays.append(end_token)
                length += len(end_token)
                ends.append(length)
        first_bytes = tokenizer.num_bytes(np.array(firsts, tokenizer.dtype)) if firsts else 0
        tokens = np.concatenate(arrays).astype(tokenizer.dtype, copy=False)
        result.append(Encoded(tokens, np.array(ends, dtype=np.int64), num_bytes, first_bytes))
    return result


def _name_refused(block: Block, tokenizer: Tokenizer, invalid_bytes: InvalidBytes) -> None:
    """Raise the ValueError of the first refused piece, with its place, which a batch does not tell."""
    for piece in block:
        try:
            tokenizer.encode(piece.text, invalid_bytes)
        except ValueError as error:
            raise ValueError(f"{piece.where}: {error}") from error


def encode_blocks(
    blocks: Iterable[Block], tokenizer: Tokenizer, *, workers: int, invalid_bytes: InvalidBytes
) -> Iterator[list[Encoded]]:
    """`encode_block` of each, in order, by `workers` processes, or in this one if that is 1.

    Raises:
        ValueError: as `Tokenizer.encode`, with where the text is.
        ChildProcessError: a worker died.
    """
    if workers == 1:
        yield from (encode_block(block, tokenizer, invalid_bytes) for block in blocks)
        return
    # Spawned, because the libraries that this process has loaded have threads, which do not survive a fork.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, invalid_bytes),
    )
    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        for block in blocks:
            waiting.append(pool.submit(_work, block))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(f"one of {workers} workers died, perhaps for want of memory") from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Tokenizer, InvalidBytes]


def _start_worker(tokenizer: Tokenizer, invalid_bytes: InvalidBytes) -> None:
    global _worker
    _worker = (tokenizer, invalid_bytes)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has a core to itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    parent = multiprocessing.parent_process()
    if parent is not None:  # which, when killed outright, cannot
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _work(block: Block) -> list[Encoded]:
    return encode_block(block, *_worker)
