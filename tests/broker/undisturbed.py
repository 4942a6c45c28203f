"""What a run gives that nothing happens to, and what must hold of one that something did happen to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coordinator.models import ModelStore
from coordinator.upkeep.findings import Finding
from coordinator.upkeep.verify import verify
from midge.tasks.base import State, Task
from tests.broker import tasks
from tests.broker.federation import Federation, federated

BATCHES = {"batch_size": 4, "learning_rate": 0.05}


def undisturbed(
    directory: Path, num_agents: int, rounds: int, task: Task = tasks.linear, **training: Any
) -> tuple[list[State], list[str]]:
    """The models of a run that nothing happens to, and their digests, by plain NumPy."""
    parts = {f"agent-{part}": part for part in range(num_agents)}
    models = federated(task, parts, rounds, **{**BATCHES, **training})
    store = ModelStore(directory)
    return models, [store.save_state(model) for model in models]


def digests(federation: Federation) -> list[str]:
    """Of the versions of its latest run."""
    return [version["digest"] for version in federation.versions()]


def accepted(federation: Federation, rounds: int) -> dict[tuple[int, str], str]:
    """The digest of every accepted update, by round and agent."""
    return {
        (round_num, agent_id): update.update_digest
        for round_num in range(1, rounds + 1)
        for agent_id, update in federation.updates(round_num).items()
    }


def findings(federation: Federation, *, only_damage: bool = False) -> list[Finding]:
    """What `coordinator verify` says of the coordinator's state directory."""
    found = verify(federation.state_dir()).findings
    return [finding for finding in found if finding.severity == "damage"] if only_damage else found
