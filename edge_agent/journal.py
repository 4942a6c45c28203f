"""What an agent keeps on disk, so that it loses nothing when it is killed.

One directory per agent:

    lock               held by the running agent: two agents cannot share a directory
    invitation.json    the invitation at hand, written before it is accepted
    model.bin          the model being fetched, or last fetched: its flat vector, float32 little-endian
    update.bin         the finished update: its encoded frames one after the other (what is resent are these very bytes),
                       then its header as JSON, then a footer that says how long the header is, and its CRC-32

An update exists once its footer is whole: it is written last, and one sync makes all of it durable. Files are written in place,
so that nothing else need be synced. A power failure before that sync may keep the footer and lose what is before it, and cards
forget bits: what an earlier process left is compared with its digest, since a damaged update would be sent in vain for ever.
The invitation is not synced: it must outlive a kill, and after a power failure the coordinator invites again. No numpy here:
the supervisor handles bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import msgspec

from edge_agent.agent_events import FinishedUpdate
from midge.wire.errors import FrameError, MessageError
from midge.wire.frames import ELEMENT_BYTES, HEADER_BYTES, decode_frame, update_digest
from midge.wire.layout import Layout, model_hash
from midge.wire.messages import Head, Invitation, decode, encode

_CHUNK_BYTES = 1 << 20
_FOOTER = struct.Struct("<II4s")
_MAGIC = b"MUPD"
_to_json = msgspec.json.Encoder().encode


class JournalError(Exception):
    """The state directory cannot be used; the message says why and what to do."""


class JournalInUseError(JournalError):
    """A running agent has the state directory."""


class JournalLike(Protocol):
    """What the driver needs of a journal; tests bring one in memory."""

    def update(self) -> FinishedUpdate | None:
        """The finished update, if there is one."""

    def write_invitation(self, invitation: Invitation) -> None:
        """Write an invitation down."""

    def erase(self) -> None:
        """Erase invitation and update."""

    def open_model(self, head: Head) -> None:
        """Make room for a model."""

    def write_frame(self, head: Head, index: int, body: memoryview) -> None:
        """Store one frame's elements at their place."""

    def model_is(self, head: Head) -> bool:
        """Whether the stored model is the head's."""

    def read_frame(self, update: FinishedUpdate, index: int) -> bytes:
        """A frame of the finished update, as it is sent."""


