"""What a database must say of its runs: the invariants that can be read off its rows. Pure; `verify` reads and reports.

I1  versions grow by one from 0, each with one digest and one parent, each but the first made by one committed attempt
I2  an agent counts at most once in a round: the database's keys see to that; who counts is who reported
I5  a version was made of at least quorum updates
I9  accepted + rejected + late + duplicate = received, once the run is over; before, some may be on their way
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from coordinator.round import MemberState, RoundState
from coordinator.run_events import AcceptedUpdate
from coordinator.store import KEPT_ROUNDS, Store

DIGEST = re.compile(r"[0-9a-f]{64}")
OVER = ("done", "failed")
LEAST_KEPT = 3
"""Versions before the last whose files are kept, whatever the settings: see retention.py."""
_ENDED = (RoundState.COMMITTED, RoundState.ABANDONED)


class Broken(NamedTuple):
    """An invariant that does not hold: where, and what was seen and expected."""

    where: str
    what: str


@dataclass(frozen=True)
class RunRows:
    """All that a database says of one run.

    Attributes:
        row: of the run.
        versions: in order.
        attempts: in order of round and number.
        updates: that are remembered, by round.
        tallies: by outcome and reason.
    """

    row: Mapping[str, Any]
    versions: Sequence[Mapping[str, Any]]
    attempts: Sequence[Mapping[str, Any]]
    updates: Mapping[int, Sequence[AcceptedUpdate]]
    tallies: Mapping[tuple[str, str], int]

    @property
    def run_id(self) -> str:
        """Of the run."""
        return str(self.row["run_id"])

    @property
    def is_over(self) -> bool:
        """Whether it will never go on."""
        return self.row["state"] in OVER

    @property
    def last_round(self) -> int:
        """Of its last version; -1 where it has none."""
        return int(self.versions[-1]["round_num"]) if self.versions else -1

    @property
    def quorum(self) -> int:
        """The least updates of a version."""
        return int(self._definition.get("quorum", 1))

    @property
    def base_model(self) -> str:
        """Digest of the model that it begins from; empty where that is the task's own."""
        return str(self._definition.get("base_model", ""))

    @property
    def _definition(self) -> dict[str, Any]:
        return msgspec.json.decode(self.row["definition"], type=dict[str, Any])

    @property
    def current_updates(self) -> Sequence[AcceptedUpdate]:
        """Those of the round after its last version, which count there."""
        return () if self.is_over else self.updates.get(self.last_round + 1, ())


@dataclass(frozen=True)
class Rows:
    """What a database says of what lies beside it.

    Attributes:
        runs: the latest first.
        base_models: digest of each by its name.
    """

    runs: Sequence[RunRows]
    base_models: Mapping[str, str]

    def needed(self) -> dict[str, str]:
        """The files that cannot be done without, each with who needs it.

        Base models, whether a run uses them or not; of each run its last versions, the best one, what else the last one names
        (what the strategy remembers), and, before the first version, the model that the run begins from.
        """
        found = {digest: f"base model {name}" for name, digest in self.base_models.items()}
        for run in self.runs:
            found |= dict.fromkeys(_needed(run), run.run_id)
        return found

    def named(self) -> set[str]:
        """All files that are named anywhere, needed or not."""
        versions = (version for run in self.runs for version in run.versions)
        return {digest for version in versions for digest in digests_of(version)} | self.needed().keys()


def _needed(run: RunRows) -> Iterator[str]:
    if not run.versions:
        if run.base_model and not run.is_over:
            yield run.base_model
        return
    best = run.row["best_round"]
    for version in run.versions:
        if version["round_num"] > run.last_round - LEAST_KEPT or version["round_num"] == best:
            yield version["digest"]
    yield from digests_of(run.versions[-1])


def rows_of(store: Store) -> Rows:
    """All that the database says. Within `Store.snapshot` it is of one moment."""
    found = []
    for row in store.runs():
        run_id = row["run_id"]
        updates: dict[int, list[AcceptedUpdate]] = defaultdict(list)
        for round_num, update in store.kept_updates(run_id):
            updates[round_num].append(update)
        found.append(RunRows(row, store.versions(run_id), store.attempts(run_id), dict(updates), store.tallies(run_id)))
    return Rows(found, {row["name"]: row["digest"] for row in store.base_models()})


def digests_of(version: Mapping[str, Any]) -> set[str]:
    """The files that a version names as its own: its model, and whatever else of it is stored by digest."""
    own = (value for column, value in version.items() if column != "parent")
    return {value for value in own if isinstance(value, str) and DIGEST.fullmatch(value)}


def broken(run: RunRows) -> Iterator[Broken]:
    """Every invariant that does not hold for this run."""
    yield from _versions(run)
    yield from _attempts(run)
    yield from _counts(run)
    yield from _tallies(run)
    yield from _row(run)


