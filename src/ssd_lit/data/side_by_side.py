"""Texts encoded by several processes, in order."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from ssd_lit.config import ConfigError
from ssd_lit.data.tokenizer import end_of_text_id, load_tokenizer
from ssd_lit.data.words import WordEncoder


def encoded(tokenizer_dir: Path, dtype: str, batches: Iterable[list[str]], processes: int) -> Iterator[bytes]:
    """The bytes of `WordEncoder.encode` for each batch, in order; with one process they are made in this one.

    A process ends once nobody is left at the other end of its pipe. Raises ConfigError as `WordEncoder` does.
    """
    if processes == 1:
        yield from map(_encoder(tokenizer_dir, dtype).encode, batches)
        return
    with ExitStack() as stack:
        pipes = [stack.enter_context(_start(tokenizer_dir, dtype)) for _ in range(processes)]
        sent = received = 0
        for texts in batches:
            if sent - received == processes:
                yield _receive(pipes[received % processes])
                received += 1
            pipes[sent % processes].send(texts)
            sent += 1
        for number in range(received, sent):
            yield _receive(pipes[number % processes])


def _encoder(tokenizer_dir: Path, dtype: str) -> WordEncoder:
    return WordEncoder(load_tokenizer(tokenizer_dir), end_of_text_id(tokenizer_dir), np.dtype(dtype))


def _start(tokenizer_dir: Path, dtype: str) -> Connection:
    context = get_context("spawn")  # the library's threads do not survive a fork
    ours, theirs = context.Pipe()
    context.Process(target=_work, args=(theirs, tokenizer_dir, dtype), daemon=True).start()
    theirs.close()
    return ours


def _receive(pipe: Connection) -> bytes:
    try:
        content: bytes | str = pipe.recv()
    except EOFError:
        raise OSError("a process that encodes text has ended before its time") from None
    if isinstance(content, str):
        raise ConfigError(content)
    return content


def _work(pipe: Connection, tokenizer_dir: Path, dtype: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the first process closes the pipe
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = _encoder(tokenizer_dir, dtype)
    while True:
        try:
            texts = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(encoder.encode(texts))
        except ConfigError as error:
            pipe.send(str(error))
        except BrokenPipeError:
            return
