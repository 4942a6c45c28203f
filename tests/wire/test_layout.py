"""Layouts: what is one, which digest it has, and where each tensor lies."""

from __future__ import annotations

import hashlib
import json
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from midge.wire.errors import LayoutError
from midge.wire.layout import (
    MAX_CANONICAL_BYTES,
    MAX_COUNTERS,
    MAX_ELEMENTS,
    MAX_TENSORS,
    Layout,
    TensorSpec,
    model_hash,
)
from tests.wire.examples import LAYOUT
from tests.wire.strategies import layouts


def spec(name, shape=(1,), dtype="float32"):
    return TensorSpec(name, shape, dtype)


def test_float_tensors_lie_end_to_end_in_one_vector_and_the_others_in_the_counters():
    layout = Layout((spec("a", (2, 3)), spec("n", (), "int64"), spec("b", (4,), "float16"), spec("m", (2,), "bool")))
    assert (layout.num_elements, layout.num_counters) == (10, 3)
    assert [(tensor.name, start, stop) for tensor, start, stop in layout.floats()] == [("a", 0, 6), ("b", 6, 10)]
    assert [(tensor.name, start, stop) for tensor, start, stop in layout.integers()] == [("n", 0, 1), ("m", 1, 3)]


def test_an_empty_tensor_takes_no_room():
    layout = Layout((spec("a"), spec("none", (3, 0)), spec("b")))
    assert [(tensor.name, start, stop) for tensor, start, stop in layout.floats()] == [
        ("a", 0, 1),
        ("none", 1, 1),
        ("b", 1, 2),
    ]


def test_the_digest_is_of_the_json_without_spaces():
    canonical = '[["fc.weight",[2,3],"float32"],["fc.bias",[2],"float32"],["norm.num_batches_tracked",[],"int64"]]'
    assert LAYOUT.digest == hashlib.sha256(b"midge-layout-1\n" + canonical.encode()).hexdigest()


def test_names_are_escaped_in_one_way_only():
    name = '"\\/\b\f\n\r\t\0\x1f\x7fé\u2028😀'
    escaped = r'"\"\\/\b\f\n\r\t\u0000\u001f' + '\x7fé\u2028😀"'
    canonical = f'[[{escaped},[1],"float32"]]'
    assert json.loads(canonical)[0][0] == name
    assert Layout((spec(name),)).digest == hashlib.sha256(b"midge-layout-1\n" + canonical.encode()).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        (spec("fc.weight", (3, 2)), *LAYOUT.tensors[1:]),
        (spec("fc.weight", (6,)), *LAYOUT.tensors[1:]),
        (spec("fc.weight", (2, 3), "float64"), *LAYOUT.tensors[1:]),
        (spec("fc.Weight", (2, 3)), *LAYOUT.tensors[1:]),
        (LAYOUT.tensors[1], LAYOUT.tensors[0], LAYOUT.tensors[2]),
        LAYOUT.tensors[:2],
        (*LAYOUT.tensors, spec("more", (0,))),
    ],
    ids=["transposed", "flattened", "another type", "another name", "another order", "one less", "one more, empty"],
)
def test_whatever_differs_the_digest_does_and_all_but_order_is_named(other):
    layout = Layout(other)
    assert layout.digest != LAYOUT.digest
    is_order_alone = set(layout.tensors) == set(LAYOUT.tensors)
    assert (LAYOUT.difference(layout) == "") is is_order_alone


def test_the_difference_is_said_in_words():
    weight, bias, counter = LAYOUT.tensors
    assert LAYOUT.difference(LAYOUT) == ""
    assert LAYOUT.difference(Layout((spec("fc.weight", (2, 4)), bias, counter))) == (
        "has fc.weight (2, 4) float32, expected (2, 3) float32"
    )
    assert LAYOUT.difference(Layout((weight, bias))) == "lacks norm.num_batches_tracked () int64"
    assert LAYOUT.difference(Layout((weight, counter, spec("fc.b")))) == "lacks fc.bias (2,) float32"
    assert LAYOUT.difference(Layout((spec("more"), *LAYOUT.tensors))) == "has more (1,) float32, which is not expected"


@given(layouts())
def test_a_layout_survives_the_journey(layout):
    sent = msgspec.json.encode(layout.tensors)
    back = Layout(msgspec.json.decode(sent, type=tuple[TensorSpec, ...]))
    assert back == layout
    assert back.digest == layout.digest
    assert layout.difference(back) == ""


@given(layouts())
def test_the_spans_cover_the_vector_and_the_counters_without_gap_or_overlap(layout):
    for spans, length in ((layout.floats(), layout.num_elements), (layout.integers(), layout.num_counters)):
        at = 0
        for tensor, start, stop in spans:
            assert (start, stop) == (at, at + tensor.num_elements)
            at = stop
        assert at == length


