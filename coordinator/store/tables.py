"""The tables, how a database of an earlier Midge is brought up to them, and the statements of every turn."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

SCHEMA_VERSION = 2
MIGRATIONS = {1: "ALTER TABLE versions ADD COLUMN server_state VARCHAR"}
"""From each earlier schema to the next one. What they add can be missing in a row, so that a reader need not migrate."""

metadata = sa.MetaData()
meta = sa.Table("meta", metadata, sa.Column("key", sa.String, primary_key=True), sa.Column("value", sa.String))
runs = sa.Table(
    "runs",
    metadata,
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
versions = sa.Table(
    "versions",
    metadata,
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
attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("run_id", sa.String, primary_key=True),
    sa.Column("round_num", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("members", sa.String, nullable=False),
)
updates = sa.Table(
    "updates",
    metadata,
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
strikes = sa.Table(
    "strikes",
    metadata,
    sa.Column("run_id", sa.String, primary_key=True),
    sa.Column("round_num", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("agent_id", sa.String, primary_key=True),
    sa.Column("reason", sa.String, nullable=False),
)
tallies = sa.Table(
    "tallies",
    metadata,
    sa.Column("run_id", sa.String, primary_key=True),
    sa.Column("outcome", sa.String, primary_key=True),
    sa.Column("reason", sa.String, primary_key=True),
    sa.Column("count", sa.Integer, nullable=False),
)
agents = sa.Table(
    "agents",
    metadata,
    sa.Column("agent_id", sa.String, primary_key=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("task", sa.String, nullable=False),
    sa.Column("labels", sa.String, nullable=False),
    sa.Column("version", sa.String, nullable=False),
    sa.Column("changed_at", sa.String, nullable=False),
)

base_models = sa.Table(
    "base_models",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("digest", sa.String, nullable=False, index=True),
    sa.Column("task", sa.String, nullable=False),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("num_elements", sa.Integer, nullable=False),
    sa.Column("created_at", sa.String, nullable=False),
)


def _upsert(table: sa.Table) -> sa.Executable:
    statement = insert(table)
    keys = [column.name for column in table.primary_key]
    rest = {column.name: statement.excluded[column.name] for column in table.columns if column.name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=rest)


def _set_score(source: str) -> sa.Executable:
    where = sa.and_(versions.c.run_id == sa.bindparam("run"), versions.c.round_num == sa.bindparam("number"))
    return versions.update().where(where).values({source: sa.bindparam("score")})


OF_A_RUN = (versions, attempts, updates, tallies, strikes, runs)
"""The tables with a `run_id`."""


# Made once: to compile a statement costs more than to execute it.
STATEMENTS: dict[str, sa.Executable] = {
    # Not an upsert: a version is written once, and a second one with its number is an error (I1).
    "version": versions.insert(),
    "done_with": updates.delete().where(
        updates.c.run_id == sa.bindparam("run"), updates.c.round_num < sa.bindparam("number")
    ),
    # Of each round that leaves, so that none is looked at twice; the attempt itself is remembered with its version.
    "members_done_with": attempts.update()
    .where(attempts.c.run_id == sa.bindparam("run"), attempts.c.round_num == sa.bindparam("number") - 1)
    .values(members="{}"),
    "attempt": _upsert(attempts),
    "strike": _upsert(strikes),
    "forget_strikes": strikes.delete().where(
        strikes.c.run_id == sa.bindparam("run"), strikes.c.round_num < sa.bindparam("number")
    ),
    "update": _upsert(updates),
    "central": _set_score("central"),
    "federated": _set_score("federated"),
    "tallies": _upsert(tallies),
    "run": runs.update()
    .where(runs.c.run_id == sa.bindparam("run"))
    .values(
        {
            name: sa.bindparam(f"new_{name}")
            for name in ("state", "reason", "round_num", "best_round", "best_value", "updated_at")
        }
    ),
    "agent": _upsert(agents),
    # Those that have been gone longest, where there are too many; no index is worth its room for what is done so seldom.
    "agents_gone": agents.delete().where(
        agents.c.agent_id.in_(
            sa.select(agents.c.agent_id)
            .where(agents.c.state == "offline")
            .order_by(agents.c.changed_at.desc(), agents.c.agent_id)
            .offset(sa.bindparam("kept"))
        )
    ),
    "agent_left": agents.update()
    .where(agents.c.agent_id == sa.bindparam("left"), agents.c.state != "offline")
    .values(state="offline", changed_at=sa.bindparam("at")),
}
