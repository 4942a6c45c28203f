"""Malformed messages, each with its exact message: the peer's fault is named so that a person can find it.

What follows the colon is msgspec's; a new version of it may change the words here, never whether a message is refused.
"""

from __future__ import annotations

import time

import msgspec
import pytest

from midge.wire.errors import FrameError, LayoutError, MessageError
from midge.wire.layout import MAX_CANONICAL_BYTES, MAX_COUNTERS, Layout, TensorSpec
from midge.wire.messages import MAX_MESSAGE_BYTES, MAX_RANGES, Head, RollCall, decode, encode
from tests.wire.examples import MESSAGES, NOT_IDENTIFIERS, sent
from tests.wire.field_tables import KINDS


def error_of(payload, kind):
    with pytest.raises(MessageError) as caught:
        decode(payload, KINDS[kind])
    return str(caught.value)


NOT_JSON = {
    "nothing": (b"", "Input data was truncated"),
    "a byte-order mark": (b'\xef\xbb\xbf{"epoch":1}', "JSON is malformed: invalid character (byte 0)"),
    "UTF-16": ('{"epoch":1}'.encode("utf-16-le"), "JSON is malformed: object keys must be strings (byte 1)"),
    "two documents": (b'{"epoch":1}{"epoch":1}', "JSON is malformed: trailing characters (byte 12)"),
    "a comment": (b'{"epoch":1}//x', "JSON is malformed: trailing characters (byte 12)"),
    "a frame": (b"MF\x01\x01", "JSON is malformed: invalid character (byte 0)"),
    "an array": (b"[]", "Expected `object`, got `array`"),
    "null": (b"null", "Expected `object`, got `null`"),
    "text": (b'"x"', "Expected `object`, got `str`"),
    "NaN": (b'{"epoch":NaN}', "JSON is malformed: invalid character (byte 9)"),
    "infinity": (b'{"epoch":1,"spread_s":Infinity}', "JSON is malformed: invalid character (byte 22)"),
    "infinity in an unknown field": (b'{"epoch":1,"x":-Infinity}', "JSON is malformed: invalid character (byte 16)"),
    "a number beyond float64": (b'{"epoch":1,"spread_s":1e999}', "Number out of range - at `$.spread_s`"),
    "a leading zero": (b'{"epoch":01}', "JSON is malformed: invalid number (byte 10)"),
    "an integer of 5000 digits": (b'{"epoch":' + b"9" * 5000 + b"}", "Integer value out of range - at `$.epoch`"),
}


