"""The store: what the coordinator knows of its runs, in one database. The only file that imports the database library.

One process writes, any number read beside it: SQLite in write-ahead mode lets `coordinator runs` look into the state
directory of a coordinator that is at work. Every turn of the coordinator's loop is one transaction (group commit), so that
durability costs one sync a turn and not one a message. `synchronous=FULL`: what is committed survives a power failure.

Tables
    meta       schema version; the epoch, raised and committed at every start before anything else is done
    runs       one row a run: its configuration, state, where it stands, the best version
    versions   one row a committed version: digest, parent, what it was made of, how it does, the strategy's state
    attempts   one row an attempt at a round: state, and each member's
    updates    one row an accepted update, of the current round and of the last hundred
    tallies    one row per (run, outcome, reason): how many updates met that fate
    agents     one row an agent that was ever heard of
    base_models  one row a model that an operator registered under a name
"""

from __future__ import annotations

import errno
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from coordinator import run_events as ev
from coordinator.round import MemberState, RoundState
from midge.wire.messages import Evaluation

SCHEMA_VERSION = 2
_MIGRATIONS = {1: "ALTER TABLE versions ADD COLUMN server_state VARCHAR"}
"""From each earlier schema to the next one. What they add can be missing in a row, so that a reader need not migrate."""
DATABASE = "midge.db"
KEPT_ROUNDS = 100
"""Accepted updates are remembered for this many rounds; versions for ever."""

_COPIED = "copied_at"
_COPY_JUMP = 10_000
"""How many starts of the original a copy may be old. A coordinator's first epoch in it lies this far above, or up to twice."""

