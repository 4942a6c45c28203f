"""Models on disk: safetensors files that hold no code, named by the model's digest.

`<dir>/<digest>.safetensors` holds one version. The digest is that of midge/wire/layout.py, over layout, counters and
elements, so that equal models are one file and a file can be checked by its name. Nothing in a file varies beyond that: the
same digest is the same bytes. model_format.py describes the form, in which a slice of the flat vector is written and read
in place, by several threads, so that a model is never whole in memory.

A model appears under its name complete and durable or not at all: it is written to a temporary file, synced, renamed, and
the directory is synced. Leftovers of a process that died are removed by the next one; a lock tells them from live ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from coordinator.files import sync_dir, write_at
from coordinator.model_format import FilePlan, ModelError, export_plan, model_plan, narrow, read_header
from midge.failpoints import fail_point
from midge.tasks.base import State
from midge.tasks.flatten import layout_of, state_to_vector, vector_to_state
from midge.wire.frames import ELEMENT_BYTES
from midge.wire.layout import Layout, model_hash

__all__ = [
    "ModelError",
    "ModelFile",
    "ModelStore",
    "ModelWriter",
    "export",
    "is_abandoned",
    "verify_file",
    "write_export",
]

_CHUNK_ELEMENTS = 256 * 1024
_FLOAT32_LE = np.dtype("<f4")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class ModelWriter:
    """A model in the making. As a context, it is given up unless it was committed.

    Args:
        directory: where it will be.
        layout: its layout.
        counters: its integer buffers' elements.

    Raises:
        LayoutError: the counters do not fit the layout.
        OSError: the disk is full or fails. `write` and `commit` raise it likewise.
    """

    def __init__(self, directory: Path, layout: Layout, counters: Sequence[int]) -> None:
        layout.check_counters(counters)
        self._directory = directory
        self._layout = layout
        self._counters = tuple(counters)
        self._plan = model_plan(layout)
        self._num_written = 0
        self._lock = threading.Lock()
        self._path, self._fd = _open_temporary(directory)
        try:
            os.posix_fallocate(self._fd, 0, self._plan.size_bytes)
            write_at(self._fd, self._plan.header, 0)
            for spec, start, stop in layout.integers():
                buffer = np.array(counters[start:stop], dtype=np.dtype(spec.dtype).newbyteorder("<"))
                write_at(self._fd, buffer.tobytes(), self._plan.offsets[spec.name])
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def write(self, start_element: int, elements: NDArray[np.float32]) -> None:
        """Put `elements` (float32[n]) at their place in the flat vector. Any thread may, each its own slice, once."""
        stop = start_element + len(elements)
        if (
            elements.dtype != np.float32
            or elements.ndim != 1
            or not 0 <= start_element <= stop <= self._layout.num_elements
        ):
            raise ValueError(
                f"elements {start_element} to {stop}, {elements.ndim}-d {elements.dtype}: "
                f"expected float32[n] within 0 to {self._layout.num_elements}"
            )
        body = np.ascontiguousarray(elements, dtype=_FLOAT32_LE).data.cast("B")
        write_at(self._fd, body, self._plan.floats_start + start_element * ELEMENT_BYTES)
        with self._lock:
            self._num_written += len(elements)

    def commit(self) -> str:
        """Make the model durable under its digest, and return that. A model of the same digest is replaced by itself."""
        if self._num_written != self._layout.num_elements:
            raise ValueError(
                f"{self._num_written} elements were written: expected all {self._layout.num_elements}, once"
            )
        digest = _digest(self._fd, self._plan, self._layout, self._counters)
        fail_point("coordinator.model.written")
        os.fsync(self._fd)
        fail_point("coordinator.model.synced")
        self._path.replace(_model_path(self._directory, digest))
        sync_dir(self._directory)
        fail_point("coordinator.model.renamed")
        os.close(self._fd)
        self._fd = -1
        return digest

    def abort(self) -> None:
        """Give the model up; without effect once it is committed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._path.unlink(missing_ok=True)


class ModelFile:
    """A stored model, read through a memory map: what is not looked at costs no memory.

    Attributes:
        digest: the model's.
        layout: its layout, as it was stored.
        counters: its integer buffers' elements.
        elements: the flat vector, float32[layout.num_elements], read-only. It stays valid after `close`.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.digest = digest
        with path.open("rb") as file:
            self.layout, self._plan = read_header(file.fileno(), path)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.elements: NDArray[np.float32] = self._array(
            _FLOAT32_LE, self.layout.num_elements, self._plan.floats_start
        ).astype(np.float32, copy=False)
        self.counters: tuple[int, ...] = tuple(
            int(value)
            for spec, _, _ in self.layout.integers()
            for value in self._array(
                np.dtype(spec.dtype).newbyteorder("<"), spec.num_elements, self._plan.offsets[spec.name]
            ).tolist()
        )

    def __repr__(self) -> str:
        return f"ModelFile({self.digest[:12]}, {self.layout.num_elements} elements)"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state(self) -> dict[str, NDArray[Any]]:
        """The model as arrays of the layout's shapes and types (bfloat16 as float32): a copy, in memory."""
        return vector_to_state(np.array(self.elements), self.counters, self.layout)

    def release(self) -> None:
        """Give back the memory in which the file's pages are resident. Harmless at any time, in any thread."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Close the file. Views of `elements` that are still held keep it mapped until they are gone."""
        self.elements = np.empty(0, np.float32)
        with contextlib.suppress(BufferError):
            self._map.close()

    def _array(self, dtype: np.dtype[Any], num_elements: int, offset: int) -> NDArray[Any]:
        return np.frombuffer(self._map, dtype, num_elements, offset) if num_elements else np.empty(0, dtype)


