"""The database's file: connections, transactions, migrations, copies."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa

from coordinator.store import tables
from coordinator.store.rows import utc_now

DATABASE = "midge.db"
COPIED = "copied_at"
"""The key that marks a copy."""

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


class Database:
    """The file itself: opened, brought up to date, read and written in transactions, copied.

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
                tables.metadata.create_all(self._engine)
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

        The copy is one file, is marked as a copy, and is still to be synced.

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
                copy.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (COPIED, utc_now()))
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
            seen = connection.execute(sa.select(tables.meta.c.value).where(tables.meta.c.key == "schema")).scalar()
            if seen is None and not read_only:
                connection.execute(tables.meta.insert().values(key="schema", value=str(tables.SCHEMA_VERSION)))
            elif seen is not None and seen.isdecimal() and int(seen) in tables.MIGRATIONS:
                self._bring_up(connection, int(seen), read_only=read_only)
            elif seen != str(tables.SCHEMA_VERSION):
                raise StoreError(
                    f"{self.path} has schema {seen}, this Midge reads {tables.SCHEMA_VERSION}: use the Midge that wrote it, "
                    "or choose another state_dir"
                )

    def _bring_up(self, connection: sa.Connection, seen: int, *, read_only: bool) -> None:
        """Add what a database of an earlier Midge lacks; where only to be read, do without."""
        if read_only:
            self._lacking = ("server_state",)
            return
        # The number first: it opens the transaction, which the driver does not do for what alters a table.
        connection.execute(
            tables.meta.update().where(tables.meta.c.key == "schema").values(value=str(tables.SCHEMA_VERSION))
        )
        for version in range(seen, tables.SCHEMA_VERSION):
            connection.execute(sa.text(tables.MIGRATIONS[version]))


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
