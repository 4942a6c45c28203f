"""The state directory: what is in it, and who may write it.

    midge.db, -wal, -shm            the database (store/)
    models/<digest>.safetensors     models, and what strategies remember (models.py); .<random>.tmp while one is written
    agent-models/<run>/<agent>...   agents' own models, where they are kept (agent_models.py)
    spool/<run>/<round>.spool       frames of the current round (spool.py)
    service.json                    where a running coordinator serves HTTP (http.py)
    lock                            held by a running coordinator: two cannot share a directory

Whoever writes holds the lock. Whoever only looks needs none: the database has its own, models never change, and segments
of the spool only grow.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

LOCK = "lock"
MODELS = "models"
SPOOL = "spool"
_PATIENCE_S = 0.5
"""Somebody who looks whether the directory is in use holds its lock for a moment."""


class InUseError(Exception):
    """A coordinator is running in the directory."""


def lock(state_dir: Path) -> int:
    """Take the directory's lock, and return the descriptor that holds it until it is closed.

    Raises:
        InUseError: a coordinator has it.
        OSError: the lock's file cannot be opened.
    """
    fd = os.open(state_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    give_up_at = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                os.close(fd)
                raise InUseError(f"{state_dir}: another coordinator is running in it") from None
            time.sleep(0.02)
        else:
            return fd


def is_in_use(state_dir: Path) -> bool:
    """Whether a coordinator is running in the directory."""
    try:
        fd = os.open(state_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)