class ModelStore:
    """The models in a directory.

    Args:
        path: the directory; created where it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)

    def __repr__(self) -> str:
        return f"ModelStore({str(self.path)!r})"

    def writer(self, layout: Layout, counters: Sequence[int]) -> ModelWriter:
        """Begin a model, to be written slice by slice."""
        return ModelWriter(self.path, layout, counters)

    def save_state(self, state: State) -> str:
        """Store a model given as arrays, in the order of its state dictionary, and return its digest.

        Raises:
            LayoutError: an array has a type that cannot travel.
        """
        layout = layout_of(state)
        vector, counters = state_to_vector(state, layout)
        with self.writer(layout, counters) as writer:
            writer.write(0, vector)
            return writer.commit()

    def open(self, digest: str) -> ModelFile:
        """The model of this digest. Its header is checked; `verify` checks the rest.

        Raises:
            ModelError: it is not in the store, or its file is damaged.
        """
        path = _model_path(self.path, digest)
        try:
            return ModelFile(path, digest)
        except FileNotFoundError:
            raise ModelError(f"model {digest} is not in {self.path}") from None

    def verify(self, digest: str) -> None:
        """Read the whole model and check that it is what its name says.

        Raises:
            ModelError: it is not, or it is not in the store.
        """
        with self.open(digest) as model, _model_path(self.path, digest).open("rb") as file:
            seen = _digest(file.fileno(), model._plan, model.layout, model.counters)  # noqa: SLF001
        if seen != digest:
            raise ModelError(f"model {digest} in {self.path} has digest {seen}: its file was changed; restore it")

    def delete(self, digest: str) -> None:
        """Remove a model, if it is there."""
        _model_path(self.path, digest).unlink(missing_ok=True)

    def digests(self) -> set[str]:
        """The digests of all models in the store."""
        return {path.stem for path in self.path.glob("*.safetensors") if _DIGEST.fullmatch(path.stem)}

    def export(self, digest: str, path: Path) -> None:
        """Write the model to `path` as a safetensors file of the layout's own types, for any library that reads those.

        Raises:
            ModelError: the model is not in the store, or holds a value beyond the range of its own type.
            OSError: `path` cannot be written.
        """
        with self.open(digest) as model:
            export(model, path)


def export(model: ModelFile, path: Path) -> None:
    """Write an open model to `path`, at once or not at all; see `ModelStore.export`."""
    temporary, fd = _open_temporary(path.parent)
    try:
        write_export(model, fd)
        os.fsync(fd)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def write_export(model: ModelFile, fd: int) -> None:
    """Write an open model to an open, empty file, as a safetensors file of the layout's own types.

    Raises:
        ModelError: it holds a value beyond the range of its own type.
        OSError: the disk is full or fails.
    """
    plan = export_plan(model.layout)
    write_at(fd, plan.header, 0)
    _export_tensors(model, lambda body, name, done: write_at(fd, body, plan.offsets[name] + done))


def verify_file(path: Path, digest: str) -> Layout:
    """Read a whole model file and check that it is the model of this digest, and finite. Changes nothing.

    Raises:
        ModelError: it is not; the message says what is wrong with it.
        OSError: it cannot be read.
    """
    with ModelFile(path, digest) as model, path.open("rb") as file:
        seen = _digest(file.fileno(), model._plan, model.layout, model.counters)  # noqa: SLF001
        if seen != digest:
            raise ModelError(f"its bytes have digest {seen[:12]}...: it was changed")
        for start in range(0, model.layout.num_elements, _CHUNK_ELEMENTS):
            if not np.isfinite(model.elements[start : start + _CHUNK_ELEMENTS]).all():
                raise ModelError(f"elements {start} to {start + _CHUNK_ELEMENTS} are not all finite")
        return model.layout


def _export_tensors(model: ModelFile, write: Callable[[bytes, str, int], None]) -> None:
    for spec, start, stop in model.layout.floats():
        done = 0
        for first in range(start, stop, _CHUNK_ELEMENTS):
            body = narrow(model.elements[first : min(first + _CHUNK_ELEMENTS, stop)], spec)
            write(body, spec.name, done)
            done += len(body)
    for spec, start, stop in model.layout.integers():
        buffer = np.array(model.counters[start:stop], dtype=np.dtype(spec.dtype).newbyteorder("<"))
        write(buffer.tobytes(), spec.name, 0)


def _model_path(directory: Path, digest: str) -> Path:
    if _DIGEST.fullmatch(digest) is None:
        raise ModelError(f"model {digest[:80]!r}: expected a digest of 64 hexadecimal digits")
    return directory / f"{digest}.safetensors"


def _digest(fd: int, plan: FilePlan, layout: Layout, counters: Sequence[int]) -> str:
    """The digest of the model in an open file, read piece by piece."""
    hasher = model_hash(layout, counters)
    piece = memoryview(bytearray(_CHUNK_ELEMENTS * ELEMENT_BYTES))
    position, stop = plan.floats_start, plan.floats_start + layout.num_elements * ELEMENT_BYTES
    while position < stop:
        num_bytes = os.preadv(fd, [piece[: stop - position]], position)
        if num_bytes == 0:
            raise ModelError(f"model file ends at byte {position}: expected {stop}")
        hasher.update(piece[:num_bytes])
        position += num_bytes
    return hasher.hexdigest()


def _open_temporary(directory: Path) -> tuple[Path, int]:
    path = directory / f".{secrets.token_hex(8)}.tmp"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return path, fd


def is_abandoned(path: Path) -> bool:
    """Whether nobody writes this unfinished file any more; false where it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_leftovers(directory: Path) -> None:
    for path in directory.glob(".*.tmp"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where a live process still writes it
            path.unlink()
