"""`coordinator backup`: a consistent copy of a state directory, made while a coordinator works in it and without its help.

Nothing is locked and nothing waits, since each part can be copied at its own pace once it is held:

1. **The database first**, as it is at one moment, the moment of the backup: SQLite shows it to a reader for as long as that
   wants, and holds up no writer.
2. **Then what it names is opened**: the models that its runs cannot do without, base models, and the segments of the runs'
   current rounds. All were there and durable before the database said so: a model is written before its version is saved,
   frames are synced before their update is. A model never changes and a segment only grows, so what is there now is what was
   there then, and perhaps more. They may be deleted meanwhile, by a round that commits: then the copy begins again. An open
   file outlives its name, so this can only happen in the moment between the two steps.
3. **Then all is copied**: the database as it was at that moment, by SQLite's online backup; models, once they are compared with
   their digests; of a segment everything up to the end of its log; agents' models, where they are kept, as they are.

So whatever the copy's database says is accepted or committed is in the copy. It appears under its name whole or not at all.
It is marked as a copy, and a coordinator that starts in it raises its epoch far (`Store.raise_epoch`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from coordinator.agent_models import AgentModels
from coordinator.files import sync_dir
from coordinator.models import ModelError, verify_file
from coordinator.state_dir import MODELS, SPOOL
from coordinator.store import DATABASE, Store
from coordinator.upkeep.spool_scan import log_end
from coordinator.upkeep.verify_runs import Rows, rows_of

TAR_ENDINGS = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz"}
_TRIES = 20
_PAUSE_S = 0.05
_CHUNK_BYTES = 1 << 20


class BackupError(Exception):
    """There is no backup; the message says why and what to do."""


class WrongTargetError(BackupError):
    """Something is there already, or nothing can be put there."""


class Made(msgspec.Struct):
    """What a backup holds.

    Attributes:
        path: where it is.
        runs: in it.
        versions: of all runs.
        models: files, base models and what strategies remember among them.
        agent_models: that were kept.
        updates: accepted ones of rounds under way.
        size_bytes: of all files.
        standing: run and last version, of each run that is not over.
    """

    path: str
    runs: int = 0
    versions: int = 0
    models: int = 0
    agent_models: int = 0
    updates: int = 0
    size_bytes: int = 0
    standing: dict[str, int] = {}


class Target(Protocol):
    """Where the copy goes."""

    def add(self, name: str, fd: int, size_bytes: int) -> None:
        """Put the first `size_bytes` of an open file there, under this name."""

    def close(self) -> None:
        """All is there: make it durable."""


def backup(state_dir: Path, to: Path) -> Made:
    """Copy a state directory to `to`: a directory, or an archive where the name ends in .tar, .tar.gz or .tgz.

    Raises:
        WrongTargetError: there is something already.
        BackupError: what is to be copied is damaged, or changes faster than it can be opened.
        StoreError: there is no database, or it is damaged.
        OSError: the copy cannot be written, or the original not be read.
    """
    _check_target(to)
    staging = to.with_name(f".{to.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # of a backup that was killed
    staging.mkdir(mode=0o700)
    try:
        with ExitStack() as stack:
            held = _hold(state_dir, staging, stack)
            made = held.summary(to)
            mode = next((mode for ending, mode in TAR_ENDINGS.items() if to.name.endswith(ending)), None)
            target: Target = _Directory(staging) if mode is None else _Archive(staging / "archive", mode)
            _copy(held, state_dir, staging, target, made)
        if mode is None:
            if to.exists():
                to.rmdir()  # it is empty
            staging.rename(to)
        else:
            (staging / "archive").rename(to)
        sync_dir(to.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return made


@dataclass
class _Held:
    """What a backup is made of, open: nothing can take it away any more."""

    rows: Rows
    models: dict[str, int] = field(default_factory=dict)
    agent_models: dict[str, int] = field(default_factory=dict)
    segments: dict[str, int] = field(default_factory=dict)

    def summary(self, to: Path) -> Made:
        runs = self.rows.runs
        return Made(
            str(to),
            len(runs),
            sum(len(run.versions) for run in runs),
            agent_models=len(self.agent_models),
            updates=sum(len(run.current_updates) for run in runs),
            standing={run.run_id: run.last_round for run in runs if not run.is_over},
        )

    def earlier_models(self) -> set[str]:
        """Of versions that no run needs any more: in the copy too, where they are still there."""
        return self.rows.named() - self.models.keys()


def _check_target(to: Path) -> None:
    if to.is_dir() and not any(to.iterdir()):
        return
    if to.exists() or to.is_symlink():
        raise WrongTargetError(f"{to} is there already: name a new directory or archive")
    if not to.parent.is_dir():
        raise WrongTargetError(f"{to.parent} is not there: make it first")


def _hold(state_dir: Path, staging: Path, stack: ExitStack) -> _Held:
    """Read the database, open what it names, and copy it as it was read; again where something went in between."""
    missing = ""
    with contextlib.closing(Store(state_dir, read_only=True)) as store:
        for _ in range(_TRIES):
            with store.snapshot(), ExitStack() as files:
                try:
                    held = _open_all(state_dir, rows_of(store), files)
                except FileNotFoundError as error:
                    missing = error.filename
                else:
                    store.copy_to(staging / DATABASE)
                    stack.push(files.pop_all())
                    return held
            time.sleep(_PAUSE_S)
    raise BackupError(
        f"{missing} is not there, though the database names it: see what `coordinator verify {state_dir}` says"
    )


def _open_all(state_dir: Path, rows: Rows, files: ExitStack) -> _Held:
    held = _Held(rows)
    agent_models = AgentModels(state_dir)
    for digest in rows.needed():
        held.models[digest] = _open(state_dir / MODELS / f"{digest}.safetensors", files)
    for run in rows.runs:
        for _, path in agent_models.agents(run.run_id).values():
            held.agent_models[str(path.relative_to(state_dir))] = _open(path, files)
        name = f"{run.run_id}/{run.last_round + 1}.spool"
        if run.current_updates:
            held.segments[name] = _open(state_dir / SPOOL / name, files)
        elif not run.is_over:
            with contextlib.suppress(FileNotFoundError):
                held.segments[name] = _open(state_dir / SPOOL / name, files)
    return held


def _open(path: Path, files: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    files.callback(os.close, fd)
    return fd


def _copy(held: _Held, state_dir: Path, staging: Path, target: Target, made: Made) -> None:
    def add(name: str, fd: int, size_bytes: int) -> None:
        target.add(name, fd, size_bytes)
        made.size_bytes += size_bytes

    with ExitStack() as files:
        database = _open(staging / DATABASE, files)
        add(DATABASE, database, os.fstat(database).st_size)
    for digest, fd in held.models.items():
        _add_model(digest, fd, add)
    for digest in sorted(held.earlier_models()):
        with contextlib.suppress(FileNotFoundError), ExitStack() as files:
            fd = _open(state_dir / MODELS / f"{digest}.safetensors", files)
            _add_model(digest, fd, add)
            made.models += 1
    made.models += len(held.models)
    for name, fd in held.agent_models.items():
        add(name, fd, os.fstat(fd).st_size)
    for name, fd in held.segments.items():
        add(f"{SPOOL}/{name}", fd, log_end(fd))
    target.close()


def _add_model(digest: str, fd: int, add: Callable[[str, int, int], None]) -> None:
    try:
        verify_file(Path(f"/proc/self/fd/{fd}"), digest)
    except ModelError as error:
        raise BackupError(f"model {digest} is damaged ({error}): nothing is copied; restore it first") from None
    add(f"{MODELS}/{digest}.safetensors", fd, os.fstat(fd).st_size)


class _Directory:
    """A copy as a directory. The database is in it already."""

    def __init__(self, path: Path) -> None:
        self._path = path
        for name in (MODELS, SPOOL):
            (path / name).mkdir()

    def add(self, name: str, fd: int, size_bytes: int) -> None:
        """See `Target`."""
        path = self._path / name
        if name == DATABASE:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("xb") as file:
            for piece in _pieces(fd, size_bytes):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """See `Target`."""
        for path in (self._path, *(path for path in self._path.rglob("*") if path.is_dir())):
            sync_dir(path)


class _Archive:
    """A copy as an archive, whose names begin where a state directory does: `tar -xf backup.tar -C STATE_DIR` restores it."""

    def __init__(self, path: Path, mode: str) -> None:
        self._file = path.open("xb")
        self._tar = tarfile.open(fileobj=self._file, mode=mode)  # type: ignore[call-overload]  # noqa: SIM115  one of ours

    def add(self, name: str, fd: int, size_bytes: int) -> None:
        """See `Target`."""
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.mode = size_bytes, int(time.time()), 0o600
        self._tar.addfile(member, _Reader(fd, size_bytes))

    def close(self) -> None:
        """See `Target`."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class _Reader:
    """The first `size_bytes` of an open file, to read once, with no position shared with others."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._pieces = _pieces(fd, size_bytes)
        self._rest = b""

    def read(self, size: int) -> bytes:
        """The next bytes: `size` of them, but at the end."""
        while len(self._rest) < size and (piece := next(self._pieces, b"")):
            self._rest += piece
        wanted, self._rest = self._rest[:size], self._rest[size:]
        return wanted


def _pieces(fd: int, size_bytes: int) -> Iterator[bytes]:
    done = 0
    while done < size_bytes:
        piece = os.pread(fd, min(_CHUNK_BYTES, size_bytes - done), done)
        if not piece:
            raise BackupError("a file became shorter while it was copied: see what `coordinator verify` says")
        done += len(piece)
        yield piece
