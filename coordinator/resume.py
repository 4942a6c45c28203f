"""Restart is replay: what the state directory says of a run, as its machine wants it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from coordinator import run_events as ev
from coordinator.models import ModelStore
from coordinator.round import RoundState
from coordinator.run import Resumed, Version
from coordinator.store import Store
from midge.wire.frames import Framing, plan_framing

_MAX_UNEVALUATED = 2
_TOLD = ("num_updates", "num_examples", "delta_norm", "duration_s", "attempts")


def unfinished(rows: Iterable[Mapping[str, Any]], federation: str, *, but: str | None) -> list[Mapping[str, Any]]:
    """The runs of a federation that could go on, in the order of `rows`, without the run `but`."""
    return [
        row
        for row in rows
        if row["federation"] == federation and row["state"] not in ("done", "failed") and row["run_id"] != but
    ]


def resume(store: Store, models: ModelStore, run_id: str) -> Resumed | None:
    """Where the run stands; None where it has no model yet.

    Raises:
        ModelError: the last version's file, or that of its server state, is missing or damaged.
    """
    row = store.run(run_id)
    versions = store.versions(run_id)
    if row is None or not versions:
        return None
    last = versions[-1]
    models.verify(last["digest"])
    if last["server_state"] is not None:
        models.verify(last["server_state"])
    with models.open(last["digest"]) as model:
        layout = model.layout
    framing = plan_framing(layout.num_elements)
    if row["frame_elements"]:
        framing = Framing(layout.num_elements, row["frame_elements"])
    number, state, members = store.last_attempt(run_id, last["round_num"] + 1) or (0, RoundState.ABANDONED, {})
    unevaluated = [Version(v["round_num"], v["digest"]) for v in versions[-_MAX_UNEVALUATED:] if v["central"] is None]
    best = None if row["best_round"] is None else (row["best_round"], row["best_value"])
    return Resumed(
        version=Version(last["round_num"], last["digest"], last["server_state"]),
        layout=layout,
        framing=framing,
        attempt=number,
        round_state=state,
        members=members,
        accepted=store.updates(run_id, last["round_num"] + 1),
        unevaluated=unevaluated,
        best=best,
        tallies=store.tallies(run_id),
        score=last["central"],
        strikes=store.strikes(run_id),
    )


def lately_stored(store: Store, run_id: str) -> list[ev.Save]:
    """What the last write may have stored that others are told of, in order: the last version, scores, updates around it."""
    versions = store.versions(run_id)
    saves: list[ev.Save] = [
        ev.SaveVersion(row["round_num"], row["digest"], row["parent"], **{key: row[key] for key in _TOLD})
        for row in versions[-1:]
    ]
    for row in versions[-_MAX_UNEVALUATED:]:
        scored = [source for source in ("central", "federated") if row[source] is not None]
        saves += [ev.SaveEvaluation(row["round_num"], source, row[source]) for source in scored]
    for round_num in (len(versions) - 1, len(versions)):
        saves += [ev.SaveUpdate(round_num, update) for update in store.updates(run_id, round_num)]
    return saves
