"""Quarantine: strikes within a window, the rounds it lasts, its end; and what a run makes of it."""

import math

from hypothesis import given
from hypothesis import strategies as st

from coordinator import run_events as ev
from coordinator.quarantine import Quarantine, QuarantineConfig, Strike
from coordinator.run import Resumed, Version
from midge.wire.messages import Cancel, Invitation, Receipt
from tests.machines import FRAMING, LAYOUT, Talk, config, of_kind, only, sent, version_digest

CONFIG = QuarantineConfig(after=2, window=5, rounds=3)


def strike(round_num, agent_id="a", attempt=1, reason="norm"):
    return Strike(round_num, attempt, agent_id, reason)


def test_the_second_strike_within_five_rounds_takes_an_agent_out_for_three():
    quarantine = Quarantine(CONFIG)
    assert not quarantine.add(strike(4))
    assert quarantine.add(strike(8, reason="not_finite"))
    assert quarantine.held == {"a": 11}
    assert quarantine.why("a") == (
        "quarantined until round 11 is over: 2 updates rejected or left out within 5 rounds (norm, not_finite)"
    )
    assert quarantine.release(11) == []
    assert quarantine.release(12) == ["a"]
    assert quarantine.held == {}


def test_strikes_that_lie_too_far_apart_do_not_add_up():
    quarantine = Quarantine(CONFIG)
    assert not quarantine.add(strike(4))
    assert not quarantine.add(strike(9))
    assert quarantine.add(strike(13))


def test_who_was_released_begins_anew():
    quarantine = Quarantine(CONFIG)
    quarantine.add(strike(1))
    quarantine.add(strike(1, attempt=2))
    assert quarantine.release(5) == ["a"]
    assert not quarantine.add(strike(5))
    assert quarantine.add(strike(5, attempt=2))


def test_strikes_of_others_do_not_count():
    quarantine = Quarantine(CONFIG)
    assert not quarantine.add(strike(1, "a"))
    assert not quarantine.add(strike(1, "b"))
    assert quarantine.held == {}


def test_it_can_be_switched_off():
    quarantine = Quarantine(QuarantineConfig(after=0))
    assert not any(quarantine.add(strike(1, attempt=attempt)) for attempt in range(100))


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab")), max_size=40), st.integers(0, 40))
def test_a_restart_at_any_point_changes_nothing(steps, cut):
    """The strikes alone say who is in quarantine, and what is kept of them is bounded."""
    through, strikes, number = Quarantine(CONFIG), [], 1
    for index, (advance, agent_id) in enumerate(steps):
        number += advance
        through.release(number)
        if agent_id not in through.held:  # else it is not invited, and sends nothing
            strikes.append(strike(number, agent_id, attempt=index))
            through.add(strikes[-1])
        if index == cut:
            through = Quarantine(CONFIG, strikes)
            through.release(number)
    again = Quarantine(CONFIG, strikes)
    again.release(number)
    assert again.held == through.held


# In a run.


def spoilt(talk, agent_id):
    """An update comes whose elements are no numbers."""
    return talk.offer(agent_id) + talk.frames(agent_id, sum_squares=math.nan)


def test_an_agent_whose_updates_fail_gates_is_told_left_out_and_let_in_again():
    settings = config(
        rounds=30, evaluate=False, quarantine=QuarantineConfig(after=2, window=5, rounds=2), start_agents=3
    )
    talk = Talk(settings)
    talk.to_collecting("a", "b", "bad")
    invited = []
    for number in range(1, 6):
        invited.append("bad" in talk.run.attempt.round.members)
        if invited[-1]:
            commands = spoilt(talk, "bad")
            assert [one.strike for one in of_kind(commands, ev.SaveStrike)] == [Strike(number, 1, "bad", "not_finite")]
            last = number == 2
            assert [note.last_round for note in of_kind(commands, ev.AgentQuarantined)] == ([4] if last else [])
            assert sent(commands, Receipt)["bad"].detail.startswith("quarantined until round 4 is over") == last
            assert [cancel.reason for cancel in sent(commands, Cancel).values()] == (["quarantined"] if last else [])
        talk.update("a")
        talk.update("b")
        commands = talk.aggregated() + talk.published()
        assert [note.agent_id for note in of_kind(commands, ev.AgentReleased)] == (["bad"] if number == 4 else [])
    assert invited == [True, True, False, False, True]


def test_an_update_that_came_too_late_or_for_another_model_is_no_strike():
    talk = Talk(config(rounds=30, quarantine=QuarantineConfig(after=1), start_agents=3))
    talk.to_collecting("a", "b", "c")
    commands = talk.offer("a", model_digest="ab" * 32)
    assert not sent(commands, Receipt)["a"].accepted
    assert of_kind(commands, ev.SaveStrike) == of_kind(talk.offer("stranger"), ev.SaveStrike) == []


def restarted(**bounds):
    """A run whose fifth round comes, and in which b and c struck often enough in the fourth."""
    strikes = [Strike(4, attempt, agent_id, "norm") for agent_id in ("b", "c") for attempt in (1, 2, 3)]
    resumed = Resumed(version=Version(4, version_digest(4)), layout=LAYOUT, framing=FRAMING, strikes=strikes)
    return Talk(config(rounds=30, **bounds), resumed=resumed)


def test_a_restarted_run_knows_who_is_in_quarantine_and_says_so():
    talk = restarted(minimum=1, quorum=1)
    notes = of_kind(talk.first, ev.AgentQuarantined)
    assert [(note.agent_id, note.last_round) for note in notes] == [("b", 14), ("c", 14)]
    for agent_id in "abc":
        told = [cancel.reason for cancel in sent(talk.come(agent_id), Cancel).values()]
        assert told == ([] if agent_id == "a" else ["quarantined"])
    assert list(sent(talk.published(), Invitation)) == ["a"]


def test_a_quarantine_does_not_end_a_run_that_needs_its_agents():
    talk = restarted(selection_deadline_s=60.0)
    talk.come("a", "b", "c")
    assert sent(talk.published(), Invitation) == {}
    assert "1 of 2 are there" in talk.run.status()
    assert "; b is quarantined until round 14 is over; c is quarantined until round 14" in talk.run.status()
    commands = talk.wait(59.0) + talk.wait(1.5)
    assert only(commands, ev.RoundEnded).outcome == "abandoned"
    assert sorted(sent(talk.wait(2.0), Invitation)) == ["a", "b", "c"]
