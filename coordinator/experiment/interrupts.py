"""What Ctrl-C does to a program that has children: wherever it comes, none of them is left, and no traceback is shown.

An exception raised wherever the program happens to be could come between the start of a child and the line that notes it.
So a signal is only noted here, and the program ends where it looks:

    before anything is started   `exit_at_once`: say so and exit, from the handler
    at any later time            `Interrupts`: `check` raises what was noted, between steps; a block that waits says with
                                 `waking` how its wait is cut short

Nothing is imported here that takes time: Ctrl-C may come while the rest is imported.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self


class Interrupted(Exception):  # noqa: N818  no error: somebody wished it
    """A signal asked the program to end.

    Attributes:
        status: what to exit with, as shells have it: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(description(number))
        self.status = 128 + number


def description(number: int) -> str:
    """What is told to a person."""
    cause = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return f"stopped by {cause}; nothing is left running"


def exit_at_once() -> None:
    """From now on a signal ends the process where it is: for as long as there is nothing to end first."""

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        os.write(2, f"coordinator: {description(number)}\n".encode())
        os._exit(128 + number)

    for number in _signals():
        signal.signal(number, on_signal)


class Interrupts:
    """Notes signals while it is entered; what was in force before comes back after.

    Must be entered by the main thread.
    """

    def __init__(self) -> None:
        self._number = 0
        self._wake: Callable[[], None] = _nothing
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._on_signal) for number in _signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self._number:
            raise Interrupted(self._number)

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Call `wake` when a signal comes while the block runs, or came before it; then `check`.

        It is called from the signal handler: it may do no more than what is safe in the midst of anything.
        """
        self._wake = wake
        try:
            if self._number:
                wake()
            yield
        finally:
            self._wake = _nothing
        self.check()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._number = self._number or number
        self._wake()


def _signals() -> list[signal.Signals]:
    """Those that ask a program to end, without SIGHUP where nohup has it ignored."""
    return [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    ]


def _nothing() -> None:
    """Nobody waits."""
