"""The coordinator's disk: every write to it can be made to fail, before it is done or, as it seems, after."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Disk:
    """The disk.

    Attributes:
        num_writes: that were tried since the beginning.
        num_failures: of these.
        on_failure: is called at each.
    """

    def __init__(self) -> None:
        self.num_writes = 0
        self.num_failures = 0
        self.on_failure: Callable[[], None] = lambda: None
        self._failing = range(0)
        self._is_broken = False
        self._lands = False

    def fail(self, first: int, times: int = 1, *, lands: bool = False) -> None:
        """Let `times` writes fail, the first of them number `first`, from 1; with `lands`, they are done none the less."""
        self._failing = range(first, first + times)
        self._lands = lands

    def break_down(self) -> None:
        """Let all writes fail until `mend`."""
        self._is_broken = True

    def mend(self) -> None:
        """Let nothing fail any more."""
        self._is_broken = False
        self._failing = range(0)

    @contextmanager
    def write(self) -> Iterator[None]:
        """The block is a write."""
        self.num_writes += 1
        fails = self._is_broken or self.num_writes in self._failing
        if fails and not self._lands:
            self._fail()
        yield
        if fails:
            self._fail()

    def _fail(self) -> None:
        self.num_failures += 1
        self.on_failure()
        number = errno.EIO if self._lands else errno.ENOSPC
        raise OSError(number, os.strerror(number))
