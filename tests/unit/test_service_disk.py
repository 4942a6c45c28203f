"""The loop on a disk that fails: an operator who asks is answered at once, and nothing is claimed that is not so."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import Future
from typing import Any

import pytest

from coordinator import run_events as ev
from coordinator.config import Settings
from coordinator.control import Asked, Closed
from coordinator.service import Service
from coordinator.store import StoreWriteError
from midge.transport.address import Address
from tests.machines import Talk, config


class Loop:
    """A service in the midst of a round of three agents, one of which has reported. It turns when told to, on our clock."""

    def __init__(self, directory, monkeypatch, quorum: int = 1) -> None:
        self.talk = Talk(config(rounds=2, minimum=3, quorum=quorum))
        self.talk.to_collecting("a", "b", "c")
        self.talk.update("a")
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(time, "monotonic", lambda: self.talk.now)
        settings = Settings(state_dir=str(directory), federation="lab")
        self.service = Service(settings, Address.parse("mqtt://127.0.0.1:1"), serve_http=False)
        self.service._driver.run = self.talk.run

    def fill_disk(self) -> None:
        """From now on nothing can be written to the database."""

        def fails(*_: Any) -> None:
            error = StoreWriteError("midge.db: database or disk is full")
            error.errno = errno.ENOSPC
            raise error

        self._monkeypatch.setattr(self.service.store, "save", fails)
        self._monkeypatch.setattr(self.service.store, "probe", fails)

    def make_room(self) -> None:
        for name in ("save", "probe"):
            self._monkeypatch.delattr(self.service.store, name)

    def ask(self) -> Future[Closed]:
        """Put an operator's wish to close the round into the queue."""
        answer: Future[Closed] = Future()
        self.service.queue.put(Asked(ev.CloseAsked(), answer))
        return answer

    def told(self, after_s: float = 0.0) -> Closed:
        """Ask, turn once, and return the answer, which must be there then."""
        self.talk.now += after_s
        answer = self.ask()
        self.service._turn()
        return answer.result(timeout=0)


@pytest.fixture
def make_loop(tmp_path, monkeypatch):
    made = []

    def make(**options: int) -> Loop:
        made.append(Loop(tmp_path, monkeypatch, **options))
        return made[-1]

    yield make
    for loop in made:
        loop.service.store.close()
        os.close(loop.service._lock_fd)


@pytest.mark.parametrize(("quorum", "done"), [(1, "closed"), (2, "abandoned")])
def test_a_round_whose_end_cannot_be_stored_is_not_said_to_be_closed(make_loop, quorum, done):
    loop = make_loop(quorum=quorum)
    loop.fill_disk()
    closed = loop.told()
    assert (closed.outcome, closed.round_num, closed.num_updates) == ("failed", 1, 1)
    assert closed.text == (
        f"not known to be {done}: the disk failed as that was to be saved (midge.db: database or disk is full); "
        "look, and close it again, later"
    )
    assert loop.service._driver.run is None


def test_whoever_asks_while_the_run_is_parked_is_told_at_once_what_it_waits_for(make_loop):
    loop = make_loop()
    loop.fill_disk()
    loop.told()
    closed = loop.told(after_s=0.5)
    assert closed.outcome == "nothing"
    assert closed.text == (
        "nothing to close: waiting for the disk for 0 s: midge.db: database or disk is full; trying again in 0 s"
    )
    closed = loop.told(after_s=1.0)  # another try comes to nothing in that turn
    assert closed.text.startswith("nothing to close: waiting for the disk for 2 s: ")
    assert loop.service._guard.is_parked


def test_who_asks_in_the_turn_in_which_the_disk_works_again_is_not_told_that_there_is_no_run(make_loop):
    loop = make_loop()
    loop.fill_disk()
    loop.told()
    loop.make_room()
    closed = loop.told(after_s=2.0)
    assert closed.text.startswith("nothing to close: waiting for the disk for 2 s: ")
    assert not loop.service._guard.is_parked
    assert loop.told().text == "nothing to close: there is no run"  # this test has none to go on with


def test_a_turn_that_fails_after_the_round_was_closed_in_it_claims_nothing(make_loop, monkeypatch):
    """Something else of the same turn cannot be stored: all of the turn is thrown away, the close too."""
    loop = make_loop()

    def fails(event: object, now: float) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(loop.service._driver, "handle", fails)
    answer = loop.ask()
    loop.service.queue.put(object())  # what comes from the broker
    loop.service._turn()
    assert answer.result(timeout=0).outcome == "failed"


def test_who_asked_and_went_away_is_in_the_way_of_none(make_loop):
    loop = make_loop()
    loop.fill_disk()
    gone = loop.ask()
    assert gone.cancel()
    assert loop.told().outcome in ("failed", "nothing")
    assert gone.cancelled()


def test_a_turn_without_memory_parks_the_run_as_a_full_disk_does(make_loop):
    loop = make_loop()

    def fails(now: float) -> None:
        raise MemoryError

    loop.service._guard.outlive(fails)
    assert loop.service._guard.is_parked
    assert loop.service._guard.status().startswith("waiting for the disk for 0 s: Cannot allocate memory")
    assert loop.service._driver.run is None
