"""Between the coordinator's loop and a disk that may fail: parks the run, tries again, and says how it is. See disk.py."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.disk import Parking, probe_room, survivable
from coordinator.driver import Driver
from coordinator.models import ModelError
from coordinator.observer import Watch
from coordinator.spool import Spool
from coordinator.store import Store, StoreError
from midge.log import log_event

_log = logging.getLogger("coordinator")
_DISK_EVERY_S = 10.0
_LEAST_ROOM_BYTES = 8 << 20
"""A run that waits for the disk goes on once this and a model can be written: extents of the spool, the database's log."""
_LEAST_FREE_BYTES = 64 << 20
"""With less room than this in the state directory, the coordinator is not ready."""


class DiskGuard:
    """Guards one coordinator's state directory.

    Args:
        state_dir: which.
        store: the database.
        spool: the frames.
        driver: has the run.
        watch: is told.
        let_go: forgets what is under way, since the run is parked; is given the reason.
        go_on: makes the run anew from what is stored.

    Attributes:
        run_id: of the current run; empty where there is none.
    """

    def __init__(
        self,
        state_dir: Path,
        store: Store,
        spool: Spool,
        driver: Driver,
        watch: Watch,
        let_go: Callable[[str], None],
        go_on: Callable[[float], None],
    ) -> None:
        self.run_id = ""
        self._state_dir = state_dir
        self._store = store
        self._spool = spool
        self._driver = driver
        self._watch = watch
        self._let_go = let_go
        self._go_on = go_on
        self._parking = Parking()
        self._problem = ""
        self._look_at = -math.inf

    @property
    def is_parked(self) -> bool:
        """Whether the run waits for the disk."""
        return self._parking.is_parked

    @property
    def retry_at(self) -> float:
        """When `try_again` has something to do."""
        return self._parking.retry_at

    def status(self) -> str:
        """One line on what a parked run waits for."""
        return self._parking.status(time.monotonic())

    def outlive(self, work: Callable[[float], None]) -> None:
        """Do a part of a turn; where the disk fails, or memory is short, park the run, and go on with the next part.

        Raises:
            OSError: it failed in a way that will not pass.
        """
        now = time.monotonic()
        try:
            work(now)
        except OSError as error:
            if not survivable(error):
                raise
            self._park(error, now)
        except MemoryError:
            self._park(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), now)

    def _park(self, error: OSError, now: float) -> None:
        self._driver.park()
        reason = _said(error)
        self._let_go(reason)
        if self._parking.failed(reason, now):
            log_event(_log, logging.ERROR, "the disk fails; the run waits", run=self.run_id, reason=reason)
        self._watch.parked(reason)
        self._look_at = -math.inf

    def try_again(self, now: float, model_bytes: int) -> None:
        """Try whether it can be written again; if so, have the run made anew from what is stored, as a restart does.

        Raises:
            OSError: it cannot.
        """
        if now < self._parking.retry_at:
            return
        probe_room(self._state_dir, _LEAST_ROOM_BYTES + model_bytes)
        self._store.probe()
        self._spool.reopen()
        self._driver.write_waiting(self.run_id)
        try:
            self._go_on(now)
        except (ModelError, StoreError) as error:  # what the disk holds is not what was written to it
            raise OSError(errno.EIO, str(error)) from None
        parked_s = round(self._parking.resumed(now), 1)
        log_event(
            _log, logging.INFO, "the disk can be written again; the run goes on", run=self.run_id, parked_s=parked_s
        )
        self._watch.unparked(parked_s)
        self._look_at = -math.inf

    def problem(self) -> str:
        """Why the coordinator is not ready, as far as its disk goes; empty where it is. Cheap: it looks now and then."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _DISK_EVERY_S
            self._problem = self._look()
        return self._problem

    def _look(self) -> str:
        if self.is_parked:
            return f"the state directory cannot be written: {self._parking.reason}"
        try:
            free_bytes = shutil.disk_usage(self._state_dir).free
        except OSError as error:
            return _said(error)
        short = free_bytes < _LEAST_FREE_BYTES
        return f"{self._state_dir}: {free_bytes >> 20} MB are free; make room" if short else ""


def _said(error: OSError) -> str:
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename and error.strerror else what
