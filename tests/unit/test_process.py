"""Child processes: requests and replies come through, and whatever ends a child is told, with its reason, to the end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from midge.tasks.process import Child

ROOT = Path(__file__).parents[2]
BOUND_S = 20.0


class Told:
    """What a child told its parent, in order."""

    def __init__(self) -> None:
        self.replies: list[bytes] = []
        self.reasons: list[str] = []
        self._changed = threading.Condition()

    def reply(self, message: bytes) -> None:
        with self._changed:
            self.replies.append(message)
            self._changed.notify_all()
        if message == b"poison":
            raise ValueError("whoever hears this falls over")

    def exit(self, reason: str) -> None:
        with self._changed:
            self.reasons.append(reason)
            self._changed.notify_all()

    def wait(self, num_replies: int = 0, num_reasons: int = 0) -> None:
        def is_enough() -> bool:
            return len(self.replies) >= num_replies and len(self.reasons) >= num_reasons

        with self._changed:
            assert self._changed.wait_for(is_enough, BOUND_S), f"{len(self.replies)} replies, reasons: {self.reasons}"


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def child(told, monkeypatch) -> Iterator[Child]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = Child("tests.unit.tiny_child", [], told.reply, told.exit)
    yield made
    made.stop()


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + BOUND_S
    while not holds():
        assert time.monotonic() < end, f"not within {BOUND_S} s: {what}"
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_replies_come_in_the_order_of_requests_whatever_is_printed_between_them(child, told):
    child.send(b"say one")
    child.send(b"print \x05\x00\x00\x00 is what a reply's length looks like")
    child.send(b"say two")
    told.wait(3)
    assert told.replies == [b"one", b"printed", b"two"]


def test_replies_may_be_empty_and_may_be_large(child, told):
    child.send(b"say")
    child.send(b"size 20000000")
    told.wait(2)
    assert told.replies[0] == b""
    assert told.replies[1] == b"\x00\xff" * 10_000_000


def test_a_request_may_be_larger_than_a_pipe(child, told):
    child.send(b"say " + b"x" * 3_000_000)
    told.wait(1)
    assert len(told.replies[0]) == 3_000_000


def test_one_who_cannot_bear_a_reply_still_hears_the_next(child, told, caplog):
    with caplog.at_level(logging.ERROR, "midge.tasks.process"):
        child.send(b"say poison")
        child.send(b"say bread")
        told.wait(2)
    assert told.replies == [b"poison", b"bread"]
    assert "could not be handled" in caplog.text
    assert told.reasons == []


def test_an_interruption_reaches_a_child_that_is_at_work(child, told):
    child.send(b"train")
    told.wait(1)
    child.send(b"cancel")
    told.wait(2)
    assert told.replies == [b"began", b"cancelled"]


def test_a_killed_child_is_reported_once_and_after_its_last_reply(child, told):
    child.send(b"say last")
    told.wait(1)
    os.kill(child.pid, signal.SIGKILL)
    told.wait(1, 1)
    assert told.reasons == ["the process was killed (SIGKILL): most likely out of memory"]
    child.send(b"say anything")  # to nobody, which is not an error
    child.stop()
    assert told.reasons == ["the process was killed (SIGKILL): most likely out of memory"]


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (b"exit 3", "the process ended with status 3"),
        (b"raise no such sensor", "the process ended with status 1: ValueError: no such sensor"),
    ],
)
def test_a_child_that_ends_itself_is_reported_with_its_last_words(child, told, request_, reason):
    child.send(request_)
    told.wait(0, 1)
    assert told.reasons == [reason]


def test_a_child_ended_by_another_signal_is_reported_with_its_name(child, told):
    child.send(b"say ready")
    told.wait(1)
    os.kill(child.pid, signal.SIGTERM)
    told.wait(1, 1)
    assert told.reasons == ["the process was ended by SIGTERM"]


def test_a_module_that_cannot_be_imported_is_reported_with_its_error(told):
    child = Child("tests.unit.no_such_module", [], told.reply, told.exit)
    told.wait(0, 1)
    child.stop()
    assert told.reasons[0].startswith("the process ended with status 1: ")
    assert "no_such_module" in told.reasons[0]


def test_a_stopped_child_is_gone_and_nobody_is_told(child, told):
    child.send(b"train")
    told.wait(1)
    child.stop()
    assert not is_running(child.pid)
    child.stop()
    child.send(b"say anything")
    assert told.reasons == []


def test_what_a_killed_child_had_forked_neither_delays_the_report_nor_outlives_it(child, told):
    child.send(b"fork")
    told.wait(1)
    grandchild = int(told.replies[0])
    assert is_running(grandchild)
    os.kill(child.pid, signal.SIGKILL)
    told.wait(1, 1)
    assert told.reasons == ["the process was killed (SIGKILL): most likely out of memory"]
    wait_until(lambda: not is_running(grandchild), "the forked process is ended")


def test_what_a_stopped_child_had_forked_is_ended_with_it(child, told):
    child.send(b"fork")
    told.wait(1)
    child.stop()
    wait_until(lambda: not is_running(int(told.replies[0])), "the forked process is ended")


def test_a_child_that_writes_where_replies_go_is_ended_and_reported(told, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    child = Child("tests.unit.tiny_child", ["noisy"], told.reply, told.exit)
    told.wait(0, 1)
    assert "what it sent is no reply" in told.reasons[0]
    assert not is_running(child.pid)
    child.stop()


def test_a_progress_bar_that_never_ends_its_line_fills_no_memory(child, told):
    child.send(b"mutter 2000000")
    told.wait(1)
    child.send(b"exit 3")
    told.wait(1, 1)
    assert told.reasons[0].startswith("the process ended with status 3: ...")
    assert len(told.reasons[0]) < 5000


def test_a_child_whose_parent_is_killed_ends_in_the_middle_of_its_work():
    command = [sys.executable, "-m", "tests.unit.tiny_child", "parent"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    wait_until(lambda: not is_running(pid), "the orphan ends")


def test_a_ctrl_c_in_the_terminal_does_not_reach_a_child(child, told):
    child.send(b"say ready")
    told.wait(1)
    assert os.getsid(child.pid) == child.pid != os.getsid(0)


def test_the_environment_given_is_added_to_ones_own(told, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    child = Child("tests.unit.tiny_child", [], told.reply, told.exit, {"OMP_NUM_THREADS": "7"})
    child.send(b"say ready")
    told.wait(1)
    environment = Path(f"/proc/{child.pid}/environ").read_bytes().split(b"\0")
    child.stop()
    assert b"OMP_NUM_THREADS=7" in environment
    assert f"PYTHONPATH={ROOT}".encode() in environment
