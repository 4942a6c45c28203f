"""Which model an operator means, by words: the best or the latest version of a run, one by its round, or an agent's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.agent_models import AgentModels
from coordinator.models import ModelFile, ModelStore
from coordinator.store import Store


class ExportError(Exception):
    """There is no such model; the message says what there is."""


@dataclass(frozen=True)
class Chosen:
    """A model that was asked for, open; whoever has it closes it.

    Attributes:
        run_id: the run.
        what: the model, for a person.
        name: for a file.
        model: the model.
    """

    run_id: str
    what: str
    name: str
    model: ModelFile


def find_run(store: Store, run_id: str, *, with_model: bool = False) -> dict[str, Any]:
    """The run of this id, or the latest where that is "latest".

    Args:
        store: the database.
        run_id: or "latest".
        with_model: the latest run that got as far as a model is meant, where there is one.

    Raises:
        ExportError: there is none.
    """
    rows = store.runs() if run_id == "latest" else []
    chosen = next((row for row in rows if store.versions(row["run_id"])), None) if with_model else None
    row = chosen or (rows[0] if rows else store.run(run_id))
    if row is None:
        raise ExportError(f"{store.path.parent} has no run {run_id}; `coordinator runs` lists them")
    return row


def choose_version(store: Store, run_id: str, which: str) -> Chosen:
    """A version of a run.

    Raises:
        ExportError: there is no such run or version.
        ModelError: its file is pruned or damaged.
    """
    row = find_run(store, run_id, with_model=True)
    versions = {version["round_num"]: version["digest"] for version in store.versions(row["run_id"])}
    if not versions:
        why = f": {row['reason']}" if row["reason"] else ""
        raise ExportError(f"run {row['run_id']} has no model; it is {row['state']}{why}")
    latest = max(versions)
    best = row["best_round"] if row["best_round"] is not None else latest
    number = {"latest": latest, "best": best}.get(which, int(which) if which.isdecimal() else None)
    if number is None or number not in versions:
        raise ExportError(f"--which {which[:80]}: expected best, latest, or a round from 0 to {latest}")
    model = ModelStore(store.path.parent / "models").open(versions[number])
    return Chosen(row["run_id"], f"round {number} of {row['run_id']}", f"{row['run_id']}-{number}", model)


def choose_agent(store: Store, run_id: str, agent_id: str) -> Chosen:
    """What an agent's last accepted update of a run was.

    Raises:
        ExportError: there is no such run, or the agent's model is not kept.
        ModelError: its file is damaged.
    """
    row = find_run(store, run_id, with_model=True)
    kept = AgentModels(Path(store.path.parent))
    found = kept.open(row["run_id"], agent_id)
    if found is None:
        agents = sorted(kept.agents(row["run_id"]))
        there = (
            f"there are those of {', '.join(agents[:10])}" if agents else "none is (keep_agent_models = true does it)"
        )
        raise ExportError(f"no model of agent {agent_id[:80]} is kept of run {row['run_id']}; {there}")
    number, model = found
    what = f"the model of {agent_id} in round {number} of {row['run_id']}"
    return Chosen(row["run_id"], what, f"{row['run_id']}-{agent_id}-{number}", model)