_metadata = sa.MetaData()
_meta = sa.Table("meta", _metadata, sa.Column("key", sa.String, primary_key=True), sa.Column("value", sa.String))
_runs = sa.Table(
    "runs",
    _metadata,
    sa.Column("run_id", sa.String, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False, unique=True),
    sa.Column("federation", sa.String, nullable=False),
    sa.Column("task", sa.String, nullable=False),
    sa.Column("fingerprint", sa.String, nullable=False, index=True),
    sa.Column("definition", sa.String, nullable=False),
    sa.Column("rounds", sa.Integer, nullable=False),
    sa.Column("frame_elements", sa.Integer, nullable=False, default=0),
    sa.Column("num_frames", sa.Integer, nullable=False, default=0),
    sa.Column("is_published", sa.Boolean, nullable=False, default=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("reason", sa.String, nullable=False, default=""),
    sa.Column("round_num", sa.Integer, nullable=False, default=0),
    sa.Column("best_round", sa.Integer),
    sa.Column("best_value", sa.Float),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("updated_at", sa.String, nullable=False),
)
_versions = sa.Table(
    "versions",
    _metadata,
    sa.Column("run_id", sa.String, primary_key=True),
    sa.Column("round_num", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String, nullable=False, index=True),
    sa.Column("parent", sa.String),
    sa.Column("num_updates", sa.Integer, nullable=False),
    sa.Column("num_examples", sa.Integer, nullable=False),
    sa.Column("delta_norm", sa.Float, nullable=False),
    sa.Column("duration_s", sa.Float, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("central", sa.String),
    sa.Column("federated", sa.String),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("server_state", sa.String),
)
_attempts = sa.Table(
    "attempts",
    _metadata,
    sa.Column("run_id", sa.String, primary_key=True),
    sa.Column("round_num", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("members", sa.String, nullable=False),
)
_updates = sa.Table(
    "updates",
    _metadata,
    sa.Column("run_id", sa.String, primary_key=True),
    sa.Column("round_num", sa.Integer, primary_key=True),
    sa.Column("agent_id", sa.String, primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("update_digest", sa.String, nullable=False),
    sa.Column("num_examples", sa.Integer, nullable=False),
    sa.Column("counters", sa.String, nullable=False),
    sa.Column("norm", sa.Float, nullable=False),
    sa.Column("training_s", sa.Float, nullable=False),
    sa.Column("metrics", sa.String, nullable=False),
    sa.Column("evaluation", sa.String),
)
_tallies = sa.Table(
    "tallies",
    _metadata,
    sa.Column("run_id", sa.String, primary_key=True),
    sa.Column("outcome", sa.String, primary_key=True),
    sa.Column("reason", sa.String, primary_key=True),
    sa.Column("count", sa.Integer, nullable=False),
)
_agents = sa.Table(
    "agents",
    _metadata,
    sa.Column("agent_id", sa.String, primary_key=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("task", sa.String, nullable=False),
    sa.Column("labels", sa.String, nullable=False),
    sa.Column("version", sa.String, nullable=False),
    sa.Column("changed_at", sa.String, nullable=False),
)

_base_models = sa.Table(
    "base_models",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("digest", sa.String, nullable=False, index=True),
    sa.Column("task", sa.String, nullable=False),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("num_elements", sa.Integer, nullable=False),
    sa.Column("created_at", sa.String, nullable=False),
)

_to_json = msgspec.json.encode


_ERRNOS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_CANTOPEN: errno.EIO,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_NOMEM: errno.ENOMEM,
    sqlite3.SQLITE_BUSY: errno.EAGAIN,
    sqlite3.SQLITE_LOCKED: errno.EAGAIN,
}


class StoreError(Exception):
    """The database cannot be used; the message says why and what to do."""


class StoreWriteError(StoreError, OSError):
    """What was to be written is not: the disk is full or fails. The database is as before.

    Where a sync failed as a transaction was committed, it may be there all the same: read what is.
    """


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


class Store:
    """The database of one state directory.

    Args:
        state_dir: made where it does not exist, unless `read_only`.
        read_only: look, and change nothing; works beside a coordinator that writes.

    Raises:
        StoreError: there is no database to read, or it is of another version of Midge.
    """

    def __init__(self, state_dir: Path, *, read_only: bool = False) -> None:
        self.path = state_dir / DATABASE
        self._lacking: tuple[str, ...] = ()
        self._seen_by: sa.Connection | None = None
        if read_only and not self.path.exists():
            raise StoreError(f"{state_dir} holds no {DATABASE}: no coordinator has run there; check --state-dir")
        if not read_only:
            try:
                state_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"{state_dir}: {error.strerror}; choose a writable state_dir") from None
        mode = "ro" if read_only else "rwc"
        # Quoted: a name may hold what has a meaning in an address.
        file = f"file:{quote(str(self.path.absolute()))}"
        url = sa.URL.create("sqlite", database=file, query={"mode": mode, "uri": "true"})
        self._engine = sa.create_engine(url, connect_args={"check_same_thread": False, "timeout": 10.0})
        sa.event.listen(self._engine, "connect", _configure)
        try:
            if not read_only:
                _metadata.create_all(self._engine)
            self._check_version(read_only=read_only)
        except sa.exc.DBAPIError as error:
            failed = _write_error(self.path, error.orig)
            if failed.errno is not None:  # the disk is full or fails, and the database may be as it should be
                raise failed from None
            raise StoreError(
                f"{self.path}: {error.orig}; restore it from a backup, or choose another state_dir"
            ) from None

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    # Writing. What cannot be written raises `StoreWriteError`, and changes nothing.

    def raise_epoch(self, above: int = 0) -> int:
        """Raise the epoch to one more than it was, and more than `above`, durably; returns it.

        In a copy, which may be started after the original went on, it is raised far, and by chance: above every epoch that the
        original, or another copy, may have had since, so that no message of theirs is ever taken for one of this coordinator.
        """
        with self._transaction() as connection:
            row = connection.execute(sa.select(_meta.c.value).where(_meta.c.key == "epoch")).scalar()
            epoch = max(int(row or 0), above) + 1
            if connection.execute(_meta.delete().where(_meta.c.key == _COPIED)).rowcount:
                epoch += _COPY_JUMP + secrets.randbelow(_COPY_JUMP)
            statement = insert(_meta).values(key="epoch", value=str(epoch))
            connection.execute(statement.on_conflict_do_update(index_elements=["key"], set_={"value": str(epoch)}))
        return epoch

    def probe(self) -> None:
        """Write something, durably, to find out whether that can be done."""
        statement = insert(_meta).values(key="probed_at", value=_now())
        with self._transaction() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["key"], set_={"value": _now()}))

    def create_run(
        self, *, federation: str, task: str, fingerprint: str, definition: Mapping[str, Any], rounds: int
    ) -> str:
        """Add a run, and return its id: the task's name and a random part, so that no two runs anywhere share one."""
        stem = "".join(char if char.isascii() and char.isalnum() else "-" for char in _short_name(task)).strip("-")[:40]
        run_id = f"{stem or 'run'}-{secrets.token_hex(3)}"
        with self._transaction() as connection:
            number = connection.execute(sa.select(sa.func.coalesce(sa.func.max(_runs.c.number), 0) + 1)).scalar_one()
            connection.execute(
                _runs.insert().values(
                    run_id=run_id,
                    number=number,
                    federation=federation,
                    task=task,
                    fingerprint=fingerprint,
                    definition=_to_json(definition).decode(),
                    rounds=rounds,
                    frame_elements=0,
                    num_frames=0,
                    is_published=False,
                    state="preparing",
                    reason="",
                    round_num=0,
                    created_at=_now(),
                    updated_at=_now(),
                )
            )
        return run_id

    def set_framing(self, run_id: str, frame_elements: int, num_frames: int) -> None:
        """Remember how a run cuts its vectors, before anything of it is published."""
        values = {"frame_elements": frame_elements, "num_frames": num_frames, "is_published": True}
        with self._transaction() as connection:
            connection.execute(_runs.update().where(_runs.c.run_id == run_id).values(**values))

    def set_unpublished(self, run_id: str) -> None:
        """Remember that nothing of a run is retained at the broker any more."""
        with self._transaction() as connection:
            connection.execute(_runs.update().where(_runs.c.run_id == run_id).values(is_published=False))

    def save(self, run_id: str, saves: Sequence[ev.Save], agents: Iterable[AgentRow | AgentLeft] = ()) -> None:
        """Persist what one turn decided, in one transaction."""
        latest: dict[Any, ev.Save] = {}
        for save in saves:
            latest[_key(save)] = save
        rows: dict[str, list[dict[str, Any]]] = {}
        for save in latest.values():
            name, *values = _rows_of(run_id, save)
            rows.setdefault(name, []).extend(values)
        now = _now()
        for agent in agents:
            if isinstance(agent, AgentLeft):
                rows.setdefault("agent_left", []).append({"left": agent.agent_id, "at": now})
                continue
            row = {**msgspec.structs.asdict(agent), "labels": _to_json(agent.labels).decode(), "changed_at": now}
            rows.setdefault("agent", []).append(row)
        with self._transaction() as connection:
            for name in sorted(rows, key=lambda name: name != "version"):  # first what others are added to
                if rows[name]:
                    connection.execute(_STATEMENTS[name], rows[name])
            for version in rows.get("version", ()):
                done = {"run": run_id, "number": version["round_num"] - KEPT_ROUNDS + 1}
                connection.execute(_STATEMENTS["done_with"], done)

    def add_base_model(self, name: str, *, digest: str, task: str, source: str, num_elements: int) -> None:
        """Give a stored model a name; from now on it is not pruned. Nothing happens where it has that name already."""
        row = {"name": name, "digest": digest, "task": task, "source": source, "num_elements": num_elements}
        with self._transaction() as connection:
            connection.execute(insert(_base_models).values(**row, created_at=_now()).on_conflict_do_nothing())

    def remove_base_model(self, name: str) -> None:
        """Take a name back."""
        with self._transaction() as connection:
            connection.execute(_base_models.delete().where(_base_models.c.name == name))

    # Reading.

    def base_models(self) -> list[dict[str, Any]]:
        """The named models, by name; none in a database that was last written before there were any."""
        with self._reading() as connection:
            if not sa.inspect(connection).has_table(_base_models.name):
                return []
        return self._rows(sa.select(_base_models).order_by(_base_models.c.name))

    def base_model(self, name: str) -> dict[str, Any] | None:
        """The model of this name."""
        return next((row for row in self.base_models() if row["name"] == name), None)

    def uses(self, digest: str) -> bool:
        """Whether a version of any run, or a name, is this model."""
        counts = [
            sa.select(sa.func.count()).where(table.c.digest == digest).scalar_subquery()
            for table in (_versions, _base_models)
        ]
        with self._engine.connect() as connection:
            return bool(connection.execute(sa.select(sum(counts[1:], counts[0]))).scalar())

    def runs(self) -> list[dict[str, Any]]:
        """All runs, the latest first."""
        return self._rows(sa.select(_runs).order_by(_runs.c.number.desc()))

    def run(self, run_id: str) -> dict[str, Any] | None:
        """One run."""
        rows = self._rows(sa.select(_runs).where(_runs.c.run_id == run_id))
        return rows[0] if rows else None

    def latest(self, federation: str, fingerprint: str) -> tuple[str | None, str]:
        """The latest run of this definition and its state; None and "" where there was none."""
        query = sa.select(_runs.c.run_id, _runs.c.state)
        query = query.where(_runs.c.federation == federation, _runs.c.fingerprint == fingerprint)
        rows = self._rows(query.order_by(_runs.c.number.desc()).limit(1))
        return (rows[0]["run_id"], rows[0]["state"]) if rows else (None, "")

    def versions(self, run_id: str) -> list[dict[str, Any]]:
        """The versions of a run, in order; `central` and `federated` are scores or None."""
        columns = [column for column in _versions.c if column.name not in self._lacking]
        rows = self._rows(sa.select(*columns).where(_versions.c.run_id == run_id).order_by(_versions.c.round_num))
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
        column = _versions.c[of]
        query = sa.select(column).where(_versions.c.run_id == run_id, _versions.c.round_num == round_num)
        with self._engine.connect() as connection:
            digest: str | None = connection.execute(query).scalar()
            others = sa.or_(_versions.c.run_id != run_id, _versions.c.round_num >= kept_from)
            shared = sa.select(sa.func.count()).where(column == digest, others)
            named = sa.select(sa.func.count()).where(_base_models.c.digest == digest)
            is_kept = any(connection.execute(count).scalar() for count in (shared, named))
            return None if is_kept else digest

    def last_attempt(self, run_id: str, round_num: int) -> tuple[int, RoundState, dict[str, MemberState]] | None:
        """The latest attempt at a round: its number, its state, its members."""
        query = sa.select(_attempts).where(_attempts.c.run_id == run_id, _attempts.c.round_num == round_num)
        rows = self._rows(query.order_by(_attempts.c.attempt.desc()).limit(1))
        if not rows:
            return None
        members = msgspec.json.decode(rows[0]["members"], type=dict[str, MemberState])
        return rows[0]["attempt"], RoundState(rows[0]["state"]), members

    def updates(self, run_id: str, round_num: int) -> list[ev.AcceptedUpdate]:
        """The updates of a round that count."""
        query = sa.select(_updates).where(_updates.c.run_id == run_id, _updates.c.round_num == round_num)
        return [_update_from(row) for row in self._rows(query.order_by(_updates.c.agent_id))]

    def kept_updates(self, run_id: str) -> list[tuple[int, ev.AcceptedUpdate]]:
        """The updates that count, with their round: of the last `KEPT_ROUNDS` rounds, in order of round and agent."""
        query = sa.select(_updates).where(_updates.c.run_id == run_id)
        rows = self._rows(query.order_by(_updates.c.round_num, _updates.c.agent_id))
        return [(row["round_num"], _update_from(row)) for row in rows]

    def tallies(self, run_id: str) -> dict[tuple[str, str], int]:
        """How many updates of a run met which fate."""
        rows = self._rows(sa.select(_tallies).where(_tallies.c.run_id == run_id))
        return {(row["outcome"], row["reason"]): row["count"] for row in rows}

    def agents(self) -> list[dict[str, Any]]:
        """All agents that were heard of."""
        rows = self._rows(sa.select(_agents).order_by(_agents.c.agent_id))
        return [{**row, "labels": msgspec.json.decode(row["labels"])} for row in rows]

    def attempts(self, run_id: str) -> list[dict[str, Any]]:
        """All attempts of a run, in order: `round_num`, `attempt`, `state`, and `members` with the state of each."""
        query = sa.select(_attempts).where(_attempts.c.run_id == run_id)
        rows = self._rows(query.order_by(_attempts.c.round_num, _attempts.c.attempt))
        for row in rows:
            row["members"] = msgspec.json.decode(row["members"], type=dict[str, MemberState])
        return rows

    def epoch(self) -> int:
        """The epoch of the coordinator that started last; 0 where none did."""
        rows = self._rows(sa.select(_meta.c.value).where(_meta.c.key == "epoch"))
        return int(rows[0]["value"]) if rows else 0

    @contextmanager
    def snapshot(self, *, alone: bool = False) -> Iterator[None]:
        """Let every read within the block, by one thread, see the database as it is now, whatever is written meanwhile.

        Args:
            alone: have whoever writes wait until the block ends, so that nothing is.
        """
        with self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE" if alone else "BEGIN")
            self._seen_by = connection
            try:
                yield
            finally:
                self._seen_by = None

    def copy_to(self, path: Path) -> None:
        """Copy the database to a new file, while others read and write: as it is now, or as `snapshot` has it.

        The copy is one file, is marked as a copy, and need be synced.

        Raises:
            StoreError: the database is damaged.
            OSError: the copy cannot be written.
        """
        try:
            with self._reading() as connection, closing(sqlite3.connect(path)) as copy:
                source: Any = connection.connection.driver_connection
                source.backup(copy)
                copy.execute("PRAGMA journal_mode=DELETE")  # else what reads it would leave files beside it
                copy.execute("PRAGMA synchronous=OFF")
                copy.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_COPIED, _now()))
                copy.commit()
        except sqlite3.OperationalError as error:
            raise _write_error(path, error) from None
        except (sqlite3.DatabaseError, sa.exc.DBAPIError) as error:
            raise StoreError(f"{self.path}: {error}; see what `coordinator verify` says") from None

    def damage(self) -> list[str]:
        """What SQLite finds wrong with the file when it reads all of it; empty where nothing is."""
        try:
            with self._engine.connect() as connection:
                said = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check(20)")]
        except sa.exc.DBAPIError as error:
            return [str(error.orig)]
        return [] if said == ["ok"] else [line.strip() for line in said]

    def _rows(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        try:
            with self._reading() as connection:
                return [dict(row) for row in connection.execute(query).mappings()]
        except sa.exc.DBAPIError as error:
            raise StoreError(f"{self.path}: {error.orig}; restore it from a backup") from None

    def _reading(self) -> AbstractContextManager[sa.Connection]:
        return self._engine.connect() if self._seen_by is None else nullcontext(self._seen_by)

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except sa.exc.OperationalError as error:
            raise _write_error(self.path, error.orig) from None
        except sa.exc.IntegrityError:
            raise  # our own bug
        except sa.exc.DatabaseError as error:
            raise StoreError(f"{self.path}: {error.orig}; restore it from a backup") from None

    def _check_version(self, *, read_only: bool) -> None:
        with self._engine.connect() if read_only else self._engine.begin() as connection:
            seen = connection.execute(sa.select(_meta.c.value).where(_meta.c.key == "schema")).scalar()
            if seen is None and not read_only:
                connection.execute(_meta.insert().values(key="schema", value=str(SCHEMA_VERSION)))
            elif seen is not None and seen.isdecimal() and int(seen) in _MIGRATIONS:
                self._bring_up(connection, int(seen), read_only=read_only)
            elif seen != str(SCHEMA_VERSION):
                raise StoreError(
                    f"{self.path} has schema {seen}, this Midge reads {SCHEMA_VERSION}: use the Midge that wrote it, "
                    "or choose another state_dir"
                )

    def _bring_up(self, connection: sa.Connection, seen: int, *, read_only: bool) -> None:
        """Add what a database of an earlier Midge lacks; where only to be read, do without."""
        if read_only:
            self._lacking = ("server_state",)
            return
        # The number first: it opens the transaction, which the driver does not do for what alters a table.
        connection.execute(_meta.update().where(_meta.c.key == "schema").values(value=str(SCHEMA_VERSION)))
        for version in range(seen, SCHEMA_VERSION):
            connection.execute(sa.text(_MIGRATIONS[version]))


def _write_error(path: Path, error: Any) -> StoreWriteError:
    """With the error number that the disk had, as far as SQLite tells."""
    made = StoreWriteError(f"{path}: {error}")
    made.errno = _ERRNOS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
    return made


def _configure(connection: Any, record: object) -> None:  # noqa: ARG001
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "wal_autocheckpoint=1000"):
        try:
            cursor.execute(f"PRAGMA {pragma}")
        except Exception:  # noqa: BLE001  a read-only connection may not change the mode, and need not
            break
    cursor.close()


