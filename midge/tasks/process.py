"""A child process that runs a task, and the pipes to it. It holds torch, so that its parent need not.

Requests and replies are length-prefixed byte strings over the child's stdin and stdout; what they mean is for parent and child.
A child whose parent is gone, even by SIGKILL, sees its stdin end and exits at once, in the middle of a training too.

A task may start processes of its own (loaders of data, say). They are in the child's process group, and end with it, however
it ends: a fork of it holds all its pipes, which would look as if it still lived.
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
from pathlib import Path
from typing import IO

_LENGTH = struct.Struct("<I")
_MAX_BYTES = 256 * 1024 * 1024
_TAIL_LINES = 20
_MAX_LINE_BYTES = 4096
"""Of what a child complains, taken at once: a progress bar may never end its line."""
_DRAIN_S = 2.0

_log = logging.getLogger("midge.tasks.process")


class Child:
    """A child process.

    Args:
        module: run as `python -m module`; its main function calls `serve`.
        arguments: of its command line.
        on_reply: called from a thread of this class for each reply.
        on_exit: called once, from another one, after the last reply, when the process ended unasked: the reason in words.
        environment: added to this process's.

    Raises:
        OSError: it cannot be started, for want of memory, say.
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
        self._is_garbled = False
        self._lock = threading.Lock()  # over ending the process: once it was waited for, its id may be another's
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
        self._reply_thread = threading.Thread(target=self._read_replies, name=f"{module}-stdout", daemon=True)
        self._exit_thread = threading.Thread(target=self._await_exit, name=f"{module}-exit", daemon=True)
        for thread in (self._error_thread, self._reply_thread, self._exit_thread):
            thread.start()

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
        self._kill()
        if threading.current_thread() not in (self._reply_thread, self._exit_thread):
            self._exit_thread.join()

    def _kill(self) -> None:
        """End the process, and all that it started."""
        with self._lock:
            if self._process.returncode is None:
                os.killpg(self.pid, signal.SIGKILL)

    def _read_replies(self) -> None:
        assert self._process.stdout is not None
        try:
            while (reply := _read(self._process.stdout)) is not None:
                try:
                    self._on_reply(reply)
                except Exception:  # noqa: BLE001  the thread must live on
                    _log.exception("a reply of child %d could not be handled", self.pid)
        except _GarbledError:
            self._is_garbled = True
            self._kill()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        while line := self._process.stderr.readline(_MAX_LINE_BYTES):
            text = line.decode(errors="replace").rstrip()
            if text:
                self._errors.append(text)
                _log.debug("child %d: %s", self.pid, text)

    def _await_exit(self) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self._kill()
        self._reply_thread.join(_DRAIN_S)
        self._error_thread.join(_DRAIN_S)
        with self._lock:
            status = self._process.wait()
        if not self._stopping:
            self._on_exit(self._explain(status))

    def _explain(self, status: int) -> str:
        if self._is_garbled:
            return "the process was ended, since what it sent is no reply: does a part of it write to a pipe of ours?"
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
    stdin, stdout = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task prints must not end up among the replies
    with Path(os.devnull).open(
        "rb"
    ) as nothing:  # nor must it read a request. And a thread that waits in sys.stdin holds
        os.dup2(nothing.fileno(), 0)  # its lock, without which the interpreter cannot end but by SIGABRT

    def read() -> None:
        while (request := _read(stdin)) is not None:
            if not interrupt(request):
                requests.put(request)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # with all that a task has started
        os._exit(0)

    lock = threading.Lock()

    def reply(message: bytes) -> None:
        with lock:
            stdout.write(_LENGTH.pack(len(message)) + message)
            stdout.flush()

    threading.Thread(target=read, name="requests", daemon=True).start()
    while True:
        handle(requests.get(), reply)


class _GarbledError(Exception):
    """What came cannot be a message."""


def _read(pipe: IO[bytes]) -> bytes | None:
    """The next message; None at the end."""
    try:
        head = pipe.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack(head)
        if length > _MAX_BYTES:
            raise _GarbledError
        body = pipe.read(length)
    except (OSError, ValueError):
        return None
    return body if len(body) == length else None
