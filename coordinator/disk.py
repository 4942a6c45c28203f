"""When the disk fails: what can be outlived, how to find out that it is over, and when to look.

A run is *parked* when a write to the state directory fails. What it had decided was not persisted, so nothing of that may be
done, and its memory is ahead of the disk: it is thrown away. The process stays up, says why it waits, and tries again, less
and less often. Once there is room, the run is made anew from what is on disk, as it would be by a restart, and goes on.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from pathlib import Path

LEFTOVER = ".room.tmp"
_SURVIVABLE = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # no room: the disk, the quota, the limit on a file
        *(errno.EROFS, errno.EACCES, errno.EPERM),  # not writable: a disk that failed is often mounted so
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO),  # broken, or a server is away
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),  # the machine is out of descriptors or memory
        errno.EAGAIN,  # somebody else holds the database for too long
    }
)
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_CALM_S = 60.0
"""A failure so long after the last one is a new one: it is tried again soon."""


def survivable(error: OSError) -> bool:
    """Whether what failed may work again without a restart."""
    return error.errno in _SURVIVABLE


def probe_room(directory: Path, size_bytes: int) -> None:
    """Find out whether so much can be written in a directory, durably, and leave nothing of it.

    Raises:
        OSError: it cannot.
    """
    path = directory / LEFTOVER
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size_bytes)
        os.pwrite(fd, b"\1" * 4096, 0)
        os.fsync(fd)
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            path.unlink()


class Parking:
    """Whether the run is parked, why, and when to try again. Pure: `now` is monotonic seconds.

    Attributes:
        reason: why; empty where it is not parked.
        retry_at: when to try again; infinity where it is not parked.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.retry_at = math.inf
        self._since = 0.0
        self._pause_s = 0.0
        self._resumed_at = -math.inf

    @property
    def is_parked(self) -> bool:
        """Whether nothing can be written."""
        return bool(self.reason)

    def failed(self, reason: str, now: float) -> bool:
        """A write, or another try, failed; returns whether the reason is news."""
        is_news = reason != self.reason
        if not self.is_parked:
            self._since = now
        is_new = not self.is_parked and now - self._resumed_at > _CALM_S
        self._pause_s = _FIRST_PAUSE_S if is_new else min(self._pause_s * 2, _LONGEST_PAUSE_S)
        self.reason = reason
        self.retry_at = now + self._pause_s
        return is_news

    def resumed(self, now: float) -> float:
        """It can be written again; returns for how many seconds it could not."""
        self.reason = ""
        self.retry_at = math.inf
        self._resumed_at = now
        return now - self._since

    def status(self, now: float) -> str:
        """One line: what is wrong, since when, and until when nothing is tried."""
        since_s, left_s = now - self._since, max(0.0, self.retry_at - now)
        return f"waiting for the disk for {since_s:.0f} s: {self.reason}; trying again in {left_s:.0f} s"
