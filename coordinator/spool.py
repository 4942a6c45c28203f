"""The spool: where the frames of updates wait on disk until their round is aggregated.

It is a log. Each round of a run has one segment, `<dir>/<run_id>/<round_num>.spool`, to which records are only ever
appended; frames come in any order, from all agents at once, and `sync` makes all that came since the last one durable with
a single `fdatasync`. What is stored is found again by an index in memory, which opening a segment rebuilds from its records
(spool_format.py has their form).

**Recovery.** A process that dies while it appends leaves a torn record at the end; after a power failure, anything that was
not synced may be missing or zero. Opening reads every record: one whose own header is damaged ends the log, and what
follows is cut off; one whose frame is damaged is skipped. Neither loses more than a resend, since an agent keeps its update
until it has a receipt.

**A sync that fails** leaves it unknown what the file holds, and a later one that succeeds says nothing about it: the kernel may
have dropped what it could not write, and take it for clean. So nothing is written to such a segment any more; `Spool.reopen`
cuts it back to where it was last durable. What is lost thereby, agents send again.

**Growth.** Beyond its first 2 MiB a segment grows by 2 MiB of zeros at a time, into which records are then written. That is
for the reader: pages that one large write made lie together in memory, and mapping them takes a tenth of the page faults
that pages of many small writes do (aggregation measured 1.5 times faster, appending no slower).

**Reading** is by position, so threads read while one thread appends. `read_into` copies; aggregation reads through a memory map
(`located`, `load_rows`), which measured a quarter faster, and the map's pages are given back after every 64 MiB, so that memory
does not grow with the segment. A map turns a failing disk into a signal that ends the process; but what is read was just
written, or read when the segment was opened, and both report such a disk as an `OSError`.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from coordinator.files import sync_dir
from coordinator.spool_format import (
    FORGET,
    FRAME,
    HEAD_BYTES,
    MAX_NAME_BYTES,
    Record,
    check_float32,
    decode_head,
    encode_head,
)
from midge.wire.errors import FrameError
from midge.wire.frames import ELEMENT_BYTES, Frame, decode_frame
from midge.wire.identifiers import check_identifier

_EXTENT_BYTES = 2 * 1024 * 1024
_MAX_RESIDENT_EXTENTS = 32
_FLOAT32_LE = np.dtype("<f4")
_NOTHING: Mapping[int, StoredFrame] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """Where a frame lies in its segment, and what was computed when it came.

    Attributes:
        offset: of the body's first byte in the segment, a multiple of 8.
        num_elements: float32 elements in the body.
        body_digest: SHA-256 of the body.
        delta_sum_squares: sum of (local - global)^2 over the frame.
    """

    offset: int
    num_elements: int
    body_digest: bytes
    delta_sum_squares: float


@dataclass(frozen=True, slots=True)
class Recovery:
    """What opening a segment found: frames kept, damaged frames skipped, and torn bytes cut off at the end."""

    num_frames: int = 0
    num_damaged: int = 0
    truncated_bytes: int = 0


class RoundSpool:
    """The frames of one round. One thread appends, forgets and syncs; any may read.

    Args:
        path: the segment; created where it does not exist, else recovered.

    Attributes:
        recovery: what opening it found.

    Raises:
        OSError: the disk is full or fails. Every method that writes raises it likewise; the segment stays consistent, and
            what was appended before stays stored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recovery = Recovery()
        self._frames: dict[tuple[str, bytes], dict[int, StoredFrame]] = {}
        self._end = 0
        self._grown = 0
        self._dirty = False
        self._durable_end = 0
        self._is_doubtful = False
        self._map: mmap.mmap | None = None
        self._resident: set[int] = set()
        self._elements = np.empty(0, _FLOAT32_LE)
        self._map_lock = threading.Lock()
        created = not path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if created:
                sync_dir(path.parent)
            else:
                self._recover()
                # A process that was killed left its records in the page cache: there to be read, but not yet durable.
                self._dirty = self._end > 0
                self.sync()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        num_frames = sum(map(len, self._frames.values()))
        return f"RoundSpool({str(self.path)!r}, {num_frames} frames, {self._end} bytes)"

    @property
    def closed(self) -> bool:
        """Whether `close` or `remove` was called."""
        return self._fd < 0

    @property
    def size_bytes(self) -> int:
        """Bytes in the segment."""
        return self._end

    def append(
        self,
        agent_id: str,
        encoded: bytes | memoryview,
        body_digest: bytes,
        delta_sum_squares: float,
        *,
        frame: Frame | None = None,
    ) -> bool:
        """Store a frame; false, with nothing written, if the one of its agent, content tag and index is there already.

        Args:
            agent_id: whose update it is a slice of.
            encoded: the frame as it came, header and body.
            body_digest: SHA-256 of its body.
            delta_sum_squares: sum of (local - global)^2 over it.
            frame: `encoded` after `decode_frame`; giving it saves a second CRC over the body.

        Raises:
            FrameError: `encoded` is no frame, or not of codec float32.
            OSError: it could not be written; the segment is as before.
        """
        frame = decode_frame(encoded) if frame is None else frame
        check_float32(frame)
        key = (agent_id, bytes(frame.content_tag))
        if frame.index in self._frames.get(key, _NOTHING):
            return False
        record = self._write(FRAME, agent_id, encoded, body_digest, delta_sum_squares)
        self._remember(record, frame)
        return True

    def forget(self, agent_id: str, content_tag: bytes) -> None:
        """Treat all frames of this update as never stored, from now on and after a restart. Their bytes stay in the log."""
        if self._frames.pop((agent_id, content_tag), None) is not None:
            self._write(FORGET, agent_id, b"", content_tag, 0.0)

    def sync(self) -> None:
        """Make all that was appended durable: one `fdatasync`, and none if nothing was.

        Raises:
            OSError: the disk failed, and what it holds is unknown: no later success says otherwise. See `settle`.
        """
        if not self._dirty:
            return
        self._refuse_if_doubtful()
        try:
            os.fdatasync(self._fd)
        except OSError:
            self._is_doubtful = True
            raise
        self._dirty = False
        self._durable_end = self._end

    def settle(self) -> None:
        """After a sync that failed, before the segment is opened again: cut off what may not be there.

        Raises:
            OSError: the disk still fails.
        """
        if self._is_doubtful:
            os.ftruncate(self._fd, self._durable_end)
            os.fsync(self._fd)
            self._is_doubtful = False

    def stored(self, agent_id: str, content_tag: bytes) -> Mapping[int, StoredFrame]:
        """The frames of one update by index: a read-only view that grows as more come."""
        return MappingProxyType(self._frames.get((agent_id, content_tag), {}))

    def read_into(self, frame: StoredFrame, out: NDArray[np.float32]) -> None:
        """Copy a frame's elements into `out` (float32[frame.num_elements], contiguous)."""
        if out.shape != (frame.num_elements,) or out.dtype != np.float32:
            raise ValueError(f"out is {out.shape} {out.dtype}: expected ({frame.num_elements},) float32")
        view = out.data.cast("B")
        done = 0
        while done < len(view):
            num_bytes = os.preadv(self._fd, [view[done:]], frame.offset + done)
            if num_bytes == 0:
                raise OSError(f"{self.path} ends at byte {frame.offset + done}, within a stored frame: it was cut")
            done += num_bytes
        if sys.byteorder == "big":
            out.byteswap(inplace=True)

    def load_rows(self, frames: Sequence[StoredFrame], first: int, out: NDArray[np.float64]) -> None:
        """Widen a slice of each of `frames` into a row of `out` (float64[len(frames), n]): elements `first` to `first + n`."""
        elements, starts = self.located(frames, first, out.shape[1])
        out[:] = [elements[start : start + out.shape[1]] for start in starts]

    def located(
        self, frames: Sequence[StoredFrame], first: int, num_elements: int
    ) -> tuple[NDArray[np.float32], list[int]]:
        """The segment's map as elements (little-endian float32, read-only), and where in it element `first` of each frame is.

        The map may be read until `close`. Its pages are given back at a later call, as said above.
        """
        stop = first + num_elements
        if min([frame.num_elements for frame in frames]) < stop:
            raise ValueError(f"elements {first} to {stop} are not in all of {frames}")
        offsets = [frame.offset for frame in frames]
        elements = self._mapped(max(offsets) + stop * ELEMENT_BYTES)
        self._make_resident({offset // _EXTENT_BYTES for offset in offsets})
        return elements, [offset // ELEMENT_BYTES + first for offset in offsets]

    def close(self) -> None:
        """Close the segment; it stays on disk."""
        self._elements = np.empty(0, _FLOAT32_LE)
        if self._map is not None:
            with contextlib.suppress(BufferError):  # a thread still reads through it: it goes when the thread is done
                self._map.close()
            self._map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Close the segment and delete it."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _make_resident(self, extents: set[int]) -> None:
        """Give pages back if these extents, which are about to be read, would be too many."""
        if len(self._resident | extents) > _MAX_RESIDENT_EXTENTS and self._map is not None:
            self._resident.clear()
            self._map.madvise(mmap.MADV_DONTNEED)  # harmless to other threads: they map their pages again
        self._resident |= extents

    def _mapped(self, stop: int) -> NDArray[np.float32]:
        """The segment as float32 elements, at least as far as byte `stop`."""
        with self._map_lock:
            if self._elements.nbytes < stop:
                self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
                self._elements = np.frombuffer(self._map, _FLOAT32_LE, len(self._map) // ELEMENT_BYTES)
            return self._elements

    def _write(
        self, kind: int, agent_id: str, encoded: bytes | memoryview, digest: bytes, sum_squares: float
    ) -> Record:
        head, record = encode_head(self._end, kind, agent_id, digest, sum_squares, len(encoded))
        self._write_all([head, encoded, bytes(record.stop - record.frame_stop)], record.stop - self._end)
        self._end = record.stop
        return record

    def _refuse_if_doubtful(self) -> None:
        if self._is_doubtful:
            raise OSError(errno.EIO, f"{self.path}: a sync failed; it must be opened again")

    def _write_all(self, parts: list[bytes | memoryview], num_bytes: int) -> None:
        self._refuse_if_doubtful()
        self._dirty = True
        try:
            self._grow(self._end + num_bytes)
            written = os.pwritev(self._fd, parts, self._end)
            if written < num_bytes:  # the disk is nearly full, or a signal came: the next write says which
                rest = memoryview(b"".join(parts))
                while written < num_bytes:
                    written += os.pwrite(self._fd, rest[written:], self._end + written)
        except OSError:
            # What was written in part lies past the end of the log, and the next record would overwrite it anyway.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            self._grown = self._end
            raise

    def _grow(self, stop: int) -> None:
        """Make room up to byte `stop`, in whole extents at multiples of their size."""
        if stop < _EXTENT_BYTES:
            return
        extent = max(self._grown, self._end)
        extent += -extent % _EXTENT_BYTES
        while extent < stop:
            extent += os.pwrite(self._fd, bytes(_EXTENT_BYTES - extent % _EXTENT_BYTES), extent)
        self._grown = max(self._grown, extent)

    def _remember(self, record: Record, frame: Frame) -> None:
        frames = self._frames.setdefault((record.agent_id, bytes(frame.content_tag)), {})
        frames[frame.index] = StoredFrame(
            record.body_start, frame.num_elements, record.digest, record.delta_sum_squares
        )

    def _recover(self) -> None:
        size_bytes = os.fstat(self._fd).st_size
        num_damaged = 0
        while (record := self._read_record(self._end, size_bytes)) is not None:
            num_damaged += not self._replay(record)
            self._end = record.stop
        torn_bytes = self._torn_bytes(size_bytes)
        if self._end < size_bytes:
            os.ftruncate(self._fd, self._end)
        num_frames = sum(map(len, self._frames.values()))
        self.recovery = Recovery(num_frames, num_damaged, torn_bytes)

    def _torn_bytes(self, size_bytes: int) -> int:
        """How much lies past the end of the log, but for the room that it had to grow."""
        rest_bytes = size_bytes - self._end
        if rest_bytes > 2 * _EXTENT_BYTES:
            return rest_bytes
        return len(os.pread(self._fd, rest_bytes, self._end).rstrip(b"\0"))

    def _read_record(self, start: int, size_bytes: int) -> Record | None:
        """The record at `start`; None where the log ends, whole or torn."""
        record = decode_head(start, os.pread(self._fd, HEAD_BYTES + MAX_NAME_BYTES, start))
        return record if record is not None and record.stop <= size_bytes else None

    def _replay(self, record: Record) -> bool:
        """Take up a record in the index; false where its frame is damaged."""
        if record.kind == FORGET:
            self._frames.pop((record.agent_id, record.digest[:8]), None)
            return True
        try:
            frame = decode_frame(os.pread(self._fd, record.frame_stop - record.frame_start, record.frame_start))
            check_float32(frame)
        except FrameError:
            return False
        self._remember(record, frame)
        return True


class Spool:
    """The segments of all rounds. Any thread may ask for one.

    Args:
        path: the directory; created where it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[tuple[str, int], RoundSpool] = {}
        self._lock = threading.Lock()
        path.mkdir(parents=True, exist_ok=True)

    def __repr__(self) -> str:
        return f"Spool({str(self.path)!r}, {len(self._open)} open)"

    def round(self, run_id: str, round_num: int) -> RoundSpool:
        """The segment of a round, created or recovered at the first call."""
        key = (check_identifier("run", run_id), round_num)
        with self._lock:
            if key not in self._open or self._open[key].closed:
                run_dir = self.path / run_id
                if not run_dir.exists():
                    run_dir.mkdir()
                    sync_dir(self.path)
                self._open[key] = RoundSpool(run_dir / f"{round_num:d}.spool")
            return self._open[key]

    def prune(self, run_id: str, keep_from_round: int) -> int:
        """Delete the run's segments of rounds before `keep_from_round`.

        Returns:
            How many segments were deleted.
        """
        num_deleted = 0
        run_dir = self.path / check_identifier("run", run_id)
        for path in sorted(run_dir.glob("*.spool")):
            if not path.stem.isdecimal() or int(path.stem) >= keep_from_round:
                continue
            segment = self._open.pop((run_id, int(path.stem)), None)
            if segment is not None:
                segment.close()
            path.unlink(missing_ok=True)
            num_deleted += 1
        return num_deleted

    def reopen(self) -> None:
        """Close all segments, so that each is read again when it is next asked for: what is known of it is what is on disk.

        Raises:
            OSError: the disk still fails.
        """
        with self._lock:
            for key, segment in list(self._open.items()):
                if not segment.closed:
                    segment.settle()
                    segment.close()
                del self._open[key]

    def close(self) -> None:
        """Close all segments; they stay on disk."""
        for segment in self._open.values():
            segment.close()
        self._open.clear()
