"""A child process that runs a task, and the pipes to it. It holds torch, so that its parent need not.

Requests and replies are length-prefixed byte strings over the child's stdin and stdout; what they mean is for parent and child.
A child whose parent is gone, even by SIGKILL, sees its stdin end and exits at once, in the middle of a training too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Protocol

_LENGTH = struct.Struct("<I")
_MAX_BYTES = 256 * 1024 * 1024
_TAIL_LINES = 20

_log = logging.getLogger("midge.tasks.process")


class ChildLike(Protocol):
    """What a driver needs of a child; tests bring their own."""

    def send(self, request: bytes) -> None:
        """Send a request."""

    def stop(self) -> None:
        """End it."""


class Child:
    """A child process.

    Args:
        module: run as `python -m module`; its main function calls `serve`.
        arguments: of its command line.
        on_reply: called from a thread of this class for each reply.
        on_exit: called once, from that thread, when the process ended unasked, with the reason in words.
        environment: added to this process's.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        on_reply: Callable[[bytes], None],
        on_exit: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._on_reply = on_reply
        self._on_exit = on_exit
        self._stopping = False
        self._errors: deque[str] = deque(maxlen=_TAIL_LINES)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # a Ctrl-C in the terminal is for the parent, which ends the child itself
        )
        self._error_thread = threading.Thread(target=self._read_errors, name=f"{module}-stderr", daemon=True)
        self._error_thread.start()
        self._thread = threading.Thread(target=self._read_replies, name=f"{module}-stdout", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, request: bytes) -> None:
        """Send a request. If the process is gone, `on_exit` says so; this does not."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(_LENGTH.pack(len(request)) + request)
            self._process.stdin.flush()

    def stop(self) -> None:
        """End the process, now. `on_exit` is not called."""
        self._stopping = True
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2.0)

    def _read_replies(self) -> None:
        assert self._process.stdout is not None
        while (reply := _read(self._process.stdout)) is not None:
            try:
                self._on_reply(reply)
            except Exception:  # noqa: BLE001  the thread must live on
                _log.exception("a reply of child %d could not be handled", self.pid)
        status = self._process.wait()
        if not self._stopping:
            self._error_thread.join(timeout=1.0)
            self._on_exit(self._explain(status))

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode(errors="replace").rstrip()
            if text:
                self._errors.append(text)
                _log.debug("child %d: %s", self.pid, text)

    def _explain(self, status: int) -> str:
        if status == -signal.SIGKILL:
            return "the process was killed (SIGKILL): most likely out of memory"
        if status < 0:
            return f"the process was ended by {signal.Signals(-status).name}"
        last = f": {self._errors[-1]}" if self._errors else ""
        return f"the process ended with status {status}{last}"


def serve(handle: Callable[[bytes, Callable[[bytes], None]], None], interrupt: Callable[[bytes], bool]) -> None:
    """The child's main loop: hand each request, in order, to `handle`, together with a function that sends a reply.

    Args:
        handle: runs on the main thread, one request at a time.
        interrupt: called at once, on the thread that reads, for each request; true if it was for that thread alone.
    """
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task prints must not end up among the replies

    def read() -> None:
        while (request := _read(stdin)) is not None:
            if not interrupt(request):
                requests.put(request)
        os._exit(0)

    lock = threading.Lock()

    def reply(message: bytes) -> None:
        with lock:
            stdout.write(_LENGTH.pack(len(message)) + message)
            stdout.flush()

    threading.Thread(target=read, name="requests", daemon=True).start()
    while True:
        handle(requests.get(), reply)


def _read(pipe: IO[bytes]) -> bytes | None:
    try:
        head = pipe.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack(head)
        if length > _MAX_BYTES:
            return None
        body = pipe.read(length)
    except (OSError, ValueError):
        return None
    return body if len(body) == length else None
