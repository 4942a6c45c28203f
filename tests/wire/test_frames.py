"""Frames: cut, encoded, cut short, corrupted."""

from __future__ import annotations

import hashlib
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midge.wire.errors import FrameError
from midge.wire.frames import (
    HEADER_BYTES,
    MAX_BODY_BYTES,
    MAX_FRAMES,
    MIN_BODY_BYTES,
    Framing,
    content_tag,
    decode_frame,
    encode_frame,
    plan_framing,
    run_tag,
    update_digest,
)
from midge.wire.layout import MAX_ELEMENTS
from tests.wire.examples import MODEL_FRAMES, UPDATE_FRAMES

FRAME = UPDATE_FRAMES[1]
CRC_AT = 36
CRC = struct.unpack_from("<I", FRAME, CRC_AT)[0]
CAUSE = "corrupted on the way"

uint32 = st.integers(0, 2**32 - 1)
frames = st.fixed_dictionaries(
    {
        "codec": st.integers(0, 255),
        "run_tag": st.binary(min_size=8, max_size=8),
        "round_num": uint32,
        "index": uint32,
        "num_elements": uint32,
        "content_tag": st.binary(min_size=8, max_size=8),
        "body": st.binary(max_size=200),
    }
)


def with_checksum(frame: bytes) -> bytes:
    """The same frame with the CRC-32 that its bytes should have."""
    crc = zlib.crc32(frame[40:], zlib.crc32(frame[:CRC_AT]))
    return frame[:CRC_AT] + struct.pack("<I", crc) + frame[40:]


# Round trip.


@given(frames)
def test_a_frame_survives_the_journey(fields):
    frame = decode_frame(encode_frame(**fields))
    assert {name: getattr(frame, name) for name in fields} == fields
    assert encode_frame(**{name: getattr(frame, name) for name in fields}) == encode_frame(**fields)


def test_the_body_is_a_view_of_what_was_received():
    received = bytearray(FRAME)
    frame = decode_frame(received)
    received[-1] ^= 0xFF
    assert frame.body[-1] == FRAME[-1] ^ 0xFF


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_a_frame_is_read_out_of_any_buffer(form):
    assert decode_frame(form(FRAME)).index == 1


def test_every_field_is_where_the_table_says():
    body = bytes(8)
    frame = encode_frame(
        codec=1,
        run_tag=b"RUNRUNRU",
        round_num=0x01020304,
        index=0x05060708,
        num_elements=2,
        content_tag=b"CONTENTC",
        body=body,
    )
    assert frame[:36] == (b"MF\x01\x01RUNRUNRU\x04\x03\x02\x01\x08\x07\x06\x05\x02\x00\x00\x00\x08\x00\x00\x00CONTENTC")
    assert frame[36:40] == struct.pack("<I", zlib.crc32(frame[:36] + body))
    assert frame[40:] == body
    assert len(frame) == HEADER_BYTES + 8


# Truncation, at every byte.


@pytest.mark.fault(8)
@pytest.mark.parametrize("frame", [*MODEL_FRAMES, *UPDATE_FRAMES], ids=["model 0", "model 1", "update 0", "update 1"])
def test_a_frame_cut_short_at_any_byte_is_refused(frame):
    for length in range(len(frame)):
        with pytest.raises(FrameError) as caught:
            decode_frame(frame[:length])
        if length < HEADER_BYTES:
            expected = f"frame of {length} bytes: expected at least the 40 of its header"
        else:
            expected = f"frame with a body of {length - 40} bytes: its header says {len(frame) - 40}"
        assert str(caught.value) == expected


def test_a_frame_with_a_byte_too_many_is_refused():
    with pytest.raises(FrameError) as caught:
        decode_frame(FRAME + b"\0")
    assert str(caught.value) == "frame with a body of 9 bytes: its header says 8"


# Corruption, at every byte.


@pytest.mark.fault(8)
def test_a_change_of_any_byte_is_noticed():
    for at in range(len(FRAME)):
        for mask in (0x01, 0x80, 0xFF):
            changed = bytearray(FRAME)
            changed[at] ^= mask
            with pytest.raises(FrameError) as caught:
                decode_frame(changed)
            assert str(caught.value).startswith(EXPECTED_AT.get(at, "frame ")), f"byte {at}"


EXPECTED_AT = {
    0: "frame starts with ",
    1: "frame starts with ",
    2: "frame of format version ",
    24: "frame with a body of 8 bytes: its header says ",
    **dict.fromkeys(range(36, 48), "frame 1: CRC-32 is "),
}


MALFORMED = {
    "another magic": (b"MG" + FRAME[2:], "frame starts with b'MG': expected b'MF'"),
    "JSON": (b'{"type":"presence","online":true,"incarnation":"5f"}', "frame starts with b'{\"': expected b'MF'"),
    "zeros": (bytes(48), "frame starts with b'\\x00\\x00': expected b'MF'"),
    "version 0": (with_checksum(b"MF\x00" + FRAME[3:]), "frame of format version 0: this side reads version 1"),
    "version 2": (with_checksum(b"MF\x02" + FRAME[3:]), "frame of format version 2: this side reads version 1"),
    "a length below the body's": (
        with_checksum(FRAME[:24] + struct.pack("<I", 7) + FRAME[28:]),
        "frame with a body of 8 bytes: its header says 7",
    ),
    "a length of 4 GiB": (
        with_checksum(FRAME[:24] + struct.pack("<I", 2**32 - 1) + FRAME[28:]),
        "frame with a body of 8 bytes: its header says 4294967295",
    ),
    "a changed element": (
        FRAME[:-1] + b"\x3f",
        f"frame 1: CRC-32 is {zlib.crc32(FRAME[:36] + FRAME[40:-1] + b'?'):08x}, its header says {CRC:08x}: {CAUSE}",
    ),
    "nothing": (b"", "frame of 0 bytes: expected at least the 40 of its header"),
}


