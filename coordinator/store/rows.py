"""Between what a run decides and rows of the tables, there and back. It knows nothing of the database library."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from coordinator import run_events as ev
from midge.wire.messages import Evaluation


class AgentRow(msgspec.Struct, frozen=True):
    """An agent as it is remembered."""

    agent_id: str
    state: str
    task: str
    labels: dict[str, str]
    version: str


class AgentLeft(msgspec.Struct, frozen=True):
    """An agent of which nothing is known but that it is not here: one that left while no coordinator ran."""

    agent_id: str


def rows_of_save(run_id: str, save: ev.Save) -> tuple[Any, ...]:
    """The name of the statement that saves this, and the rows to execute it with."""
    match save:
        case ev.SaveRun():
            values = msgspec.to_builtins(save)
            return "run", {
                "run": run_id,
                "new_updated_at": utc_now(),
                **{f"new_{key}": value for key, value in values.items()},
            }
        case ev.SaveAttempt():
            row = {"run_id": run_id, "round_num": save.round_num, "attempt": save.attempt}
            members = to_json(dict(save.members))
            return "attempt", {**row, "state": save.state, "reason": save.reason, "members": members}
        case ev.SaveUpdate(round_num, update):
            row = {"run_id": run_id, "round_num": round_num, "agent_id": update.agent_id}
            return "update", {**row, **_update_values(update)}
        case ev.SaveVersion():
            return "version", {"run_id": run_id, "created_at": utc_now(), **msgspec.to_builtins(save)}
        case ev.SaveEvaluation(round_num, source, score):
            return source, {"run": run_id, "number": round_num, "score": to_json(score)}
        case ev.SaveStrike(strike):
            return "strike", {"run_id": run_id, **msgspec.structs.asdict(strike)}
        case ev.SaveTallies(tallies):
            return "tallies", *(
                {"run_id": run_id, "outcome": outcome, "reason": reason, "count": count}
                for (outcome, reason), count in tallies.items()
            )


def key_of(save: ev.Save) -> object:
    """Of two saves with the same key in one transaction, the later one is enough."""
    match save:
        case ev.SaveRun() | ev.SaveTallies():
            return type(save)
        case ev.SaveAttempt():
            return type(save), save.round_num, save.attempt
        case ev.SaveUpdate(round_num, update):
            return type(save), round_num, update.agent_id
        case ev.SaveEvaluation(round_num, source, _):
            return type(save), round_num, source
        case ev.SaveStrike(strike):
            return type(save), strike.round_num, strike.attempt, strike.agent_id
        case ev.SaveVersion():
            return id(save)


def _update_values(update: ev.AcceptedUpdate) -> dict[str, Any]:
    return {
        "attempt": update.attempt,
        "update_digest": update.update_digest,
        "num_examples": update.num_examples,
        "counters": to_json(update.counters),
        "norm": update.norm,
        "training_s": update.training_s,
        "metrics": to_json(dict(update.metrics)),
        "evaluation": None if update.evaluation is None else to_json(update.evaluation),
    }


def update_from(row: Mapping[str, Any]) -> ev.AcceptedUpdate:
    """The update that a row of `updates` remembers."""
    evaluation = row["evaluation"]
    return ev.AcceptedUpdate(
        agent_id=row["agent_id"],
        attempt=row["attempt"],
        update_digest=row["update_digest"],
        num_examples=row["num_examples"],
        counters=tuple(msgspec.json.decode(row["counters"])),
        norm=row["norm"],
        training_s=row["training_s"],
        metrics=msgspec.json.decode(row["metrics"]),
        evaluation=None if evaluation is None else msgspec.json.decode(evaluation, type=Evaluation),
    )


def row_of_agent(agent: AgentRow | AgentLeft) -> tuple[str, dict[str, Any]]:
    """The name of the statement that saves this, and the row to execute it with."""
    if isinstance(agent, AgentLeft):
        return "agent_left", {"left": agent.agent_id, "at": utc_now()}
    return "agent", {**msgspec.structs.asdict(agent), "labels": to_json(agent.labels), "changed_at": utc_now()}


def to_json(value: object) -> str:
    """As it stands in a column."""
    return msgspec.json.encode(value).decode()


def utc_now() -> str:
    """The time, to the millisecond, as it stands in a column."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