@pytest.mark.parametrize(("payload", "reason"), NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_no_json_object_is_refused_with_its_reason(payload, reason):
    assert error_of(payload, "rollcall") == f"message of {len(payload)} bytes starting {payload[:60]!r}: {reason}"


DIGEST = "a" * 64
OUT_OF_LIMITS = [
    ("cancel", {"run_id": ...}, "Object missing required field `run_id`"),
    ("cancel", {"type": "cancelled"}, "Invalid value 'cancelled' - at `$.type`"),
    ("cancel", {"type": 1}, "Expected `str` - at `$.type`"),
    ("cancel", {"type": None}, "Expected `str` - at `$.type`"),
    ("cancel", {"epoch": True}, "Expected `int`, got `bool` - at `$.epoch`"),
    ("cancel", {"epoch": "1"}, "Expected `int`, got `str` - at `$.epoch`"),
    ("cancel", {"epoch": 1.0}, "Expected `int`, got `float` - at `$.epoch`"),
    ("cancel", {"epoch": None}, "Expected `int`, got `null` - at `$.epoch`"),
    ("cancel", {"epoch": -1}, "Expected `int` >= 0 - at `$.epoch`"),
    ("cancel", {"epoch": 2**53 + 1}, "Expected `int` <= 9007199254740992 - at `$.epoch`"),
    ("cancel", {"epoch": 10**400}, "Expected `int` <= 9007199254740992 - at `$.epoch`"),
    ("cancel", {"round_num": 2**31}, "Expected `int` <= 2147483647 - at `$.round_num`"),
    ("cancel", {"reason": "dislike"}, "Invalid enum value 'dislike' - at `$.reason`"),
    ("rollcall", {"spread_s": -0.5}, "Expected `float` >= 0.0 - at `$.spread_s`"),
    ("rollcall", {"spread_s": 1e10}, "Expected `float` <= 1000000000.0 - at `$.spread_s`"),
    ("rollcall", {"spread_s": "2"}, "Expected `float`, got `str` - at `$.spread_s`"),
    ("coordinator", {"online": 1}, "Expected `bool`, got `int` - at `$.online`"),
    ("coordinator", {"online": "true"}, "Expected `bool`, got `str` - at `$.online`"),
    ("coordinator", {"instance": "x" * 201}, "Expected `str` of length <= 200 - at `$.instance`"),
    ("presence", {"incarnation": ""}, "Expected `str` matching regex '\\\\A[0-9a-f]{1,32}\\\\Z' - at `$.incarnation`"),
    (
        "presence",
        {"incarnation": "5F"},
        "Expected `str` matching regex '\\\\A[0-9a-f]{1,32}\\\\Z' - at `$.incarnation`",
    ),
    (
        "presence",
        {"incarnation": "5f\n"},
        "Expected `str` matching regex '\\\\A[0-9a-f]{1,32}\\\\Z' - at `$.incarnation`",
    ),
    ("presence", {"labels": {"a": 1}}, "Expected `str`, got `int` - at `$.labels[...]`"),
    ("presence", {"labels": {"a" * 65: "b"}}, "Expected `str` of length <= 64 - at `key` in `$.labels`"),
    ("presence", {"labels": {"a": "b" * 65}}, "Expected `str` of length <= 64 - at `$.labels[...]`"),
    ("presence", {"labels": {f"{n}": "b" for n in range(17)}}, "Expected `object` of length <= 16 - at `$.labels`"),
    ("head", {"slot": 2}, "Expected `int` <= 1 - at `$.slot`"),
    ("head", {"frame_elements": 0}, "Expected `int` >= 1 - at `$.frame_elements`"),
    (
        "head",
        {"model_digest": "A" * 64},
        "Expected `str` matching regex '\\\\A[0-9a-f]{64}\\\\Z' - at `$.model_digest`",
    ),
    (
        "head",
        {"model_digest": DIGEST + "\n"},
        "Expected `str` matching regex '\\\\A[0-9a-f]{64}\\\\Z' - at `$.model_digest`",
    ),
    (
        "head",
        {"model_digest": DIGEST[1:]},
        "Expected `str` matching regex '\\\\A[0-9a-f]{64}\\\\Z' - at `$.model_digest`",
    ),
    ("head", {"layout": {}}, "Expected `array`, got `object` - at `$.layout`"),
    ("head", {"layout": [["a", [2]]]}, "Expected `array` of at least length 3, got 2 - at `$.layout[0]`"),
    ("head", {"layout": [["a", [-1], "float32"]]}, "Expected `int` >= 0 - at `$.layout[0][1][0]`"),
    ("head", {"layout": [["a", [True], "float32"]]}, "Expected `int`, got `bool` - at `$.layout[0][1][0]`"),
    ("head", {"layout": [["a", [2.0], "float32"]]}, "Expected `int`, got `float` - at `$.layout[0][1][0]`"),
    ("head", {"layout": [["a", [2**34 + 1], "float32"]]}, "Expected `int` <= 17179869184 - at `$.layout[0][1][0]`"),
    ("head", {"layout": [["a", [1] * 9, "float32"]]}, "Expected `array` of length <= 8 - at `$.layout[0][1]`"),
    ("head", {"layout": [["a", [1], "complex64"]]}, "Invalid enum value 'complex64' - at `$.layout[0][2]`"),
    ("head", {"layout": [["a", [1], "object"]]}, "Invalid enum value 'object' - at `$.layout[0][2]`"),
    ("head", {"layout": [["", [1], "float32"]]}, "Expected `str` of length >= 1 - at `$.layout[0][0]`"),
    ("head", {"layout": [["a" * 257, [1], "float32"]]}, "Expected `str` of length <= 256 - at `$.layout[0][0]`"),
    ("head", {"layout": [["a", [], "float32"]] * 65_537}, "Expected `array` of length <= 65536 - at `$.layout`"),
    ("head", {"counters": [2**63]}, "Expected `int` <= 9223372036854775807 - at `$.counters[0]`"),
    ("head", {"counters": [0] * 16_385}, "Expected `array` of length <= 16384 - at `$.counters`"),
    ("invitation", {"training": {"momentum": 1}}, "Expected `float` < 1.0 - at `$.training.momentum`"),
    ("invitation", {"training": {"learning_rate": 0}}, "Expected `float` > 0.0 - at `$.training.learning_rate`"),
    ("invitation", {"training": {"local_epochs": 0}}, "Expected `int` >= 1 - at `$.training.local_epochs`"),
    (
        "invitation",
        {"training": {"extra": {"a": None}}},
        "Expected `bool | int | float | str`, got `null` - at `$.training.extra[...]`",
    ),
    (
        "invitation",
        {"training": {"extra": {"a": 2**53 + 1}}},
        "Expected `int` <= 9007199254740992 - at `$.training.extra[...]`",
    ),
    ("credit", {"missing": [[1]]}, "Expected `array` of length 2 - at `$.missing[0]`"),
    ("credit", {"missing": [[1, 2, 3]]}, "Expected `array` of length 2 - at `$.missing[0]`"),
    ("credit", {"missing": [[-1, 2]]}, "Expected `int` >= 0 - at `$.missing[0][0]`"),
    ("credit", {"missing": [[0, 1]] * (MAX_RANGES + 1)}, "Expected `array` of length <= 64 - at `$.missing`"),
    ("receipt", {"reason": "taste"}, "Invalid enum value 'taste' - at `$.reason`"),
    ("receipt", {"detail": "x" * 501}, "Expected `str` of length <= 500 - at `$.detail`"),
    ("refusal", {"reason": None}, "Expected `str`, got `null` - at `$.reason`"),
    ("progress", {"fraction": 1.01}, "Expected `float` <= 1.0 - at `$.fraction`"),
    ("progress", {"phase": "thinking"}, "Invalid enum value 'thinking' - at `$.phase`"),
    ("update", {"num_frames": 0}, "Expected `int` >= 1 - at `$.num_frames`"),
    ("update", {"num_frames": 2**20 + 1}, "Expected `int` <= 1048576 - at `$.num_frames`"),
    ("update", {"num_examples": -1}, "Expected `int` >= 0 - at `$.num_examples`"),
    ("update", {"metrics": {"loss": 1e301}}, "Expected `float` <= 1e+300 - at `$.metrics[...]`"),
    ("update", {"metrics": {"loss": None}}, "Expected `float`, got `null` - at `$.metrics[...]`"),
    ("update", {"metrics": {f"{n}": 0 for n in range(65)}}, "Expected `object` of length <= 64 - at `$.metrics`"),
    ("update", {"evaluation": {"num_examples": 0, "loss": 1}}, "Expected `int` >= 1 - at `$.evaluation.num_examples`"),
    ("update", {"evaluation": {"num_examples": 1}}, "Object missing required field `loss` - at `$.evaluation`"),
]


@pytest.mark.fault(12)
@pytest.mark.parametrize(("kind", "changes", "reason"), OUT_OF_LIMITS, ids=lambda value: str(value)[:50])
def test_a_field_outside_its_limits_is_refused_with_its_reason(kind, changes, reason):
    payload = sent(kind, **changes)
    assert error_of(payload, kind) == f"message of {len(payload)} bytes starting {payload[:60]!r}: {reason}"


@pytest.mark.fault(23)
@pytest.mark.parametrize("run_id", NOT_IDENTIFIERS.values(), ids=NOT_IDENTIFIERS.keys())
@pytest.mark.parametrize("kind", ["head", "invitation", "update"])
def test_a_run_whose_name_could_be_no_topic_is_refused(kind, run_id):
    reason = error_of(sent(kind, run_id=run_id), kind)
    why = "unexpected end of escaped utf-16 surrogate pair" if "\ud800" in run_id else "at `$.run_id`"
    assert why in reason


@pytest.mark.parametrize("text", [rb"\ud800", rb"\udc00", rb"\ud800\u0041", b"\xed\xa0\x80", b"\xff", b"\x00", b"\x1f"])
def test_text_that_is_not_unicode_or_not_escaped_is_refused(text):
    payload = sent("presence", version="@").replace(b'"@"', b'"' + text + b'"')
    assert error_of(payload, "presence").startswith(f"message of {len(payload)} bytes starting ")


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_nesting_is_refused_and_harms_nobody(opening):
    payload = b'{"type":"rollcall","epoch":1,"x":' + opening * 500_000
    assert error_of(payload, "rollcall").endswith("maximum recursion depth exceeded while deserializing an object")


def test_a_message_of_5_mb_is_refused_unread():
    began = time.monotonic()
    assert error_of(b" " * 5_000_000, "rollcall") == "message of 5000000 bytes: expected at most 4194304"
    assert time.monotonic() - began < 1
    payload = b'{"type":"rollcall","epoch":1}'
    assert decode(payload.rjust(MAX_MESSAGE_BYTES), RollCall) == RollCall(epoch=1)


# A head holds together.


def test_the_largest_head_can_be_sent():
    names = MAX_CANONICAL_BYTES // 64
    tensors = tuple(TensorSpec(f"{index:040}", (1,), "float32") for index in range(names))
    layout = Layout((*tensors, TensorSpec("n", (MAX_COUNTERS,), "int64")))
    head = msgspec.structs.replace(
        MESSAGES["head"], layout=layout.tensors, counters=(-(2**63),) * MAX_COUNTERS, frame_elements=16_384
    )
    payload = encode(head)
    assert MAX_CANONICAL_BYTES * 0.9 < len(payload) < MAX_MESSAGE_BYTES
    assert decode(payload, Head) == head


TORN_HEADS = {
    "a name twice": (
        {"layout": [["a", [1], "float32"], ["a", [1], "float32"]], "counters": []},
        "layout: tensor names must differ, seen more than once: a",
    ),
    "nothing to train": ({"layout": []}, "layout: 0 floating-point elements, expected 1 to 17179869184"),
    "more elements than any disk has": (
        {"layout": [["a", [2**34] * 8, "float32"]], "counters": []},
        f"layout: {2**272} floating-point elements, expected 1 to 17179869184",
    ),
    "a counter too few": ({"counters": []}, "0 counters, the layout has 1"),
    "a counter beyond its type": (
        {"layout": [["a", [1], "float32"], ["n", [], "int8"]], "counters": [128]},
        "counter 128 for n () int8: expected -128 to 127",
    ),
    "more frames than there may be": (
        {"layout": [["a", [2**20 + 1], "float32"]], "counters": [], "frame_elements": 1},
        "1048577 elements in 1048577 frames, expected at most 1048576",
    ),
}


@pytest.mark.fault(11, 24)
@pytest.mark.parametrize(("changes", "reason"), TORN_HEADS.values(), ids=TORN_HEADS.keys())
def test_a_head_that_contradicts_itself_is_refused_with_its_reason(changes, reason):
    payload = sent("head", **changes)
    assert error_of(payload, "head") == f"message of {len(payload)} bytes starting {payload[:60]!r}: {reason}"


def test_a_coordinator_cannot_make_such_a_head():
    with pytest.raises(LayoutError):
        msgspec.structs.replace(MESSAGES["head"], counters=())
    with pytest.raises(FrameError):
        msgspec.structs.replace(
            MESSAGES["head"], layout=(TensorSpec("a", (2**21,), "float32"),), counters=(), frame_elements=1
        )
