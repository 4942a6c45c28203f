"""Frames: independently decodable slices of a flat vector.

A vector is cut into frames of equal element count (the last may be shorter). Frame i of every model and of every
update of a run covers the same elements, so a frame can be pulled, resent, checked and aggregated alone.

A frame is a header of 40 bytes, little-endian, then the body:

    offset  size  field
         0     2  magic, "MF"
         2     1  version of this format, 1
         3     1  codec of the body, see codecs.py
         4     8  run tag: the first 8 bytes of SHA-256(run id)
        12     4  round number
        16     4  index of the frame
        20     4  number of elements in the frame
        24     4  length of the body in bytes
        28     8  content tag: the first 8 bytes of the digest of the model or of the update that this is a slice of
        36     4  CRC-32 of the 36 bytes before it and of the body

The content tag ties a frame to one version: a frame of the version before, left on a topic, is told from the awaited one
without a list of digests.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from msgspec import Struct

from midge.wire.errors import FrameError

FLOAT32 = 1
"""The codec byte of float32 bodies; codecs.py has the table. Here, since to check it needs no numpy."""
HEADER_BYTES = 40
ELEMENT_BYTES = 4
MIN_BODY_BYTES = 64 * 1024
MAX_BODY_BYTES = 256 * 1024
MAX_FRAMES = 2**20
"""Frames of a vector: four times what the largest layout has in frames of `MAX_BODY_BYTES`."""
TOPIC_ALLOWANCE_BYTES = 512
"""Kept free below a packet limit for the topic and MQTT's own header."""

_MAGIC = b"MF"
_VERSION = 1
_FIELDS = struct.Struct("<2sBB8sIIII8s")
_CHECKSUM = struct.Struct("<I")
_SMALLEST_BODY_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Framing:
    """How a run cuts its flat vectors.

    Attributes:
        num_elements: length of the vector.
        frame_elements: elements in every frame but the last, which holds the rest.
    """

    num_elements: int
    frame_elements: int

    def __post_init__(self) -> None:
        if self.num_elements < 1 or self.frame_elements < 1:
            raise FrameError(f"{self}: both must be at least 1")

    @property
    def num_frames(self) -> int:
        """How many frames cover the vector."""
        return -(-self.num_elements // self.frame_elements)

    def span(self, index: int) -> tuple[int, int]:
        """First and past-the-last element of frame `index`."""
        if not 0 <= index < self.num_frames:
            raise FrameError(f"frame {index}: expected 0 to {self.num_frames - 1}")
        start = index * self.frame_elements
        return start, min(start + self.frame_elements, self.num_elements)


def plan_framing(num_elements: int, packet_limit_bytes: int | None = None) -> Framing:
    """Choose the frame size of a run.

    The vector's size over 512, held within 64 to 256 KiB (the plateau of throughput that was measured, see
    docs/architecture.md), then within `packet_limit_bytes`, the smallest packet limit met.

    Raises:
        FrameError: the packet limit leaves no room for a useful frame, or asks for more than `MAX_FRAMES` of them.
    """
    body_bytes = min(max(num_elements * ELEMENT_BYTES // 512, MIN_BODY_BYTES), MAX_BODY_BYTES)
    if packet_limit_bytes is not None:
        body_bytes = min(body_bytes, packet_limit_bytes - HEADER_BYTES - TOPIC_ALLOWANCE_BYTES)
    if body_bytes < _SMALLEST_BODY_BYTES:
        raise FrameError(f"packet limit of {packet_limit_bytes} bytes: expected at least 2 KiB; raise it on the broker")
    frame_elements = body_bytes // ELEMENT_BYTES // 256 * 256
    framing = Framing(num_elements, min(frame_elements, num_elements))
    if framing.num_frames > MAX_FRAMES:
        raise FrameError(
            f"packet limit of {packet_limit_bytes} bytes: cuts {num_elements} elements into {framing.num_frames} frames, "
            f"expected at most {MAX_FRAMES}; raise it on the broker"
        )
    return framing


class Frame(Struct, frozen=True):
    """A decoded frame: its header's fields, and its body as a view of the received buffer (nothing is copied)."""

    codec: int
    run_tag: bytes
    round_num: int
    index: int
    num_elements: int
    content_tag: bytes
    body: memoryview


def run_tag(run_id: str) -> bytes:
    """The 8 bytes that name a run in its frames."""
    return hashlib.sha256(run_id.encode()).digest()[:8]


def content_tag(digest: str) -> bytes:
    """The 8 bytes that name a model or an update in its frames, from its digest in hexadecimal digits."""
    return bytes.fromhex(digest[:16])


def update_digest(body_digests: Iterable[bytes]) -> str:
    """The digest of an update: SHA-256 over the SHA-256 of each frame's body, in the order of the frames.

    It is built from digests of frames so that frames can be checked as they come, in any order.
    """
    return hashlib.sha256(b"midge-update-1\n" + b"".join(body_digests)).hexdigest()


def encode_frame(
    *,
    codec: int,
    run_tag: bytes,
    round_num: int,
    index: int,
    num_elements: int,
    content_tag: bytes,
    body: bytes | memoryview,
) -> bytes:
    """One frame, ready to be published."""
    fields = _FIELDS.pack(_MAGIC, _VERSION, codec, run_tag, round_num, index, num_elements, len(body), content_tag)
    return b"".join((fields, _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(fields))), body))


def decode_frame(buffer: bytes | memoryview) -> Frame:
    """The frame in `buffer`, which must hold exactly one.

    Raises:
        FrameError: it does not, or a byte of it was changed on the way.
    """
    view = memoryview(buffer)
    if len(view) < HEADER_BYTES:
        raise FrameError(f"frame of {len(view)} bytes: expected at least the {HEADER_BYTES} of its header")
    magic, version, codec, run, round_num, index, num_elements, body_bytes, tag = _FIELDS.unpack_from(view)
    if magic != _MAGIC:
        raise FrameError(f"frame starts with {bytes(magic)!r}: expected {_MAGIC!r}")
    if version != _VERSION:
        raise FrameError(f"frame of format version {version}: this side reads version {_VERSION}")
    if body_bytes != len(view) - HEADER_BYTES:
        raise FrameError(f"frame with a body of {len(view) - HEADER_BYTES} bytes: its header says {body_bytes}")
    (expected,) = _CHECKSUM.unpack_from(view, _FIELDS.size)
    body = view[HEADER_BYTES:]
    seen = zlib.crc32(body, zlib.crc32(view[: _FIELDS.size]))
    if seen != expected:
        raise FrameError(f"frame {index}: CRC-32 is {seen:08x}, its header says {expected:08x}: corrupted on the way")
    return Frame(codec, run, round_num, index, num_elements, tag, body)
