"""Updates on their way up, as the coordinator sees them: credit, verdicts, acknowledgements, and what is missing."""

from __future__ import annotations

import math
import random

import pytest

from coordinator.attempt import Address
from coordinator.uplink import TOTAL_CREDIT, Acknowledgement, Transfer, Uplink, Verdict
from midge.wire.frames import Framing, content_tag
from midge.wire.messages import MAX_RANGES
from tests.machines import FRAMING, digest_of_update, facts, header

ADDRESS = Address("r1", 3, 1, 1)
BIG = Framing(4000, 10)  # 400 frames


def uplink(*agent_ids: str, framing: Framing = FRAMING) -> Uplink:
    made = Uplink(framing)
    made.invite(agent_ids)
    return made


def announced(*agent_ids: str, framing: Framing = FRAMING, now: float = 0.0) -> Uplink:
    """An uplink where these agents have sent their headers and have been answered."""
    made = uplink(*agent_ids, framing=framing)
    for agent_id in agent_ids:
        made.offer(header(agent_id, ADDRESS), agent_id, {}, now)
    made.acknowledgements(now)
    made.check()
    return made


def credits_of(made: Uplink) -> list[int]:
    return [transfer.credit for transfer in made.transfers.values()]


# Credit.


def test_invited_agents_share_the_credit_and_need_none_beyond_their_frames():
    assert credits_of(uplink("a", "b", framing=BIG)) == [128, 128]
    assert credits_of(uplink("a", "b", "c", framing=BIG)) == [85, 85, 85]
    assert credits_of(uplink("a", "b")) == [3, 3]  # three frames each


def test_an_agent_that_was_not_invited_has_no_credit():
    assert uplink("a").credit("b") == 0


def test_inviting_again_changes_nothing():
    made = uplink("a", "b", framing=BIG)
    made.offer(header("a", ADDRESS), "a", {0: facts("a", 0)}, 0.0)
    made.invite(("a", "b"))
    assert credits_of(made) == [128, 128]
    assert made.transfers["a"].frames.keys() == {0}
    made.check()


def test_of_more_than_256_agents_none_has_credit_before_it_asks():
    made = uplink(*(f"a{number}" for number in range(300)), framing=BIG)
    assert set(credits_of(made)) == {0}
    made.check()


def test_agents_that_ask_get_equal_parts_of_the_credit():
    made = uplink(*(f"a{number}" for number in range(300)), framing=BIG)
    for number in range(4):
        made.offer(header(f"a{number}", ADDRESS), f"a{number}", {}, 0.0)
        made.acknowledgements(0.0)
        made.check()
    # 256; then 128 each; then 85 each; then 64 each.
    assert sorted(credits_of(made), reverse=True)[:5] == [64, 64, 64, 64, 0]


def test_an_agent_that_announces_an_update_and_falls_silent_starves_nobody():
    made = uplink(*(f"a{number}" for number in range(300)), framing=BIG)
    made.offer(header("a0", ADDRESS), "a0", {}, 0.0)
    assert made.acknowledgements(0.0)[0].credit == TOTAL_CREDIT
    made.offer(header("a1", ADDRESS), "a1", {}, 1.0)
    told = {acknowledgement.agent_id: acknowledgement.credit for acknowledgement in made.acknowledgements(1.0)}
    assert told == {"a0": 128, "a1": 128}


def test_credit_that_was_kept_for_agents_that_still_train_is_not_taken_from_them():
    made = uplink("a", "b", framing=BIG)
    made.invite(("c",))
    made.offer(header("c", ADDRESS), "c", {}, 0.0)
    made.acknowledgements(0.0)
    assert credits_of(made) == [128, 128, 0]


def test_credit_of_an_ended_transfer_goes_to_one_that_waits():
    made = uplink("a", "b", framing=BIG)
    made.invite(("c",))
    made.offer(header("c", ADDRESS), "c", {}, 0.0)
    made.acknowledgements(0.0)
    made.end("a", 5.0)
    assert made.deadline() == 5.0
    (told,) = made.acknowledgements(5.0)
    assert (told.agent_id, told.credit) == ("c", 128)
    made.check()