def _versions(run: RunRows) -> Iterator[Broken]:
    parent: str | None = None
    for number, version in enumerate(run.versions):
        where = f"{run.run_id}, version {version['round_num']}"
        if version["round_num"] != number:
            yield Broken(where, f"I1: follows version {number - 1}: expected {number}, versions grow by one")
            return
        if DIGEST.fullmatch(version["digest"]) is None:
            yield Broken(where, f"I1: digest {version['digest']!r}: expected 64 hexadecimal digits")
        if version["parent"] != parent:
            yield Broken(where, f"I1: parent {_short(version['parent'])}: expected {_short(parent)}")
        parent = version["digest"]


def _attempts(run: RunRows) -> Iterator[Broken]:
    by_round: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for attempt in run.attempts:
        by_round[attempt["round_num"]].append(attempt)
    for round_num, attempts in by_round.items():
        where = f"{run.run_id}, round {round_num}"
        numbers = [attempt["attempt"] for attempt in attempts]
        if numbers != list(range(1, len(numbers) + 1)):
            yield Broken(where, f"attempts {numbers}: expected them to count from 1")
        states = [str(attempt["state"]) for attempt in attempts]
        if any(state not in _ENDED for state in states[:-1]):
            yield Broken(where, f"attempts {', '.join(states)}: an earlier one has not ended")
        num_committed = states.count(RoundState.COMMITTED)
        expected = 1 if 1 <= round_num <= run.last_round else 0
        if num_committed != expected:
            yield Broken(where, f"I1: {num_committed} committed attempts, version {run.last_round} is the last")
        if round_num > run.last_round + 1:
            yield Broken(where, f"I1: begun on version {run.last_round}: expected round {run.last_round + 1} at most")


def _counts(run: RunRows) -> Iterator[Broken]:
    """That each version was made of what counted for it, as far as that is remembered."""
    committed = {row["round_num"]: row for row in run.attempts if row["state"] == RoundState.COMMITTED}
    for version in run.versions[1:]:
        round_num, where = version["round_num"], f"{run.run_id}, version {version['round_num']}"
        if version["num_updates"] < run.quorum:
            yield Broken(where, f"I5: made of {version['num_updates']} updates, quorum is {run.quorum}")
        attempt = committed.get(round_num)
        if attempt is None:
            yield Broken(where, "I1: no attempt is stored that committed it")
            continue
        if attempt["attempt"] != version["attempts"]:
            yield Broken(where, f"attempt {attempt['attempt']} committed it: expected {version['attempts']}")
        if round_num <= run.last_round - KEPT_ROUNDS and not attempt["members"]:
            continue
        reported = {agent for agent, state in attempt["members"].items() if state is MemberState.REPORTED}
        if len(reported) != version["num_updates"]:
            yield Broken(where, f"I2: {len(reported)} agents reported, made of {version['num_updates']} updates")
        if round_num <= run.last_round - KEPT_ROUNDS:
            continue
        counted = [update for update in run.updates.get(round_num, ()) if update.agent_id in reported]
        num_examples = sum(update.num_examples for update in counted)
        if len(counted) != len(reported):
            missing = sorted(reported - {update.agent_id for update in counted})
            yield Broken(where, f"I2: no accepted update is stored of {', '.join(missing)}, which reported")
        elif num_examples != version["num_examples"]:
            yield Broken(where, f"its updates had {num_examples} examples, it says {version['num_examples']}")


def _tallies(run: RunRows) -> Iterator[Broken]:
    received = run.tallies.get(("received", ""), 0)
    settled = sum(run.tallies.values()) - received
    if settled > received or (run.is_over and settled != received):
        yield Broken(f"{run.run_id}, tallies", f"I9: {received} updates received, {settled} met their fate")
    accepted = run.tallies.get(("accepted", ""), 0)
    stored = sum(map(len, run.updates.values()))
    if stored > accepted or (run.last_round < KEPT_ROUNDS and stored != accepted):
        yield Broken(f"{run.run_id}, tallies", f"I9: {accepted} updates were accepted, {stored} are stored")


def _row(run: RunRows) -> Iterator[Broken]:
    row, last = run.row, run.last_round
    if row["round_num"] != max(last, 0):
        yield Broken(run.run_id, f"stands at round {row['round_num']}, its last version is {last}")
    if row["best_round"] is not None and not 0 <= row["best_round"] <= last:
        yield Broken(run.run_id, f"its best version is {row['best_round']}, its last is {last}")
    if row["state"] == "done" and last != row["rounds"]:
        yield Broken(run.run_id, f"is done with version {last}: expected {row['rounds']}")


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:12]}..."
