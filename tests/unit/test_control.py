"""Closing a round: what the operator is told is what the run did; and nobody without the token is heard."""

from __future__ import annotations

import pytest

from coordinator import run_events as ev
from coordinator.control import Asked, Closing, Control, unsaved
from coordinator.round import RoundState
from coordinator.run import RunState
from tests.machines import Talk, config


def close(talk: Talk):
    """Close the round as the service does."""
    closing = Closing(talk.run)
    talk.hear(ev.CloseAsked())
    return closing.result()


def test_a_round_with_enough_updates_is_closed_and_the_rest_told_to_stop():
    talk = Talk(config(rounds=2, minimum=3, quorum=2))
    talk.to_collecting("a", "b", "c")
    talk.update("a")
    talk.update("b")
    closed = close(talk)
    assert (closed.outcome, closed.round_num, closed.num_updates) == ("closed", 1, 2)
    assert closed.text == "closed round 1 with 2 updates"
    assert talk.run.attempt.round.state is RoundState.AGGREGATING


def test_below_the_quorum_the_attempt_is_abandoned_with_its_reason_and_what_comes_next():
    talk = Talk(config(rounds=2, minimum=3, quorum=2))
    talk.to_collecting("a", "b", "c")
    talk.update("a")
    closed = close(talk)
    assert (closed.outcome, closed.round_num, closed.num_updates) == ("abandoned", 1, 1)
    assert closed.text == (
        "abandoned attempt 1 at round 1: 1 update, quorum is 2, when the operator closed it: b took the invitation, c "
        "took the invitation; "
        "attempt 1 failed; trying again in 1 s"
    )


def test_the_last_attempt_that_is_abandoned_fails_the_run_and_the_operator_is_told():
    talk = Talk(config(rounds=2, minimum=2, quorum=2, max_attempts=1))
    talk.to_collecting("a", "b")
    closed = close(talk)
    assert closed.outcome == "abandoned"
    assert "; the run failed: round 1 was abandoned 1 times" in closed.text
    assert talk.run.state is RunState.FAILED


def test_a_round_that_is_being_averaged_is_not_open_any_more():
    talk = Talk(config(rounds=2, minimum=1, quorum=1))
    talk.to_collecting("a")
    talk.update("a")
    assert talk.run.attempt.round.state is RoundState.AGGREGATING
    closed = close(talk)
    assert (closed.outcome, closed.round_num) == ("nothing", 0)
    assert closed.text == "nothing to close: round 1 of 2: averaging 1 updates"


def test_without_a_run_or_before_its_first_round_there_is_nothing_to_close():
    assert Closing(None).result().text == "nothing to close: there is no run"
    talk = Talk(config(rounds=2, minimum=3))
    closed = close(talk)
    assert closed.outcome == "nothing"
    assert closed.text == f"nothing to close: {talk.run.status()}"


def test_a_run_that_is_set_aside_closes_nothing_and_the_operator_is_told_why():
    closed = Closing(None, "waiting for the disk for 3 s: No space left on device; trying again in 1 s").result()
    assert closed.outcome == "nothing"
    assert closed.text == (
        "nothing to close: waiting for the disk for 3 s: No space left on device; trying again in 1 s"
    )
    assert unsaved(closed, "No space left on device") == closed


@pytest.mark.parametrize(("quorum", "outcome"), [(1, "closed"), (2, "abandoned")])
def test_what_could_not_be_saved_is_not_claimed(quorum, outcome):
    talk = Talk(config(rounds=2, minimum=3, quorum=quorum))
    talk.to_collecting("a", "b", "c")
    talk.update("a")
    closed = close(talk)
    assert closed.outcome == outcome
    told = unsaved(closed, "No space left on device")
    assert (told.outcome, told.round_num, told.num_updates) == ("failed", 1, 1)
    assert told.text == (
        f"not known to be {outcome}: the disk failed as that was to be saved (No space left on device); "
        "look, and close it again, later"
    )


def test_a_stopped_run_keeps_its_round_and_closes_nothing():
    talk = Talk(config(rounds=2, minimum=2))
    talk.to_collecting("a", "b")
    talk.hear(ev.StopAsked())
    assert close(talk).outcome == "nothing"


def test_only_the_whole_token_is_let_in():
    control = Control(lambda asked: None)
    assert control.allows(f"Bearer {control.token}")
    assert control.allows(f"bearer  {control.token} ")
    for given in ("", control.token, f"Basic {control.token}", f"Bearer {control.token[:-1]}", "Bearer ", "Bearer é"):
        assert not control.allows(given), given
    assert Control(lambda asked: None).token != control.token


def test_what_is_asked_reaches_the_queue_and_waits_for_its_answer():
    asked: list[Asked] = []
    answer = Control(asked.append).close_round()
    (one,) = asked
    assert isinstance(one.event, ev.CloseAsked)
    assert one.answer is answer
    assert not answer.done()