@pytest.mark.fault(8, 24)
@pytest.mark.parametrize(("frame", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_frame_is_refused_with_its_reason(frame, message):
    with pytest.raises(FrameError) as caught:
        decode_frame(frame)
    assert str(caught.value) == message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_are_refused_with_the_right_error(received):
    with pytest.raises(FrameError):
        decode_frame(received)
    with pytest.raises(FrameError):
        decode_frame(b"MF\x01" + received)


# Framing.


@given(st.integers(1, 10**6), st.integers(1, 10**4))
def test_frames_cover_the_vector_in_order_without_gap_or_overlap(num_elements, frame_elements):
    framing = Framing(num_elements, frame_elements)
    assert framing.span(0) == (0, min(frame_elements, num_elements))
    last = framing.num_frames - 1
    start, stop = framing.span(last)
    assert (start, stop) == (last * frame_elements, num_elements)
    assert 1 <= stop - start <= frame_elements
    if last:
        assert framing.span(last - 1) == (start - frame_elements, start)


@pytest.mark.parametrize("index", [-1, 2, 10**9])
def test_there_is_no_frame_outside(index):
    with pytest.raises(FrameError) as caught:
        Framing(8, 6).span(index)
    assert str(caught.value) == f"frame {index}: expected 0 to 1"


@pytest.mark.parametrize(("num_elements", "frame_elements"), [(0, 1), (1, 0), (-1, 1)])
def test_a_framing_without_elements_is_refused(num_elements, frame_elements):
    with pytest.raises(FrameError, match="both must be at least 1"):
        Framing(num_elements, frame_elements)


PLANS = {
    # 4 n / 512 is below 64 KiB: 64 KiB, 16,384 elements; a smaller vector is one frame.
    "one element": (1, None, 1),
    "one frame": (16_384, None, 16_384),
    "two frames": (16_385, None, 16_384),
    # 4 * 11,173,962 / 512 = 87,296.6 bytes are 21,824 elements, and 85 * 256 = 21,760 of them.
    "ResNet-18": (11_173_962, None, 21_760),
    # 4 * 25,557,032 / 512 = 199,664.3 bytes are 49,916 elements, and 194 * 256 = 49,664 of them.
    "ResNet-50": (25_557_032, None, 49_664),
    "the largest": (MAX_ELEMENTS, None, 65_536),
    # 128 KiB - 40 - 512 = 130,520 bytes are 32,630 elements, and 127 * 256 = 32,512 of them.
    "AWS IoT Core": (MAX_ELEMENTS // 2, 131_072, 32_512),
    # 2,000,000 is far above what a frame needs.
    "Mosquitto 2.1": (25_557_032, 2_000_000, 49_664),
    # 1576 - 40 - 512 = 1024 bytes.
    "the least limit": (1000, 1576, 256),
}


@pytest.mark.parametrize(("num_elements", "limit", "expected"), PLANS.values(), ids=PLANS.keys())
def test_frames_are_a_512th_of_the_vector_within_bounds_and_within_the_packet_limit(num_elements, limit, expected):
    assert plan_framing(num_elements, limit) == Framing(num_elements, expected)


@given(st.integers(1, MAX_ELEMENTS), st.none() | st.integers(70_000, 2**28))
def test_whatever_the_vector_a_frame_fits_the_limit_and_there_are_not_too_many(num_elements, limit):
    framing = plan_framing(num_elements, limit)
    size_bytes = HEADER_BYTES + framing.frame_elements * 4
    assert size_bytes <= HEADER_BYTES + MAX_BODY_BYTES
    assert limit is None or size_bytes + 512 <= limit
    assert framing.num_frames <= MAX_FRAMES
    if framing.num_frames > 1 and limit is None:
        assert framing.frame_elements * 4 >= MIN_BODY_BYTES
        assert framing.frame_elements % 256 == 0


@pytest.mark.parametrize("limit", [0, 1, 552, 1575])
def test_a_packet_limit_without_room_for_a_frame_says_what_to_do(limit):
    with pytest.raises(FrameError) as caught:
        plan_framing(1000, limit)
    assert str(caught.value) == f"packet limit of {limit} bytes: expected at least 2 KiB; raise it on the broker"


def test_a_packet_limit_that_makes_too_many_frames_is_refused():
    with pytest.raises(FrameError) as caught:
        plan_framing(MAX_ELEMENTS, 2048)
    # 2048 - 40 - 512 = 1496 bytes are 374 elements, and 256 of them in a frame: 2^34 / 2^8 frames.
    assert str(caught.value) == (
        "packet limit of 2048 bytes: cuts 17179869184 elements into 67108864 frames, "
        "expected at most 1048576; raise it on the broker"
    )


# Tags and digests.


def test_the_run_tag_is_the_start_of_a_hash_of_the_run_id():
    assert run_tag("tiny") == hashlib.sha256(b"tiny").digest()[:8]


def test_the_content_tag_is_the_start_of_the_digest():
    assert content_tag("0123456789abcdef" + "f" * 48) == bytes.fromhex("0123456789abcdef")


def test_the_update_digest_is_of_the_digests_of_the_bodies_in_order():
    first, second = hashlib.sha256(b"first").digest(), hashlib.sha256(b"second").digest()
    expected = hashlib.sha256(b"midge-update-1\n" + first + second).hexdigest()
    assert update_digest([first, second]) == update_digest(iter([first, second])) == expected
    assert update_digest([second, first]) != expected