def test_only_as_many_are_told_of_freed_credit_as_there_is():
    agents = [f"a{number}" for number in range(258)]
    made = announced(*agents, framing=BIG)
    assert sorted(credits_of(made)) == [0, 0] + [1] * 256
    made.end(next(agent_id for agent_id in agents if made.credit(agent_id)), 5.0)
    (told,) = made.acknowledgements(5.0)
    assert told.credit == 1


def test_the_last_of_many_gets_more_credit_as_the_others_end():
    agents = [f"a{number}" for number in range(200)]
    made = announced(*agents, framing=BIG)
    assert set(credits_of(made)) == {1}  # 256 // 200
    for agent_id in agents[1:]:
        made.end(agent_id, 1.0)
    made.offer(header("a0", ADDRESS), "a0", {}, 2.0)
    (told,) = made.acknowledgements(2.0)
    assert told.credit == 256


def test_credit_is_never_more_than_256_whatever_comes_and_goes():
    rng = random.Random(1)
    for _ in range(30):
        made = Uplink(BIG)
        agents = [f"a{number}" for number in range(rng.choice((2, 40, 300)))]
        made.invite(rng.sample(agents, len(agents) // 2))
        for now in range(400):
            agent_id = rng.choice(agents)
            match rng.randrange(5):
                case 0:
                    made.invite((agent_id,))
                case 1 if agent_id in made.transfers:
                    made.offer(header(agent_id, ADDRESS), agent_id, {}, now)
                case 2 if agent_id in made.transfers:
                    made.store(agent_id, rng.randrange(400), facts(agent_id, 0), now)
                case 3:
                    made.end(agent_id, now)
                case _:
                    made.acknowledgements(now)
            made.check()
            assert sum(credits_of(made)) <= TOTAL_CREDIT
        for agent_id in agents:
            made.end(agent_id, 400.0)
        made.invite(("last",))
        assert made.credit("last") == 256


# Verdicts.


@pytest.mark.fault(6)
def test_each_frame_that_comes_gets_its_verdict():
    made = announced("a")
    made.invite(("b",))
    tag = content_tag(digest_of_update("a"))
    made.store("a", 1, facts("a", 1), 0.0)
    assert made.verdict("a", tag, 0, 4) is Verdict.WANTED
    assert made.verdict("a", tag, 2, 2) is Verdict.WANTED  # the last frame is shorter
    assert made.verdict("a", tag, 1, 4) is Verdict.DUPLICATE
    assert made.verdict("a", tag, 2, 4) is Verdict.MALFORMED
    assert made.verdict("a", tag, 3, 4) is Verdict.MALFORMED
    assert made.verdict("a", content_tag("ff" * 32), 0, 4) is Verdict.STALE
    assert made.verdict("b", tag, 0, 4) is Verdict.UNANNOUNCED
    assert made.verdict("stranger", tag, 0, 4) is Verdict.STALE


# Headers.


def test_frames_that_are_in_the_spool_already_are_not_asked_for_again():
    made = uplink("a")
    made.offer(header("a", ADDRESS), "a", {0: facts("a", 0), 2: facts("a", 2)}, 0.0)
    assert made.acknowledgements(0.0) == [Acknowledgement("a", ((1, 2),), 3, need_header=False)]
    made.store("a", 1, facts("a", 1), 0.0)
    assert made.is_complete("a")
    assert made.digest("a") == digest_of_update("a")


def test_the_same_header_again_keeps_the_frames_and_another_forgets_them():
    made = announced("a")
    made.store("a", 0, facts("a", 0), 0.0)
    made.offer(header("a", ADDRESS), "a", {}, 0.0)
    assert made.transfers["a"].frames.keys() == {0}
    made.offer(header("a", ADDRESS, salt="other"), "a", {}, 0.0)
    assert made.transfers["a"].frames == {}
    assert made.acknowledgements(0.0)[0].missing == ((0, 3),)


def test_nothing_is_complete_without_its_header():
    made = uplink("a")
    for index in range(3):
        made.store("a", index, facts("a", index), 0.0)
    assert not made.is_complete("a")


def test_a_header_whose_digest_is_wrong_restarts_the_transfer():
    made = announced("a")
    for index in range(3):
        made.store("a", index, facts("a", index, "corrupt"), 0.0)
    made.acknowledgements(0.0)
    assert made.is_complete("a")
    assert made.digest("a") != digest_of_update("a")
    assert made.restart("a", 1.0) == 1
    assert made.acknowledgements(1.0) == [Acknowledgement("a", ((0, 3),), 3, need_header=False)]
    for index in range(3):
        made.store("a", index, facts("a", index), 2.0)
    assert made.digest("a") == digest_of_update("a")
    assert made.restart("a", 3.0) == 2


def test_the_norm_is_the_root_of_the_sum_of_the_frames_squares():
    made = announced("a")
    for index, squares in enumerate((9.0, 16.0, 144.0)):
        made.store("a", index, facts("a", index, sum_squares=squares), 0.0)
    assert made.norm("a") == 13.0  # sqrt(9 + 16 + 144) = sqrt(169)


@pytest.mark.parametrize("squares", [math.nan, math.inf, -1.0])
def test_the_norm_of_an_update_that_is_not_finite_is_not_finite(squares: float):
    made = announced("a")
    for index, value in enumerate((1.0, squares, 0.0 if squares > 0 else -1.0)):
        made.store("a", index, facts("a", index, sum_squares=value), 0.0)
    assert not math.isfinite(made.norm("a"))


# Acknowledgements.


def test_a_header_is_acknowledged_at_once_and_only_once():
    made = uplink("a", "b")
    made.offer(header("a", ADDRESS), "a", {}, 7.0)
    assert made.deadline() == 7.0
    assert made.acknowledgements(7.0) == [Acknowledgement("a", ((0, 3),), 3, need_header=False)]
    assert made.acknowledgements(7.0) == []
    assert made.deadline() == math.inf


def test_frames_are_acknowledged_after_a_quarter_of_the_credit_or_a_short_silence():
    made = announced("a", "b", framing=BIG)
    for index in range(31):
        made.store("a", index, facts("a", index), 1.0)
    assert made.acknowledgements(1.04) == []
    made.store("a", 31, facts("a", 31), 1.04)  # the 32nd of a credit of 128
    (told,) = made.acknowledgements(1.04)
    assert told.missing == ((32, 400),)
    made.store("a", 32, facts("a", 32), 2.0)
    assert made.deadline() == 2.05


def test_an_unwanted_frame_is_answered_once_in_a_while_and_asks_for_the_header_where_that_is_missing():
    made = uplink("a")
    for step in range(10):
        made.remind("a", 1.0 + step / 1000)
    assert made.deadline() == 1.05
    assert made.acknowledgements(1.05) == [Acknowledgement("a", ((0, 3),), 3, need_header=True)]


# What is missing.


def missing(present: set[int], num_frames: int) -> tuple[tuple[int, int], ...]:
    made = Transfer("a", 1, frames={index: facts("a", index) for index in present})
    return made.missing(num_frames)


def test_what_is_missing_is_told_in_ranges():
    assert missing(set(), 5) == ((0, 5),)
    assert missing({0, 1, 4}, 5) == ((2, 4),)
    assert missing({1, 3}, 5) == ((0, 1), (2, 3), (4, 5))
    assert missing(set(range(5)), 5) == ()


def test_more_gaps_than_a_message_holds_end_in_a_range_that_covers_the_rest():
    even = set(range(0, 400, 2))
    ranges = missing(even, 400)
    assert len(ranges) == MAX_RANGES
    assert ranges[:3] == ((1, 2), (3, 4), (5, 6))
    assert ranges[-1] == (126, 400)  # 63 ranges of one frame each reach to frame 126
    told = {index for start, stop in ranges for index in range(start, stop)}
    assert told >= set(range(400)) - even


@pytest.mark.fault(6)
def test_whatever_is_missing_is_told():
    rng = random.Random(2)
    for _ in range(200):
        num_frames = rng.randrange(1, 300)
        present = {index for index in range(num_frames) if rng.random() < rng.choice((0.1, 0.5, 0.9))}
        ranges = missing(present, num_frames)
        assert len(ranges) <= MAX_RANGES
        told = {index for start, stop in ranges for index in range(start, stop)}
        assert told >= set(range(num_frames)) - present
        if len(ranges) < MAX_RANGES:
            assert told == set(range(num_frames)) - present
