"""What the coordinator has remembered, and what it asks for."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from coordinator import run_events as ev
from coordinator.quarantine import Strike
from coordinator.round import MemberState, RoundState
from coordinator.store import tables
from coordinator.store.database import COPIED, Database
from coordinator.store.rows import (
    AgentLeft,
    AgentRow,
    key_of,
    row_of_agent,
    rows_of_save,
    to_json,
    update_from,
    utc_now,
)
from midge.failpoints import fail_point
from midge.wire.messages import Evaluation

KEPT_ROUNDS = 100
"""Accepted updates, and who was in an attempt, are remembered for this many rounds; versions and attempts for ever."""

KEPT_AGENTS = 100_000
"""Agents that are gone are remembered up to this many, the last that left."""
_FORGET_EVERY = 10_000
"""Rows of agents that are written between two looks at whether there are too many."""
KEPT_STRIKES = 2_000
"""Strikes are remembered for this many rounds: the longest window and the longest quarantine."""
_COPY_JUMP = 10_000
"""How many starts of the original a copy may be old. A coordinator's first epoch in it lies this far above, or up to twice."""
_PUBLISHED = "published:"
"""Before the id of a run that was forgotten, and is retained at the broker still."""


class Store(Database):
    """The database of one state directory. See `Database` for its arguments, and what it raises."""

    _num_agent_rows = 0

    # Writing. What cannot be written raises `StoreWriteError`, and changes nothing.

    def raise_epoch(self, above: int = 0) -> int:
        """Raise the epoch to one more than it was, and more than `above`, durably; returns it.

        In a copy, which may be started after the original went on, it is raised far, and by chance: above every epoch that the
        original, or another copy, may have had since, so that no message of theirs is ever taken for one of this coordinator.
        """
        with self._transaction() as connection:
            row = connection.execute(sa.select(tables.meta.c.value).where(tables.meta.c.key == "epoch")).scalar()
            epoch = max(int(row or 0), above) + 1
            if connection.execute(tables.meta.delete().where(tables.meta.c.key == COPIED)).rowcount:
                epoch += _COPY_JUMP + secrets.randbelow(_COPY_JUMP)
            statement = insert(tables.meta).values(key="epoch", value=str(epoch))
            connection.execute(statement.on_conflict_do_update(index_elements=["key"], set_={"value": str(epoch)}))
        return epoch

    def probe(self) -> None:
        """Write something, durably, to find out whether that can be done."""
        statement = insert(tables.meta).values(key="probed_at", value=utc_now())
        with self._transaction() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["key"], set_={"value": utc_now()}))

    def create_run(
        self, *, federation: str, task: str, fingerprint: str, definition: Mapping[str, Any], rounds: int
    ) -> str:
        """Add a run, and return its id: the task's name and a random part, so that no two runs anywhere share one."""
        stem = "".join(char if char.isascii() and char.isalnum() else "-" for char in _short_name(task)).strip("-")[:40]
        run_id = f"{stem or 'run'}-{secrets.token_hex(3)}"
        with self._transaction() as connection:
            number = connection.execute(
                sa.select(sa.func.coalesce(sa.func.max(tables.runs.c.number), 0) + 1)
            ).scalar_one()
            connection.execute(
                tables.runs.insert().values(
                    run_id=run_id,
                    number=number,
                    federation=federation,
                    task=task,
                    fingerprint=fingerprint,
                    definition=to_json(definition),
                    rounds=rounds,
                    frame_elements=0,
                    num_frames=0,
                    is_published=False,
                    state="preparing",
                    reason="",
                    round_num=0,
                    created_at=utc_now(),
                    updated_at=utc_now(),
                )
            )
        return run_id

    def set_framing(self, run_id: str, frame_elements: int, num_frames: int) -> None:
        """Remember how a run cuts its vectors, before anything of it is published."""
        values = {"frame_elements": frame_elements, "num_frames": num_frames, "is_published": True}
        with self._transaction() as connection:
            connection.execute(tables.runs.update().where(tables.runs.c.run_id == run_id).values(**values))

    def set_unpublished(self, run_id: str) -> None:
        """Remember that nothing of a run is retained at the broker any more."""
        with self._transaction() as connection:
            connection.execute(tables.runs.update().where(tables.runs.c.run_id == run_id).values(is_published=False))
            connection.execute(tables.meta.delete().where(tables.meta.c.key == f"{_PUBLISHED}{run_id}"))

    def forget_run(self, run_id: str) -> None:
        """Delete all rows of a run. What of it is retained at a broker is remembered, for a coordinator to have it cleared."""
        row = self.run(run_id)
        with self._transaction() as connection:
            if row is not None and row["is_published"]:
                left = {"federation": row["federation"], "num_frames": row["num_frames"]}
                connection.execute(tables.meta.insert().values(key=f"{_PUBLISHED}{run_id}", value=to_json(left)))
            for table in tables.OF_A_RUN:
                connection.execute(table.delete().where(table.c.run_id == run_id))

    def save(self, run_id: str, saves: Sequence[ev.Save], agents: Iterable[AgentRow | AgentLeft] = ()) -> None:
        """Persist what one turn decided, in one transaction."""
        latest: dict[Any, ev.Save] = {}
        for save in saves:
            latest[key_of(save)] = save
        rows: dict[str, list[dict[str, Any]]] = {}
        for save in latest.values():
            name, *values = rows_of_save(run_id, save)
            rows.setdefault(name, []).extend(values)
        for agent in agents:
            name, row = row_of_agent(agent)
            rows.setdefault(name, []).append(row)
            self._num_agent_rows += 1
        with self._transaction() as connection:
            for name in sorted(rows, key=lambda name: name != "version"):  # first what others are added to
                if rows[name]:
                    connection.execute(tables.STATEMENTS[name], rows[name])
            for version in rows.get("version", ()):
                done = {"run": run_id, "number": version["round_num"] - KEPT_ROUNDS + 1}
                connection.execute(tables.STATEMENTS["done_with"], done)
                connection.execute(tables.STATEMENTS["members_done_with"], done)
                old = {"run": run_id, "number": version["round_num"] - KEPT_STRIKES}
                connection.execute(tables.STATEMENTS["forget_strikes"], old)
            if self._num_agent_rows >= _FORGET_EVERY:
                connection.execute(tables.STATEMENTS["agents_gone"], {"kept": KEPT_AGENTS})
                self._num_agent_rows = 0
            fail_point("coordinator.transaction.written")

    def add_base_model(self, name: str, *, digest: str, task: str, source: str, num_elements: int) -> None:
        """Give a stored model a name; from now on it is not pruned. Nothing happens where it has that name already."""
        row = {"name": name, "digest": digest, "task": task, "source": source, "num_elements": num_elements}
        with self._transaction() as connection:
            connection.execute(insert(tables.base_models).values(**row, created_at=utc_now()).on_conflict_do_nothing())

    def remove_base_model(self, name: str) -> None:
        """Take a name back."""
        with self._transaction() as connection:
            connection.execute(tables.base_models.delete().where(tables.base_models.c.name == name))

    # Reading.

    def base_models(self) -> list[dict[str, Any]]:
        """The named models, by name; none in a database that was last written before there were any."""
        with self._reading() as connection:
            if not sa.inspect(connection).has_table(tables.base_models.name):
                return []
        return self._rows(sa.select(tables.base_models).order_by(tables.base_models.c.name))

    def base_model(self, name: str) -> dict[str, Any] | None:
        """The model of this name."""
        return next((row for row in self.base_models() if row["name"] == name), None)

    def uses(self, digest: str) -> bool:
        """Whether a version of any run, what its strategy remembers, or a name, is this model."""
        columns = (tables.versions.c.digest, tables.versions.c.server_state, tables.base_models.c.digest)
        counts = [sa.select(sa.func.count()).where(column == digest).scalar_subquery() for column in columns]
        with self._engine.connect() as connection:
            return bool(connection.execute(sa.select(sum(counts[1:], counts[0]))).scalar())

    def runs(self) -> list[dict[str, Any]]:
        """All runs, the latest first."""
        return self._rows(sa.select(tables.runs).order_by(tables.runs.c.number.desc()))

    def run(self, run_id: str) -> dict[str, Any] | None:
        """One run."""
        rows = self._rows(sa.select(tables.runs).where(tables.runs.c.run_id == run_id))
        return rows[0] if rows else None

    def published(self, federation: str) -> list[tuple[str, int]]:
        """The runs of which something is retained at the broker, forgotten ones too, each with its number of frames."""
        found = [(row["run_id"], row["num_frames"]) for row in self.runs() if _is_published(row, federation)]
        for row in self._rows(sa.select(tables.meta).where(tables.meta.c.key.startswith(_PUBLISHED))):
            left = msgspec.json.decode(row["value"])
            if left["federation"] == federation:
                found.append((row["key"].removeprefix(_PUBLISHED), left["num_frames"]))
        return found

    def latest(self, federation: str, fingerprint: str) -> tuple[str | None, str]:
        """The latest run of this definition and its state; None and "" where there was none."""
        query = sa.select(tables.runs.c.run_id, tables.runs.c.state)
        query = query.where(tables.runs.c.federation == federation, tables.runs.c.fingerprint == fingerprint)
        rows = self._rows(query.order_by(tables.runs.c.number.desc()).limit(1))
        return (rows[0]["run_id"], rows[0]["state"]) if rows else (None, "")

    def versions(self, run_id: str) -> list[dict[str, Any]]:
        """The versions of a run, in order; `central` and `federated` are scores or None."""
        columns = [column for column in tables.versions.c if column.name not in self._lacking]
        rows = self._rows(
            sa.select(*columns).where(tables.versions.c.run_id == run_id).order_by(tables.versions.c.round_num)
        )
        for row in rows:
            row.update(dict.fromkeys(self._lacking))
            for source in ("central", "federated"):
                row[source] = None if row[source] is None else msgspec.json.decode(row[source], type=Evaluation)
        return rows

    def lone_digest(self, run_id: str, round_num: int, *, kept_from: int, of: str = "digest") -> str | None:
        """The digest of a version that nothing kept shares.

        Kept are the versions of other runs, those of this one from `kept_from` on, and base models.

        Args:
            run_id: of the version.
            round_num: of the version.
            kept_from: the first of its run that is kept.
            of: "digest", the model's, or "server_state".
        """
        column = tables.versions.c[of]
        query = sa.select(column).where(tables.versions.c.run_id == run_id, tables.versions.c.round_num == round_num)
        with self._engine.connect() as connection:
            digest: str | None = connection.execute(query).scalar()
            others = sa.or_(tables.versions.c.run_id != run_id, tables.versions.c.round_num >= kept_from)
            shared = sa.select(sa.func.count()).where(column == digest, others)
            named = sa.select(sa.func.count()).where(tables.base_models.c.digest == digest)
            is_kept = any(connection.execute(count).scalar() for count in (shared, named))
            return None if is_kept else digest

    def last_attempt(self, run_id: str, round_num: int) -> tuple[int, RoundState, dict[str, MemberState]] | None:
        """The latest attempt at a round: its number, its state, its members."""
        query = sa.select(tables.attempts).where(
            tables.attempts.c.run_id == run_id, tables.attempts.c.round_num == round_num
        )
        rows = self._rows(query.order_by(tables.attempts.c.attempt.desc()).limit(1))
        if not rows:
            return None
        members = msgspec.json.decode(rows[0]["members"], type=dict[str, MemberState])
        return rows[0]["attempt"], RoundState(rows[0]["state"]), members

    def updates(self, run_id: str, round_num: int) -> list[ev.AcceptedUpdate]:
        """The updates of a round that count."""
        query = sa.select(tables.updates).where(
            tables.updates.c.run_id == run_id, tables.updates.c.round_num == round_num
        )
        return [update_from(row) for row in self._rows(query.order_by(tables.updates.c.agent_id))]

    def kept_updates(self, run_id: str) -> list[tuple[int, ev.AcceptedUpdate]]:
        """The updates that count, with their round: of the last `KEPT_ROUNDS` rounds, in order of round and agent."""
        query = sa.select(tables.updates).where(tables.updates.c.run_id == run_id)
        rows = self._rows(query.order_by(tables.updates.c.round_num, tables.updates.c.agent_id))
        return [(row["round_num"], update_from(row)) for row in rows]

    def tallies(self, run_id: str) -> dict[tuple[str, str], int]:
        """How many updates of a run met which fate."""
        rows = self._rows(sa.select(tables.tallies).where(tables.tallies.c.run_id == run_id))
        return {(row["outcome"], row["reason"]): row["count"] for row in rows}

    def strikes(self, run_id: str) -> list[Strike]:
        """The strikes against agents in a run, in order."""
        columns = tables.strikes.c
        query = sa.select(tables.strikes).where(columns.run_id == run_id)
        rows = self._rows(query.order_by(columns.round_num, columns.attempt, columns.agent_id))
        return [Strike(row["round_num"], row["attempt"], row["agent_id"], row["reason"]) for row in rows]

    def agents(self) -> list[dict[str, Any]]:
        """All agents that were heard of."""
        rows = self._rows(sa.select(tables.agents).order_by(tables.agents.c.agent_id))
        return [{**row, "labels": msgspec.json.decode(row["labels"])} for row in rows]

    def attempts(self, run_id: str) -> list[dict[str, Any]]:
        """All attempts of a run, in order: `round_num`, `attempt`, `state`, and `members` with the state of each."""
        query = sa.select(tables.attempts).where(tables.attempts.c.run_id == run_id)
        rows = self._rows(query.order_by(tables.attempts.c.round_num, tables.attempts.c.attempt))
        for row in rows:
            row["members"] = msgspec.json.decode(row["members"], type=dict[str, MemberState])
        return rows

    def epoch(self) -> int:
        """The epoch of the coordinator that started last; 0 where none did."""
        rows = self._rows(sa.select(tables.meta.c.value).where(tables.meta.c.key == "epoch"))
        return int(rows[0]["value"]) if rows else 0


def _is_published(row: Mapping[str, Any], federation: str) -> bool:
    return bool(row["is_published"] and row["federation"] == federation)


def _short_name(task: str) -> str:
    """What a person calls it: the object, or the file or module where the object is called `task` as any other."""
    place, _, name = task.rpartition(":")
    short = name if place and name != "task" else place or name
    return short.removesuffix(".py").rpartition(".")[2].lower()