class Journal:
    """The directory.

    Args:
        path: made where it does not exist.

    Raises:
        JournalError: it cannot be written, or another agent has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model_path = path / "model.bin"
        self.update_path = path / "update.bin"
        self._model_fd = -1
        self._update_fd = -1
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            raise JournalInUseError(
                f"{path}: an agent with this id is running in it already; give this one another --agent-id"
            ) from None
        except OSError as error:
            raise JournalError(f"{path}: {error.strerror}; choose a writable --state-dir") from None

    def invitation(self) -> Invitation | None:
        """The invitation that was written down last, if its work is not over."""
        try:
            return decode((self.path / "invitation.json").read_bytes(), Invitation)
        except (OSError, MessageError):
            return None

    def update(self) -> FinishedUpdate | None:
        """The finished update, if there is one, and every byte of it is as it was written."""
        try:
            update = read_update(self.update_path)
            return update if update is not None and self._is_sound(update) else None
        except OSError:
            return None

    def write_invitation(self, invitation: Invitation) -> None:
        """Write an invitation down."""
        temporary = self.path / "invitation.tmp"
        temporary.write_bytes(encode(invitation))
        temporary.replace(self.path / "invitation.json")

    def erase(self) -> None:
        """Erase invitation and update."""
        self._close_update()
        for path in (self.update_path, self.path / "invitation.json"):
            with contextlib.suppress(FileNotFoundError):
                os.truncate(path, 0)

    def open_model(self, head: Head) -> None:
        """Make room for a model."""
        self._close_model()
        self._model_fd = os.open(self.model_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._model_fd, _num_elements(head) * ELEMENT_BYTES)

    def write_frame(self, head: Head, index: int, body: memoryview) -> None:
        """Store one frame's elements at their place."""
        start = index * head.frame_elements * ELEMENT_BYTES
        expected = min(head.frame_elements * ELEMENT_BYTES, _num_elements(head) * ELEMENT_BYTES - start)
        if len(body) != expected:
            raise ValueError(f"frame {index} of {len(body)} bytes: expected {expected}")
        os.pwrite(self._model_fd, body, start)

    def model_is(self, head: Head) -> bool:
        """Whether the stored model is the head's, by its digest."""
        hasher = model_hash(Layout(head.layout), head.counters)
        buffer = bytearray(_CHUNK_BYTES)
        offset = 0
        while num_bytes := os.preadv(self._model_fd, [buffer], offset):
            hasher.update(memoryview(buffer)[:num_bytes])
            offset += num_bytes
        return hasher.hexdigest() == head.model_digest

    def read_frame(self, update: FinishedUpdate, index: int) -> bytes:
        """A frame of the finished update, as it is sent."""
        if self._update_fd < 0:
            self._update_fd = os.open(self.update_path, os.O_RDONLY | os.O_CLOEXEC)
        # All frames but the last are of one length, which the first one's header has at byte 24.
        frame_bytes = HEADER_BYTES + self._body_bytes(0)
        start = index * frame_bytes
        expected = max(0, min(frame_bytes, update.frames_bytes - start))
        frame = os.pread(self._update_fd, expected, start)
        if len(frame) < expected:
            raise OSError(errno.EIO, f"{self.update_path} ends within frame {index}: it was cut")
        return frame

    def forget_update_file(self) -> None:
        """A new update is about to be written in place of the old."""
        self._close_update()

    def close(self) -> None:
        """Close all files and let go of the lock."""
        self._close_model()
        self._close_update()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _is_sound(self, update: FinishedUpdate) -> bool:
        """Whether the frames add up to the update's digest. Reads them all, one at a time."""
        try:
            bodies = (decode_frame(self.read_frame(update, index)).body for index in range(update.num_frames))
            return update_digest(hashlib.sha256(body).digest() for body in bodies) == update.update_digest
        except FrameError:
            return False
        finally:
            self._close_update()

    def _body_bytes(self, offset: int) -> int:
        return int.from_bytes(os.pread(self._update_fd, 4, offset + 24), "little")

    def _close_model(self) -> None:
        if self._model_fd >= 0:
            os.close(self._model_fd)
            self._model_fd = -1

    def _close_update(self) -> None:
        if self._update_fd >= 0:
            os.close(self._update_fd)
            self._update_fd = -1


def write_update(path: Path, frames: Iterable[bytes], update: FinishedUpdate) -> None:
    """Write a finished update, durably; `update.frames_bytes` is the length of all frames together."""
    header = _to_json(update)
    with path.open("wb", buffering=1 << 20) as file:
        for frame in frames:
            file.write(frame)
        file.write(header)
        file.write(_FOOTER.pack(len(header), zlib.crc32(header), _MAGIC))
        file.flush()
        os.fdatasync(file.fileno())


def read_update(path: Path) -> FinishedUpdate | None:
    """What the file's footer and header say; None where there is no whole update."""
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        footer = os.pread(file.fileno(), _FOOTER.size, max(0, size_bytes - _FOOTER.size))
        if len(footer) < _FOOTER.size:
            return None
        header_bytes, checksum, magic = _FOOTER.unpack(footer)
        if magic != _MAGIC or header_bytes > size_bytes - _FOOTER.size:
            return None
        header = os.pread(file.fileno(), header_bytes, size_bytes - _FOOTER.size - header_bytes)
    if zlib.crc32(header) != checksum:
        return None
    try:
        update = msgspec.json.decode(header, type=FinishedUpdate)
    except msgspec.MsgspecError:
        return None
    return update if update.frames_bytes + header_bytes + _FOOTER.size == size_bytes else None


def _num_elements(head: Head) -> int:
    return sum(tensor.num_elements for tensor in head.layout if tensor.is_float)
