"""A disk that fails: which errors pass, how it is found out that they did, and how often that is tried."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import resource
import signal
import sqlite3

import pytest

from coordinator import run_events as ev
from coordinator.disk import LEFTOVER, Parking, probe_room, survivable
from coordinator.store import Store, StoreError, StoreWriteError


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EMFILE", "ENOMEM", "EACCES"])
def test_what_may_pass_is_outlived(name):
    assert survivable(OSError(getattr(errno, name), name))


@pytest.mark.parametrize("error", [OSError("no number"), OSError(errno.ENOENT, "gone"), OSError(errno.EBADF, "ours")])
def test_what_will_not_pass_is_not(error):
    assert not survivable(error)


# The room.


def test_a_probe_leaves_nothing_and_takes_no_room(tmp_path):
    probe_room(tmp_path, 1 << 20)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_files():
    """No file may be longer than 64 KiB: a disk that is full, for a file that is to grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_probe_fails_where_there_is_no_room_and_leaves_nothing(tmp_path, small_files):
    with pytest.raises(OSError, match="File too large"):
        probe_room(tmp_path, 1 << 20)
    assert list(tmp_path.iterdir()) == []
    probe_room(tmp_path, 1 << 15)


def test_a_probe_that_was_killed_is_in_the_way_of_none(tmp_path):
    (tmp_path / LEFTOVER).write_bytes(b"x" * 100)
    probe_room(tmp_path, 1 << 16)
    assert list(tmp_path.iterdir()) == []


# The database.


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path)
    yield made
    made.close()


def tallies(number: int) -> ev.SaveTallies:
    return ev.SaveTallies({("received", f"{index}-{number}"): 1 for index in range(100)})


def test_a_database_that_cannot_grow_says_that_it_may_pass_and_is_as_before(store, small_files):
    run_id, written = "r", 0
    with pytest.raises(StoreWriteError) as caught:  # noqa: PT012  the last of these
        for number in range(1000):
            store.save(run_id, [tallies(number)])
            written += 100
    assert survivable(caught.value)
    assert len(store.tallies(run_id)) == written
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    store.probe()
    store.save(run_id, [ev.SaveTallies({("late", "at last"): 1})])
    assert len(store.tallies(run_id)) == written + 1


def test_a_database_that_cannot_be_opened_for_want_of_room_is_not_called_damaged(store, tmp_path, small_files):
    for number in range(20):
        with contextlib.suppress(StoreWriteError):
            store.save("r", [tallies(number)])
    store.close()
    with pytest.raises(StoreWriteError) as caught:
        Store(tmp_path / "another").raise_epoch()
    assert survivable(caught.value)
    assert "restore it" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "number"),
    [
        (sqlite3.SQLITE_FULL, errno.ENOSPC),
        (sqlite3.SQLITE_IOERR_FSYNC, errno.EIO),
        (sqlite3.SQLITE_READONLY, errno.EROFS),
        (sqlite3.SQLITE_BUSY, errno.EAGAIN),
    ],
)
def test_errors_of_sqlite_have_the_numbers_of_the_systems(store, monkeypatch, code, number):
    def fails(*_, **__):
        error = sqlite3.OperationalError("said by SQLite")
        error.sqlite_errorcode = code
        raise error

    monkeypatch.setattr(store._engine.dialect, "do_execute", fails)
    with pytest.raises(StoreWriteError, match="said by SQLite") as caught:
        store.raise_epoch()
    assert caught.value.errno == number
    assert survivable(caught.value)
    monkeypatch.undo()


def test_a_statement_that_is_wrong_does_not_pass(store, tmp_path):
    with sqlite3.connect(tmp_path / "midge.db") as connection:
        connection.execute("drop table tallies")
    connection.close()
    with pytest.raises(StoreWriteError) as caught:
        store.save("r", [ev.SaveTallies({("received", ""): 1})])
    assert not survivable(caught.value)


def test_a_damaged_database_is_said_to_be_one_when_it_is_written(store, tmp_path):
    store.close()
    path = tmp_path / "midge.db"
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(StoreError, match="malformed") as caught:
        Store(tmp_path).raise_epoch()
    assert not isinstance(caught.value, OSError)


# How often it is tried.


def test_tries_come_less_and_less_often_up_to_a_bound_and_each_reason_is_news_once():
    parking, now, pauses = Parking(), 100.0, []
    assert (parking.is_parked, parking.retry_at) == (False, math.inf)
    assert parking.failed("full", now)
    for _ in range(8):
        pauses.append(parking.retry_at - now)
        now = parking.retry_at
        assert not parking.failed("full", now)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    assert parking.failed("broken", now)
    assert parking.resumed(now + 5) == now + 5 - 100
    assert (parking.is_parked, parking.retry_at) == (False, math.inf)


def test_a_disk_that_fails_again_at_once_is_tried_less_often_and_after_a_calm_soon():
    parking = Parking()
    for pause_s in (1, 2, 4):
        parking.failed("full", 100.0)
        assert parking.retry_at == 100.0 + pause_s
        parking.resumed(100.0)
    parking.failed("full", 170.0)
    assert parking.retry_at == 171.0


def test_the_status_says_what_is_wrong_since_when_and_until_when():
    parking = Parking()
    parking.failed("/state: No space left on device", 100.0)
    parking.failed("/state: No space left on device", 101.0)
    assert parking.status(101.5) == (
        "waiting for the disk for 2 s: /state: No space left on device; trying again in 2 s"
    )