MALFORMED = {
    "no tensor": ((), "layout: 0 floating-point elements, expected 1 to 17179869184"),
    "nothing to train": (
        (spec("n", (3,), "int64"),),
        "layout: 0 floating-point elements, expected 1 to 17179869184",
    ),
    "only an empty tensor": ((spec("a", (0,)),), "layout: 0 floating-point elements, expected 1 to 17179869184"),
    "a name twice": (
        (spec("a"), spec("b"), spec("a", (2,))),
        "layout: tensor names must differ, seen more than once: a",
    ),
    "many names twice": (
        tuple(spec(name) for name in "dcbadcba"),
        "layout: tensor names must differ, seen more than once: a, b, c",
    ),
    "too many elements": (
        (spec("a", (MAX_ELEMENTS,)), spec("b")),
        "layout: 17179869185 floating-point elements, expected 1 to 17179869184",
    ),
    "dimensions whose product no machine holds": (
        (spec("a", (MAX_ELEMENTS,) * 8),),
        f"layout: {2**272} floating-point elements, expected 1 to 17179869184",
    ),
    "too many counters": (
        (spec("a"), spec("n", (MAX_COUNTERS + 1,), "int8")),
        "layout: 16385 elements in integer buffers, expected at most 16384",
    ),
}


@pytest.mark.fault(11, 24)
@pytest.mark.parametrize(("tensors", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_layout_is_refused_with_its_reason(tensors, message):
    with pytest.raises(LayoutError) as caught:
        Layout(tensors)
    assert str(caught.value) == message


def test_a_layout_at_its_limits_is_fine():
    assert Layout((spec("a", (MAX_ELEMENTS,)),)).num_elements == MAX_ELEMENTS
    assert Layout((spec("a"), spec("n", (MAX_COUNTERS,), "bool"))).num_counters == MAX_COUNTERS
    assert Layout(tuple(spec(f"{index:x}") for index in range(MAX_TENSORS))).num_elements == MAX_TENSORS


def test_one_tensor_too_many_is_refused():
    with pytest.raises(LayoutError) as caught:
        Layout(tuple(spec(f"{index:x}") for index in range(MAX_TENSORS + 1)))
    assert str(caught.value) == "layout: 65537 tensors, expected at most 65536"


def test_a_layout_that_no_head_could_hold_is_refused():
    # Each tensor is 2 + 256 + 2 + 3 + 1 + 9 + 1 = 274 bytes, and a comma: 275 * 12,000 is more than 3 MiB.
    with pytest.raises(LayoutError) as caught:
        Layout(tuple(spec(f"{index:0256}") for index in range(12_000)))
    assert str(caught.value) == f"layout: {275 * 12_000 + 1} bytes as JSON, expected at most {MAX_CANONICAL_BYTES}"


def test_many_double_names_are_found_in_no_time():
    # Comparing each name with each other would take 40 s for the largest layout, and a peer could send it.
    tensors = tuple(spec(f"{index // 2:x}") for index in range(MAX_TENSORS))
    began = time.monotonic()
    with pytest.raises(LayoutError, match="seen more than once: 0, 1, 10"):
        Layout(tensors)
    assert time.monotonic() - began < 5


LIMITS = {
    "bool": (0, 1),
    "uint8": (0, 255),
    "int8": (-128, 127),
    "int16": (-32_768, 32_767),
    "int32": (-2_147_483_648, 2_147_483_647),
    "int64": (-9_223_372_036_854_775_808, 9_223_372_036_854_775_807),
}


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_counter_must_fit_the_type_of_its_buffer(dtype):
    low, high = LIMITS[dtype]
    layout = Layout((spec("a"), spec("n", (2,), dtype)))
    layout.check_counters((low, high))
    for counters, bad in (((low - 1, low), low - 1), ((high, high + 1), high + 1)):
        with pytest.raises(LayoutError) as caught:
            layout.check_counters(counters)
        assert str(caught.value) == f"counter {bad} for n (2,) {dtype}: expected {low} to {high}"


@given(st.lists(st.integers(), max_size=5))
def test_there_must_be_as_many_counters_as_the_layout_has(counters):
    layout = Layout((spec("a"), spec("n", (6,), "int64")))
    with pytest.raises(LayoutError) as caught:
        layout.check_counters(counters)
    assert str(caught.value) == f"{len(counters)} counters, the layout has 6"
    with pytest.raises(LayoutError, match="the layout has 6"):
        model_hash(layout, counters)


def test_the_model_digest_covers_layout_counters_and_elements_and_not_the_cut():
    elements = bytes(range(32))
    canonical_counters = b"[12]"
    expected = hashlib.sha256(b"midge-model-1\n" + bytes.fromhex(LAYOUT.digest) + canonical_counters + elements)
    whole = model_hash(LAYOUT, (12,))
    whole.update(elements)
    in_parts = model_hash(LAYOUT, [12])
    in_parts.update(elements[:24])
    in_parts.update(elements[24:])
    assert whole.hexdigest() == in_parts.hexdigest() == expected.hexdigest()
