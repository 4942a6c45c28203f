"""Which version of MQTT to speak: each line of the table, and the stories that it is for."""

from __future__ import annotations

import pytest

from midge.transport.failures import Failure, Kind
from midge.transport.versions import Versions


def story(*ends):
    """What is spoken after each end; an end is a kind of failure, or "worked" for a connection that was lost later."""
    versions = Versions()
    spoken = [(versions.current, versions.probing)]
    for end in ends:
        kind = Kind.LOST if end == "worked" else end
        versions.learn(Failure(kind, "reason"), accepted=end == "worked")
        spoken.append((versions.current, versions.probing))
    return [f"{version}?" if probing else version for version, probing in spoken]


def test_version_5_comes_first_and_stays_where_it_works():
    assert story("worked", "worked") == ["5", "5", "5"]


@pytest.mark.parametrize("kind", [Kind.LOST, Kind.FATAL, Kind.TAKEN_OVER])
def test_what_says_nothing_of_the_version_changes_nothing(kind):
    assert story(kind, kind) == ["5", "5", "5"]


def test_a_refused_version_is_changed_at_once_and_for_good():
    assert story(Kind.WRONG_VERSION, "worked", Kind.LOST, "worked") == ["5", "3.1.1", "3.1.1", "3.1.1", "3.1.1"]


def test_silence_is_proof_once_3_1_1_is_answered_and_5_then_is_not():
    assert story(Kind.NO_ANSWER, Kind.PROBED, Kind.NO_ANSWER, "worked") == ["5", "3.1.1?", "5", "3.1.1", "3.1.1"]


def test_silence_to_both_proves_nothing():
    assert story(*[Kind.NO_ANSWER] * 4) == ["5", "3.1.1?", "5", "3.1.1?", "5"]


def test_a_broker_that_was_only_starting_up_keeps_version_5():
    assert story(Kind.NO_ANSWER, Kind.PROBED, "worked", Kind.NO_ANSWER) == ["5", "3.1.1?", "5", "5", "3.1.1?"]


def test_a_probe_that_finds_nobody_goes_back():
    assert story(Kind.NO_ANSWER, Kind.LOST) == ["5", "3.1.1?", "5"]


def test_a_broker_replaced_by_a_newer_one_gets_version_5_again():
    assert story(Kind.WRONG_VERSION, "worked", Kind.WRONG_VERSION, "worked") == ["5", "3.1.1", "3.1.1", "5", "5"]


def test_both_refused_needs_a_person():
    versions = Versions()
    refused = Failure(Kind.WRONG_VERSION, "refused")
    assert versions.learn(refused, accepted=False) == refused
    assert versions.learn(refused, accepted=False) == Failure(Kind.FATAL, "refused (5 and 3.1.1 were tried)")
    assert versions.learn(Failure(Kind.LOST, "lost"), accepted=True) == Failure(Kind.LOST, "lost")
    assert versions.learn(refused, accepted=False) == refused
