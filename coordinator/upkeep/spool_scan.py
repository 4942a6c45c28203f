"""Reading a segment of the spool that somebody else may be writing: nothing is changed, no index is kept.

`RoundSpool` owns its file: opening one cuts a torn end off. Whoever only looks, or copies, walks the records here instead. A
segment only grows, so that whatever is before its end once stays as it is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from coordinator.spool_format import FORGET, HEAD_BYTES, MAX_NAME_BYTES, Record, check_float32, decode_head
from midge.wire.errors import FrameError
from midge.wire.frames import decode_frame


@dataclass(frozen=True, slots=True)
class SeenFrame:
    """A whole frame: how many float32 elements it has, and the SHA-256 of its body as it was read."""

    num_elements: int
    body_digest: bytes


@dataclass
class Scan:
    """What a segment holds.

    Attributes:
        stop: where its log ends: past the last record.
        frames: by agent and content tag, then by index.
        damaged: a sentence for each record whose frame is not what was written.
    """

    stop: int = 0
    frames: dict[tuple[str, bytes], dict[int, SeenFrame]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def records(fd: int) -> Iterator[Record]:
    """The records of an open segment, up to the first that is torn or damaged in its own header."""
    size_bytes, start = os.fstat(fd).st_size, 0
    while (record := decode_head(start, os.pread(fd, HEAD_BYTES + MAX_NAME_BYTES, start))) is not None:
        if record.stop > size_bytes:
            return
        yield record
        start = record.stop


def log_end(fd: int) -> int:
    """Where the log of an open segment ends."""
    return max((record.stop for record in records(fd)), default=0)


def scan(fd: int) -> Scan:
    """Read all of an open segment.

    Raises:
        OSError: it cannot be read.
    """
    found = Scan()
    for record in records(fd):
        found.stop = record.stop
        if record.kind == FORGET:
            found.frames.pop((record.agent_id, record.digest[:8]), None)
        else:
            _take(found, record, os.pread(fd, record.frame_stop - record.frame_start, record.frame_start))
    return found


def _take(found: Scan, record: Record, encoded: bytes) -> None:
    try:
        frame = decode_frame(encoded)
        check_float32(frame)
    except FrameError as error:
        found.damaged.append(f"at byte {record.frame_start}, of {record.agent_id}: {error}")
        return
    digest = hashlib.sha256(frame.body).digest()
    if digest != record.digest:
        found.damaged.append(f"at byte {record.frame_start}, of {record.agent_id}: its digest is not the record's")
        return
    frames = found.frames.setdefault((record.agent_id, bytes(frame.content_tag)), {})
    frames.setdefault(frame.index, SeenFrame(frame.num_elements, digest))