def _upsert(table: sa.Table) -> sa.Executable:
    statement = insert(table)
    keys = [column.name for column in table.primary_key]
    rest = {column.name: statement.excluded[column.name] for column in table.columns if column.name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=rest)


def _set_score(source: str) -> sa.Executable:
    where = sa.and_(_versions.c.run_id == sa.bindparam("run"), _versions.c.round_num == sa.bindparam("number"))
    return _versions.update().where(where).values({source: sa.bindparam("score")})


# Made once: to compile a statement costs more than to execute it.
_STATEMENTS: dict[str, sa.Executable] = {
    # Not an upsert: a version is written once, and a second one with its number is an error (I1).
    "version": _versions.insert(),
    "done_with": _updates.delete().where(
        _updates.c.run_id == sa.bindparam("run"), _updates.c.round_num < sa.bindparam("number")
    ),
    "attempt": _upsert(_attempts),
    "update": _upsert(_updates),
    "central": _set_score("central"),
    "federated": _set_score("federated"),
    "tallies": _upsert(_tallies),
    "run": _runs.update()
    .where(_runs.c.run_id == sa.bindparam("run"))
    .values(
        {
            name: sa.bindparam(f"new_{name}")
            for name in ("state", "reason", "round_num", "best_round", "best_value", "updated_at")
        }
    ),
    "agent": _upsert(_agents),
    "agent_left": _agents.update()
    .where(_agents.c.agent_id == sa.bindparam("left"), _agents.c.state != "offline")
    .values(state="offline", changed_at=sa.bindparam("at")),
}


