"""`coordinator runs forget`: removes a run, and all that is its alone.

The rows go first, in one transaction, then the files: a kill in between leaves files that nothing names, which `coordinator
verify --repair` removes. What a run shares with another one, or with a base model, stays.

No coordinator may be running in the directory. The run could be its own; and one that repeats a run, which gives the same bits,
writes a model that has the same digest as one to be deleted before it records that it needs it.
"""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from pathlib import Path

import msgspec

from coordinator.agent_models import DIRECTORY as AGENT_MODELS
from coordinator.files import sync_dir
from coordinator.models import ModelStore
from coordinator.state_dir import MODELS, SPOOL, lock
from coordinator.store import DATABASE, Store, StoreError
from coordinator.upkeep.verify_runs import digests_of


class UnknownRunError(Exception):
    """There is no such run; the message says where to look."""


class Forgotten(msgspec.Struct, frozen=True, kw_only=True):
    """What was removed.

    Attributes:
        run_id: the run.
        versions: how many it had.
        models: files of models, and of what its strategy remembered.
        shared: versions whose files stay, since another run or a base model needs them.
        size_bytes: of all files that were removed.
    """

    run_id: str
    versions: int
    models: int
    shared: int
    size_bytes: int


def forget(state_dir: Path, run_id: str) -> Forgotten:
    """Remove a run: its rows, the models that it alone names, its part of the spool, its agents' models.

    Raises:
        UnknownRunError: there is none of this id.
        InUseError: a coordinator is running in the directory.
        StoreError: there is no database, or it cannot be written.
        OSError: a file cannot be removed; the run is forgotten all the same.
    """
    if not (state_dir / DATABASE).exists():
        raise StoreError(f"{state_dir} holds no {DATABASE}: no coordinator has run there; check --state-dir")
    fd = lock(state_dir)
    try:
        with closing(Store(state_dir)) as store:
            return _forget(store, state_dir, run_id)
    finally:
        os.close(fd)


def _forget(store: Store, state_dir: Path, run_id: str) -> Forgotten:
    if store.run(run_id) is None:
        raise UnknownRunError(f"{state_dir} has no run {run_id}; `coordinator runs` lists them")
    versions = store.versions(run_id)
    digests = {digest for version in versions for digest in digests_of(version)}
    store.forget_run(run_id)
    models = ModelStore(state_dir / MODELS)
    kept = {digest for digest in digests if store.uses(digest)}
    doomed = (digests - kept) & models.digests()
    size_bytes = sum((models.path / f"{digest}.safetensors").stat().st_size for digest in doomed)
    for digest in doomed:
        models.delete(digest)
    sync_dir(models.path)
    for name in (SPOOL, AGENT_MODELS):
        size_bytes += _remove(state_dir / name / run_id)
    return Forgotten(
        run_id=run_id,
        versions=len(versions),
        models=len(doomed),
        shared=sum(version["digest"] in kept for version in versions),
        size_bytes=size_bytes,
    )


def _remove(directory: Path) -> int:
    """Remove a directory, if it is there; the bytes that its files had."""
    if not directory.is_dir():
        return 0
    size_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    shutil.rmtree(directory)
    sync_dir(directory.parent)
    return size_bytes
