"""A child for the tests of `midge.tasks.process`: a request is a word and its argument, and the word says how to behave.

Run with the argument `parent`, it is a parent that has such a child, for tests that kill parents; with `noisy`, it writes
where replies go before it serves.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from midge.tasks.process import Child, serve

_LONG_S = 60.0


def handle(request: bytes, reply: Callable[[bytes], None]) -> None:
    """Serve one request."""
    word, _, argument = request.partition(b" ")
    match word:
        case b"say":
            reply(argument)
        case b"size":
            reply(b"\x00\xff" * (int(argument) // 2))
        case b"print":
            sys.stdout.write(argument.decode())
            sys.stdout.flush()
            os.write(1, argument)
            reply(b"printed")
        case b"complain":
            sys.stderr.buffer.write(argument + b"\n")
            sys.stderr.flush()
            reply(b"complained")
        case b"mutter":  # as a progress bar does: much text, and no end of the line
            for _ in range(int(argument) // 1000):
                sys.stderr.buffer.write(b"." * 999 + b"\r")
            sys.stderr.flush()
            reply(b"muttered")
        case b"exit":
            sys.exit(int(argument))
        case b"raise":
            raise ValueError(argument.decode())
        case b"fork":  # as a pool of processes does: it has every pipe that the child has
            pid = os.fork()
            if pid == 0:
                time.sleep(_LONG_S)
                os._exit(0)
            reply(str(pid).encode())
        case b"train":
            reply(b"began")
            until = time.monotonic() + _LONG_S
            while time.monotonic() < until and not _cancelled.is_set():
                sum(range(1000))
            reply(b"cancelled" if _cancelled.is_set() else b"done")


_cancelled = threading.Event()


def interrupt(request: bytes) -> bool:
    """Take a cancellation at once."""
    if request == b"cancel":
        _cancelled.set()
        return True
    return False


def parent() -> None:
    """Start a child, tell its pid, and wait to be killed."""
    told = threading.Event()
    child = Child("tests.unit.tiny_child", [], lambda _: told.set(), lambda _: None)
    child.send(b"train")
    told.wait()
    sys.stdout.write(f"{child.pid}\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    if sys.argv[1:] == ["parent"]:
        parent()
    if sys.argv[1:] == ["noisy"]:
        os.write(1, b"Welcome to tiny 1.0\n")
    serve(handle, interrupt)