def _rows_of(run_id: str, save: ev.Save) -> tuple[Any, ...]:
    """The name of the statement that saves this, and the rows to execute it with."""
    match save:
        case ev.SaveRun():
            values = msgspec.to_builtins(save)
            return "run", {
                "run": run_id,
                "new_updated_at": _now(),
                **{f"new_{key}": value for key, value in values.items()},
            }
        case ev.SaveAttempt():
            row = {"run_id": run_id, "round_num": save.round_num, "attempt": save.attempt}
            members = _to_json(dict(save.members)).decode()
            return "attempt", {**row, "state": save.state, "reason": save.reason, "members": members}
        case ev.SaveUpdate(round_num, update):
            row = {"run_id": run_id, "round_num": round_num, "agent_id": update.agent_id}
            return "update", {**row, **_update_values(update)}
        case ev.SaveVersion():
            return "version", {"run_id": run_id, "created_at": _now(), **msgspec.to_builtins(save)}
        case ev.SaveEvaluation(round_num, source, score):
            return source, {"run": run_id, "number": round_num, "score": _to_json(score).decode()}
        case ev.SaveTallies(tallies):
            return "tallies", *(
                {"run_id": run_id, "outcome": outcome, "reason": reason, "count": count}
                for (outcome, reason), count in tallies.items()
            )


def _key(save: ev.Save) -> object:
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
        case ev.SaveVersion():
            return id(save)


def _update_values(update: ev.AcceptedUpdate) -> dict[str, Any]:
    return {
        "attempt": update.attempt,
        "update_digest": update.update_digest,
        "num_examples": update.num_examples,
        "counters": _to_json(update.counters).decode(),
        "norm": update.norm,
        "training_s": update.training_s,
        "metrics": _to_json(dict(update.metrics)).decode(),
        "evaluation": None if update.evaluation is None else _to_json(update.evaluation).decode(),
    }


def _update_from(row: Mapping[str, Any]) -> ev.AcceptedUpdate:
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


def _short_name(task: str) -> str:
    """What a person calls it: the object, or the file or module where the object is called `task` as any other."""
    place, _, name = task.rpartition(":")
    short = name if place and name != "task" else place or name
    return short.removesuffix(".py").rpartition(".")[2].lower()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
