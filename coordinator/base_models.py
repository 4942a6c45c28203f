"""Base models: named initial models that an operator registers, and that runs begin from (`base_model = "NAME"`).

A base model is a file in the model store, like any version, and a row in the database that gives it a name and keeps it from
being pruned. What a run remembers is its digest: the name may later mean another model, the run stays the same.
"""

from __future__ import annotations

import queue
from pathlib import Path

import msgspec

from coordinator import evaluator_messages as msg
from coordinator.models import ModelStore
from coordinator.store import Store
from midge.tasks.process import Child
from midge.wire.identifiers import check_identifier

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(msg.Reply).decode
_MAX_TRIES = 3


class BaseModelError(Exception):
    """It cannot be registered, removed or begun from; the message says why and what to do."""


def push(store: Store, models: ModelStore, name: str, *, task: str, seed: int, file: Path | None) -> str:
    """Register a task's initial model, or with `file` the model of that safetensors file; works beside a coordinator.

    Returns:
        Its digest.

    Raises:
        BaseModelError: the task cannot make it, the file does not fit the task, or the name has another model.
        TopicError: `name` is no identifier.
    """
    check_identifier("base model", name)
    known = store.base_model(name)
    for _ in range(_MAX_TRIES):
        digest = _make(task, models.path, seed, file)
        if known is not None and known["digest"] != digest:
            _delete_unused(store, models, digest)
            raise BaseModelError(
                f"{name} is another model already, {known['digest'][:12]}: choose another name, or free it with "
                f"`coordinator models remove {name}`"
            )
        with models.open(digest) as model:
            num_elements = model.layout.num_elements
        store.add_base_model(name, digest=digest, task=task, source=_source(seed, file), num_elements=num_elements)
        if digest in models.digests():  # else it was pruned, as a version of a run, before it had a name
            return digest
    raise BaseModelError(f"{models.path}: the model was deleted again and again; try later")


def remove(store: Store, models: ModelStore, name: str) -> bool:
    """Give a name up, and the model if nothing else uses it; true where the file went too.

    Raises:
        BaseModelError: there is no such name, or a run that is not over begins from it.
    """
    row = store.base_model(name)
    if row is None:
        raise BaseModelError(f"there is no base model {name}; {_listed(store)}")
    for run in store.runs():
        definition = msgspec.json.decode(run["definition"])
        if run["state"] not in ("done", "failed") and definition.get("base_model") == row["digest"]:
            raise BaseModelError(f"run {run['run_id']} begins from {name} and is not over ({run['state']})")
    store.remove_base_model(name)
    return _delete_unused(store, models, row["digest"])


def digest_of(store: Store, name: str) -> str:
    """The digest of the model of this name; empty for an empty name.

    Raises:
        BaseModelError: there is none of this name.
    """
    if not name:
        return ""
    row = store.base_model(name)
    if row is None:
        raise BaseModelError(
            f"base_model is {name!r}, and no model of that name is registered: `coordinator models push {name}` does it; "
            f"{_listed(store)}"
        )
    return str(row["digest"])


def _delete_unused(store: Store, models: ModelStore, digest: str) -> bool:
    if store.uses(digest):
        return False
    models.delete(digest)
    return True


def _listed(store: Store) -> str:
    names = [row["name"] for row in store.base_models()]
    return f"there are {', '.join(names[:10])}" if names else "none is registered yet"


def _source(seed: int, file: Path | None) -> str:
    return f"seed {seed}" if file is None else file.name


def _make(task: str, models_dir: Path, seed: int, file: Path | None) -> str:
    """Have a process of its own make the model: the task is a user's code, and may need torch."""
    replies: queue.SimpleQueue[msg.Reply | str] = queue.SimpleQueue()
    try:
        child = Child("coordinator.evaluation_worker", [], lambda reply: replies.put(_decode(reply)), replies.put, {})
    except OSError as error:
        raise BaseModelError(f"no process can be started for the task: {error}") from None
    try:
        child.send(_encode(msg.SetUp(task=task, models_dir=str(models_dir))))
        path = "" if file is None else str(file.absolute())
        child.send(_encode(msg.MakeModel(request=1, seed=seed, file=path)))
        match replies.get():
            case msg.Made(digest=digest):
                return digest
            case msg.Failed(reason=reason):
                raise BaseModelError(reason)
            case other:
                raise BaseModelError(f"the task's process gave no model: {other}")
    finally:
        child.stop()
