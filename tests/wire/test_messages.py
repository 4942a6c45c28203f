"""Messages: round trip, truncation at every byte, corruption, and what is let through."""

from __future__ import annotations

import json
from typing import get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midge.wire.errors import MessageError
from midge.wire.messages import (
    Cancel,
    Presence,
    RollCall,
    ToAgent,
    ToCoordinator,
    decode,
    decode_to_agent,
    decode_to_coordinator,
    encode,
)
from tests.wire.examples import MESSAGES, sent
from tests.wire.field_tables import KINDS
from tests.wire.strategies import structs

ANY = st.one_of([structs(kind) for kind in KINDS.values()])


# Round trip.


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(ANY)
def test_a_message_survives_the_journey(message):
    payload = encode(message)
    assert decode(payload, type(message)) == message
    assert encode(decode(memoryview(payload), type(message))) == payload


def test_there_is_an_example_of_each_kind():
    assert MESSAGES.keys() == KINDS.keys()
    assert {type(message) for message in MESSAGES.values()} == set(KINDS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_survives_the_journey_and_says_its_type_first(kind):
    payload = encode(MESSAGES[kind])
    assert payload.startswith(b'{"type":"%s"' % kind.encode())
    assert decode(payload, KINDS[kind]) == MESSAGES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_an_inbox_takes_what_agents_are_told_and_an_outbox_what_they_tell(kind):
    payload = encode(MESSAGES[kind])
    for decode_any, kinds in ((decode_to_agent, ToAgent), (decode_to_coordinator, ToCoordinator)):
        if KINDS[kind] in get_args(kinds):
            assert decode_any(payload) == MESSAGES[kind]
        else:
            with pytest.raises(MessageError, match=f"Invalid value '{kind}' - at `\\$.type`"):
                decode_any(payload)


# Truncation, at every byte, and corruption.


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_cut_short_at_any_byte_is_refused(kind):
    payload = encode(MESSAGES[kind])
    for length in range(len(payload)):
        with pytest.raises(MessageError, match=f"message of {length} bytes starting "):
            decode(payload[:length], KINDS[kind])


@pytest.mark.no_cover
@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_whatever_is_changed_on_the_way_nothing_but_a_message_error_comes_of_it(kind, data):
    payload = bytearray(encode(MESSAGES[kind]))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(payload) - 1))
        stop = data.draw(st.integers(start, min(start + 8, len(payload))))
        payload[start:stop] = data.draw(st.binary(max_size=8))
        if not payload:
            break
    try:
        message = decode(bytes(payload), KINDS[kind])
    except MessageError:
        return
    assert decode(encode(message), KINDS[kind]) == message


@given(st.binary(max_size=100))
def test_any_bytes_are_refused_with_the_right_error(payload):
    for decode_any in (decode_to_agent, decode_to_coordinator):
        with pytest.raises(MessageError, match=f"message of {len(payload)} bytes starting "):
            decode_any(payload)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=10,
)


@pytest.mark.no_cover
@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_whatever_a_field_holds_the_message_is_within_its_limits_or_refused(kind, data):
    name = data.draw(st.sampled_from(sorted(json.loads(encode(MESSAGES[kind])))))
    payload = sent(kind, **{name: data.draw(JSON)})
    try:
        message = decode(payload, KINDS[kind])
    except MessageError:
        return
    assert msgspec.convert(msgspec.to_builtins(message), KINDS[kind]) == message


# What is let through.


@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_nobody_knows_are_ignored(kind):
    later = {"x": 1, "colour": {"red": [None, True, 1e308, "\0"]}, "": []}
    assert decode(sent(kind, **later), KINDS[kind]) == MESSAGES[kind]


def test_so_are_those_of_parts_and_further_elements_of_a_tensor():
    training = {**json.loads(encode(MESSAGES["invitation"]))["training"], "later": 1}
    assert decode(sent("invitation", training=training), KINDS["invitation"]) == MESSAGES["invitation"]
    layout = [[*tensor, "later"] for tensor in json.loads(encode(MESSAGES["head"]))["layout"]]
    assert decode(sent("head", layout=layout), KINDS["head"]) == MESSAGES["head"]


def test_fields_with_a_default_may_be_left_out():
    assert decode(b'{"type":"rollcall","epoch":1}', RollCall) == RollCall(epoch=1, spread_s=0.0)
    assert decode(b'{"type":"presence","online":false,"incarnation":"5f"}', Presence) == Presence(
        online=False, incarnation="5f"
    )


def test_where_one_kind_alone_is_expected_its_type_may_be_left_out():
    assert decode(b'{"epoch":1}', RollCall) == RollCall(epoch=1)


@pytest.mark.parametrize("decode_any", [decode_to_agent, decode_to_coordinator])
def test_where_several_are_it_may_not(decode_any):
    payload = sent("cancel", type=...)
    with pytest.raises(MessageError) as caught:
        decode_any(payload)
    assert str(caught.value).endswith(": Object missing required field `type`")


def test_the_type_may_stand_anywhere():
    payload = json.dumps(dict(reversed(json.loads(sent("cancel")).items()))).encode()
    assert payload.endswith(b'"type": "cancel"}')
    assert decode_to_agent(payload) == MESSAGES["cancel"]


def test_white_space_and_escapes_are_let_through():
    assert decode(b' {\n"type" :\t"roll\\u0063all", "epoch":1 }\r\n', RollCall) == RollCall(epoch=1)


def test_an_integer_will_do_for_a_number():
    assert decode(b'{"type":"rollcall","epoch":1,"spread_s":2}', RollCall) == RollCall(epoch=1, spread_s=2.0)


def test_of_a_field_that_comes_twice_the_last_counts():
    assert decode(b'{"type":"rollcall","epoch":1,"epoch":2}', RollCall) == RollCall(epoch=2)


def test_lengths_of_text_are_in_characters():
    assert decode(sent("coordinator", instance="\U0001f600" * 200), KINDS["coordinator"]).instance == "\U0001f600" * 200


def test_an_error_shows_only_the_start_of_a_message():
    with pytest.raises(MessageError) as caught:
        decode(b'{"reason":"' + b"\xff" * 100_000, Cancel)
    assert len(str(caught.value)) < 500


def test_messages_cannot_be_changed():
    with pytest.raises(AttributeError):
        MESSAGES["cancel"].reason = "late"
    assert isinstance(MESSAGES["cancel"], Cancel)
