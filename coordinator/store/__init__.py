"""The store: what the coordinator knows of its runs, in one database.

One process writes, any number read beside it: SQLite in write-ahead mode lets `coordinator runs` look into the state
directory of a coordinator that is at work. Every turn of the coordinator's loop is one transaction (group commit), so that
durability costs one sync a turn and not one a message. `synchronous=FULL`: what is committed survives a power failure.

Tables
    meta         schema version; the epoch, raised and committed at every start before anything else is done
    runs         one row a run: its configuration, state, where it stands, the best version
    versions     one row a committed version: digest, parent, what it was made of, how it does, the strategy's state
    attempts     one row an attempt at a round: state, and each member's, of the current round and of the last hundred
    updates      one row an accepted update, of the current round and of the last hundred
    strikes      one row per (run, round, attempt, agent): an update that was rejected for its content, or left out
    tallies      one row per (run, outcome, reason): how many updates met that fate
    agents       one row an agent that was ever heard of
    base_models  one row a model that an operator registered under a name

Files
    store     what the coordinator has remembered, and what it asks for
    database  the file: connections, transactions, migrations, copies
    tables    the tables, and the statements of every turn
    rows      between rows and what a run decides

No file elsewhere imports the database library: whoever wants another one changes this folder.
"""

from __future__ import annotations

from coordinator.store.database import DATABASE, StoreError, StoreWriteError
from coordinator.store.rows import AgentLeft, AgentRow
from coordinator.store.store import KEPT_ROUNDS, Store
from coordinator.store.tables import SCHEMA_VERSION

__all__ = [
    "DATABASE",
    "KEPT_ROUNDS",
    "SCHEMA_VERSION",
    "AgentLeft",
    "AgentRow",
    "Store",
    "StoreError",
    "StoreWriteError",
]
