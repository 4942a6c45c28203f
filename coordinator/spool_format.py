"""The form of the spool's records. Bytes only; spool.py keeps the files.

A record, little-endian, starts at a multiple of 8 bytes:

    offset  size  field
         0     4  magic, "MSP1"
         4     1  kind: 1 a frame, 2 "forget all before this of the agent and content tag"
         5     1  zero
         6     2  length of the agent id
         8     4  length of the frame; 0 in a record of kind 2
        12    32  SHA-256 of the frame's body; in a record of kind 2 the content tag and zeros
        44     8  sum of the squares of the frame's delta, float64
        52     4  CRC-32 of the 52 bytes before it and of the agent id
        56     .  agent id, then zeros up to a multiple of 8
         .     .  the frame as it came (midge/wire/frames.py): its body, 40 bytes on, is aligned for float64
         .     .  zeros up to a multiple of 8

Bodies are aligned so that a map of the file is an array of float32 elements, and reading a body is taking a slice of it.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from midge.wire.codecs import FLOAT32
from midge.wire.errors import FrameError
from midge.wire.frames import ELEMENT_BYTES, HEADER_BYTES, Frame

FRAME = 1
FORGET = 2

_FIELDS = struct.Struct("<4sBxHI32sd")
_CHECKSUM = struct.Struct("<I")
HEAD_BYTES = _FIELDS.size + _CHECKSUM.size
MAX_NAME_BYTES = 64
_MAGIC = b"MSP1"
_ALIGNMENT = 8
_LARGEST_FRAME = 2**24 * ELEMENT_BYTES + HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Record:
    """A record's header, and where its parts lie in the segment.

    Attributes:
        kind: FRAME or FORGET.
        agent_id: whose it is.
        digest: SHA-256 of the frame's body; of a FORGET, the content tag and zeros.
        delta_sum_squares: sum of (local - global)^2 over the frame.
        frame_start: where the frame starts.
        frame_stop: past its last byte.
    """

    kind: int
    agent_id: str
    digest: bytes
    delta_sum_squares: float
    frame_start: int
    frame_stop: int

    @property
    def body_start(self) -> int:
        """Where the frame's body starts: a multiple of 8."""
        return self.frame_start + HEADER_BYTES

    @property
    def stop(self) -> int:
        """Past the record's last byte: where the next one starts."""
        return self.frame_stop + -self.frame_stop % _ALIGNMENT


def encode_head(
    start: int, kind: int, agent_id: str, digest: bytes, delta_sum_squares: float, frame_bytes: int
) -> tuple[bytes, Record]:
    """What comes before the frame in a record at `start`, and the record."""
    name = agent_id.encode()
    if len(name) > MAX_NAME_BYTES:
        raise ValueError(f"agent id of {len(name)} bytes: expected an identifier, of at most {MAX_NAME_BYTES}")
    fields = _FIELDS.pack(_MAGIC, kind, len(name), frame_bytes, digest, delta_sum_squares)
    head = b"".join((fields, _CHECKSUM.pack(zlib.crc32(name, zlib.crc32(fields))), name))
    head += bytes(-len(head) % _ALIGNMENT)
    frame_start = start + len(head)
    return head, Record(kind, agent_id, digest, delta_sum_squares, frame_start, frame_start + frame_bytes)


def decode_head(start: int, buffer: bytes) -> Record | None:
    """The record at `start`, of which `buffer` is the beginning; None where there is no whole and undamaged head."""
    if len(buffer) < HEAD_BYTES:
        return None
    magic, kind, name_bytes, frame_bytes, digest, sum_squares = _FIELDS.unpack_from(buffer)
    name = buffer[HEAD_BYTES : HEAD_BYTES + name_bytes]
    (expected,) = _CHECKSUM.unpack_from(buffer, _FIELDS.size)
    if magic != _MAGIC or zlib.crc32(name, zlib.crc32(buffer[: _FIELDS.size])) != expected:
        return None
    if frame_bytes > _LARGEST_FRAME:
        return None
    frame_start = start + HEAD_BYTES + name_bytes
    frame_start += -frame_start % _ALIGNMENT
    return Record(kind, name.decode(), digest, sum_squares, frame_start, frame_start + frame_bytes)


def check_float32(frame: Frame) -> None:
    """Check that a frame's body is its elements as they are.

    Raises:
        FrameError: it is not.
    """
    if frame.codec != FLOAT32 or len(frame.body) != frame.num_elements * ELEMENT_BYTES:
        raise FrameError(
            f"frame {frame.index}: codec {frame.codec}, {len(frame.body)} bytes for {frame.num_elements} elements: "
            f"the spool stores codec {FLOAT32}, float32, of {ELEMENT_BYTES} bytes an element"
        )
