"""What an agent keeps on disk, so that it loses nothing when it is killed.

One directory per agent:

    lock               held by the running agent: two agents cannot share a directory
    invitation.json    the invitation at hand, written before it is accepted
    model.bin          the model being fetched, or last fetched: its flat vector, float32 little-endian
    update.json        the finished update's header, written last: an update without it does not exist
    update.bin         its frames, encoded, one after the other: what is resent are these very bytes

Whatever must survive a power failure is written to a temporary file, synced, renamed, and the directory synced.
No numpy here: the supervisor handles bytes.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Protocol

import msgspec

from edge_agent.agent_events import FinishedUpdate
from midge.wire.errors import MessageError
from midge.wire.frames import ELEMENT_BYTES, HEADER_BYTES
from midge.wire.layout import Layout, model_hash
from midge.wire.messages import Head, Invitation, decode, encode

_CHUNK_BYTES = 1 << 20


class JournalError(Exception):
    """The state directory cannot be used; the message says why and what to do."""


class JournalLike(Protocol):
    """What the driver needs of a journal; tests bring one in memory."""

    def update(self) -> FinishedUpdate | None:
        """The finished update, if there is one."""

    def write_invitation(self, invitation: Invitation) -> None:
        """Write an invitation down, durably."""

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
        self.header_path = path / "update.json"
        self._model_fd = -1
        self._update_fd = -1
        self._stride = 0
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(f"{path}: another agent is running in it; give each agent its own --state-dir") from None
        except OSError as error:
            raise JournalError(f"{path}: {error.strerror}; choose a writable --state-dir") from None

    def invitation(self) -> Invitation | None:
        """The invitation that was written down last, if its work is not over."""
        try:
            return decode((self.path / "invitation.json").read_bytes(), Invitation)
        except (OSError, MessageError):
            return None

    def update(self) -> FinishedUpdate | None:
        """The finished update, if there is one and it is whole."""
        try:
            update = msgspec.json.decode(self.header_path.read_bytes(), type=FinishedUpdate)
            size_bytes = self.update_path.stat().st_size
        except (OSError, msgspec.MsgspecError):
            return None
        return update if size_bytes > HEADER_BYTES * update.num_frames else None

    def write_invitation(self, invitation: Invitation) -> None:
        """Write an invitation down, durably."""
        write_durably(self.path / "invitation.json", encode(invitation))

    def erase(self) -> None:
        """Erase invitation and update."""
        self._close_update()
        for path in (self.header_path, self.path / "invitation.json", self.update_path):
            path.unlink(missing_ok=True)

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
            size_bytes = os.fstat(self._update_fd).st_size
            # All frames but the last are of one length, so that frame i starts at i times the length of the first.
            first = os.pread(self._update_fd, HEADER_BYTES, 0)
            self._stride = (
                size_bytes if update.num_frames == 1 else HEADER_BYTES + int.from_bytes(first[24:28], "little")
            )
        return os.pread(self._update_fd, self._stride, index * self._stride)

    def forget_update_file(self) -> None:
        """A new update is about to be written in place of the old."""
        self._close_update()

    def close(self) -> None:
        """Close all files and let go of the lock."""
        self._close_model()
        self._close_update()
        os.close(self._lock_fd)

    def _close_model(self) -> None:
        if self._model_fd >= 0:
            os.close(self._model_fd)
            self._model_fd = -1

    def _close_update(self) -> None:
        if self._update_fd >= 0:
            os.close(self._update_fd)
            self._update_fd = -1


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file so that after a power failure it holds the old content or the new, whole."""
    temporary = path.with_suffix(".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, content)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _num_elements(head: Head) -> int:
    return sum(tensor.num_elements for tensor in head.layout if tensor.is_float)
