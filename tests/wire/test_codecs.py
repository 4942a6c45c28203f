"""Codecs: float32 is little-endian, whole, and bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from midge.wire.codecs import FLOAT32, NAMES, decode_float32, encode_float32
from midge.wire.errors import FrameError


@pytest.mark.fault(21)
def test_the_table_is_closed_and_its_numbers_are_for_ever():
    assert NAMES == {"float32": 1}
    assert FLOAT32 == 1


def test_elements_are_little_endian():
    # 1.5 is 0x3fc00000, -2 is 0xc0000000.
    assert bytes(encode_float32(np.array([1.5, -2.0], np.float32))).hex(" ") == "00 00 c0 3f 00 00 00 c0"


def test_the_bytes_are_a_view_of_the_elements():
    elements = np.zeros(2, np.float32)
    body = encode_float32(elements)
    elements[0] = 1.5
    assert body.nbytes == len(body) == 8
    assert bytes(body[:4]).hex() == "0000c03f"


@given(st.binary(max_size=400).filter(lambda body: len(body) % 4 == 0))
def test_every_bit_pattern_survives_not_a_number_too(body):
    elements = decode_float32(body, len(body) // 4)
    assert elements.dtype == np.float32
    assert bytes(encode_float32(elements)) == body


def test_decoding_copies_nothing_and_the_result_cannot_be_written():
    elements = decode_float32(memoryview(bytes(8)), 2)
    with pytest.raises(ValueError, match="read-only"):
        elements[0] = 1


def test_a_slice_that_is_not_contiguous_is_encoded_all_the_same():
    elements = np.arange(6, dtype=np.float32)[::2]
    assert decode_float32(encode_float32(elements), 3).tolist() == [0.0, 2.0, 4.0]


def test_elements_of_the_other_byte_order_are_turned():
    assert bytes(encode_float32(np.array([1.5], ">f4"))).hex() == "0000c03f"


@pytest.mark.fault(21)
@pytest.mark.parametrize("num_bytes", [0, 4, 7, 9, 12])
def test_a_body_of_the_wrong_length_is_refused(num_bytes):
    with pytest.raises(FrameError) as caught:
        decode_float32(bytes(num_bytes), 2)
    assert str(caught.value) == f"float32 body of {num_bytes} bytes: expected 8 for 2 elements"
