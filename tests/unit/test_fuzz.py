"""A little of `benchmarks/fuzz.py`: thousands of mutated inputs at every decoder, from a seed."""

from __future__ import annotations

import pytest

from benchmarks.fuzz import Thrower
from midge.wire.messages import Message

NUM_TURNS = 4
NUM_EACH = 40


@pytest.mark.fault(8, 21, 22, 23, 24)
def test_whatever_comes_a_decoder_takes_it_or_refuses_it_and_raises_nothing_else(recovery):
    thrower = Thrower(seed=1)
    for _ in range(NUM_TURNS):
        thrower.turn(NUM_EACH)
    assert thrower.exceptions == {}
    assert all(counts.total() == NUM_TURNS * NUM_EACH for counts in thrower.ends.values())
    assert all(counts["taken"] for counts in thrower.ends.values()), (
        "mutations so wild that all are refused at the door"
    )
    assert all(counts["refused"] for name, counts in thrower.ends.items() if name != "broker's figures")
    recovery.tried(NUM_TURNS * NUM_EACH)


def test_every_message_has_a_decoder_that_is_tried():
    kinds = {kind.__struct_config__.tag for kind in Message.__args__}
    assert kinds | {"inbox", "outbox", "frame", "topic", "broker's figures"} == set(Thrower(1).ends)
