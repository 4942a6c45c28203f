"""Two things about files that the standard library leaves to its callers."""

from __future__ import annotations

import os
from pathlib import Path


def write_at(fd: int, body: bytes | memoryview, offset: int) -> None:
    """Write all of `body` at `offset`, where `os.pwrite` may stop short. Any thread may, with no shared position.

    Raises:
        OSError: the disk is full or fails; a part may be written.
    """
    done = os.pwrite(fd, body, offset)
    while done < len(body):
        done += os.pwrite(fd, memoryview(body)[done:], offset + done)


def sync_dir(path: Path) -> None:
    """Make what was created, renamed or removed in a directory durable: syncing the files themselves does not."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
