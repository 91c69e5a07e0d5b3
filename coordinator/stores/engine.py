"""The database that lasts, whose tables several stores share: an SQLite file, or PostgreSQL.

SQLite is used the way that loses nothing: a write-ahead log flushed at every commit, writers that
take the write lock before they read (a transaction that reads first and then writes fails under
load, whatever the busy timeout), and readers on connections that cannot write.

PostgreSQL has no such lock. There a writer says what it writes about, and waits for whoever else
writes about the same: :mod:`fedia3.coordinator.stores.postgres`.
"""

import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    MetaData,
    String,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.pool import NullPool, QueuePool

from fedia3.coordinator.migrations import migrate
from fedia3.coordinator.stores.postgres import GaveWay, Postgres
from fedia3.errors import BadInput, BadSetting, Conflict, Corrupt, Fedia3Error, StorageFailed

# The timeout comes first: the statements after it may have to wait for another process.
_WAIT = "PRAGMA busy_timeout = 5000"
_DURABLE = ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL")
# What is erased is overwritten, not only unlinked from its table.
_WRITER = (_WAIT, *_DURABLE, "PRAGMA foreign_keys = ON", "PRAGMA secure_delete = ON")
_READER = (_WAIT, "PRAGMA query_only = ON")
_MIGRATOR = (_WAIT, *_DURABLE, "PRAGMA foreign_keys = OFF")

OPENING_S = 60.0  # for whoever else makes the database, or brings it up to date
_TRIES = 4  # of a call that PostgreSQL gives up for another one's sake
_PAUSE_S = 0.02  # before the second try, at most; doubled before each further one

# As SQLite compares text; PostgreSQL would go by its database's language.
BY_CODE_POINT = String(128).with_variant(String(128, collation="C"), "postgresql")

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


class Table(DeclarativeBase):
    """What the tables have in common: constraints get names, so that migrations can change them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Database:
    """One database's transactions. Opening creates the tables, or updates an older schema.

    Raises:
        BadSetting: the URL names no SQLite file and no PostgreSQL database, or one that cannot be
            opened: a folder that is not there, a wrong password.
        BadInput: the file is no registry, or a newer fedia3 wrote it.
        Conflict: somebody else kept a lock for five seconds (any use may raise this).
        Corrupt: the database is damaged (any use may raise this).
        StorageFailed: the disk refuses, or the server is away (any use may raise this).
    """

    def __init__(self, url: str | URL) -> None:
        self._url = _parsed(url)
        self._postgres: Postgres | None = None
        self._writer: Engine
        self._reader: Engine
        if self._url.get_backend_name() == "postgresql":
            self._postgres = Postgres(self._url)
            self._writer, self._reader = self._postgres.writer, self._postgres.reader
            try:
                self._migrate_postgres(self._postgres)
            except BaseException:
                self.close()
                raise
            return
        _close_to_others(self._url.database or "")
        self._migrate()
        # One writing connection: this process's writers queue here instead of polling SQLite's
        # lock, which serves them in no order.
        self._writer = _engine(self._url, _WRITER, "BEGIN IMMEDIATE", size=1)
        self._reader = _engine(self._url, _READER, "BEGIN", size=8)

    @staticmethod
    def url_of(path: Path) -> URL:
        """How a file is named to SQLAlchemy."""
        return URL.create("sqlite", database=str(path))

    @contextmanager
    def writing(self, about: str | None = None) -> Iterator[Connection]:
        """A transaction in which nobody else writes, from its start.

        Where it is said what it is ``about``, others may write about something else meanwhile, as
        far as the database can do that: PostgreSQL can. What is read to decide on a change, and
        what is changed, must then be changed under this name only, or under none.
        """
        with self._translated(), self._writer.begin() as connection:
            if self._postgres is not None:
                self._postgres.take_turn(connection, about)
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database and cannot change it."""
        with self._translated(), self._reader.begin() as connection:
            yield connection

    def copy_to(self, path: Path) -> None:
        """Write the file as it is now to a new place, for its owner alone, and flush it.

        Raises:
            BadSetting: it is a server's.
            StorageFailed: the disk refused.
        """
        if self._postgres is not None:
            raise BadSetting(
                f"{self._postgres.name} is copied with PostgreSQL's pg_dump, and blobs/ after it"
            )
        _close_to_others(str(path))
        try:
            with (
                self._translated(),
                closing(self._reader.raw_connection()) as connection,
                closing(sqlite3.connect(path)) as copy,
            ):
                connection.driver_connection.backup(copy)  # type: ignore[union-attr]  # it is open
        except sqlite3.Error as error:
            raise StorageFailed(
                f"cannot copy {self._url.database} to {path}: {error}; make room and try again"
            ) from error

    def empty_log(self) -> bool:
        """Write the log's pages into the file and cut it, so that it holds nothing of the past.

        Waits for readers up to five seconds; whether it was done. A server keeps its log for as
        long as it is set to.
        """
        if self._postgres is not None:
            return False
        with self._translated(), closing(self._writer.raw_connection()) as connection:
            statement = "PRAGMA wal_checkpoint(TRUNCATE)"
            (busy, _pages, _moved) = connection.cursor().execute(statement).fetchone()
            return not busy

    def close(self) -> None:
        """Let go of the file, or of the server."""
        self._reader.dispose()
        self._writer.dispose()

    def _migrate(self) -> None:
        """Bring the file up to date.

        Where others open a new file at the same moment SQLite refuses all but one at once, without
        a wait: it cannot begin a log while somebody writes.
        """
        ends = time.monotonic() + OPENING_S
        while True:
            try:
                return self._migrate_file()
            except Conflict:
                if time.monotonic() > ends:
                    raise
            time.sleep(random.uniform(0, _PAUSE_S))

    def _migrate_file(self) -> None:
        engine = _engine(self._url, _MIGRATOR, "BEGIN IMMEDIATE", size=None)
        with self._translated(), engine.begin() as connection:
            migrate(connection)
            # Foreign keys are off on this connection, so nothing else would notice.
            if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all():
                raise Corrupt(
                    f"{self._url.database} has {len(broken)} rows that refer to nothing, first "
                    f"in table {broken[0][0]}; restore it from a backup"
                )

    def _migrate_postgres(self, server: Postgres) -> None:
        with self._translated(), server.writer.begin() as connection:
            server.prepare_to_migrate(connection)
            migrate(connection)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The database's errors in our words."""
        try:
            yield
        except PoolTimeout as error:
            name = self._postgres.name if self._postgres else self._url.database
            raise Conflict(f"{name} was busy for 30 seconds; try again") from error
        except UnicodeDecodeError as error:  # a damaged name in what SQLite says
            raise Corrupt(f"{self._url.database}: {error}; restore it from a backup") from error
        except DBAPIError as error:
            if self._postgres is not None:
                raise self._postgres.in_our_words(error) from error
            raise _in_our_words(self._url, error) from error


def retried(call: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """A call of one transaction, run again a few times where PostgreSQL gives it up for another."""

    @wraps(call)
    def tried(*args: Arguments.args, **options: Arguments.kwargs) -> Answer:
        for attempt in range(_TRIES - 1):
            try:
                return call(*args, **options)
            except GaveWay:
                time.sleep(random.uniform(0, _PAUSE_S * 2**attempt))
        return call(*args, **options)

    return tried


def findable(text: str) -> str:
    """What to look for: no row has a NUL in its text, and PostgreSQL takes none, so neither do we.

    The empty text stands for it; nothing that is looked up has that for a name.
    """
    return "" if "\0" in text else text


def _parsed(url: str | URL) -> URL:
    """The URL, once it names a database that we can use; its password is never shown.

    Raises:
        BadSetting: it does not.
    """
    expected = (
        "a registry is kept in an SQLite file or in PostgreSQL, as sqlite:////folder/registry.db "
        "or postgresql://role@host/database"
    )
    try:
        made = make_url(url)
    except (ArgumentError, ValueError):  # whose words may hold a part of the password
        raise BadSetting(f"{expected}; the URL given is none") from None
    kind = made.drivername.partition("+")[0]
    if kind not in ("sqlite", "postgresql", "postgres") or not made.database:
        raise BadSetting(f"{expected}; got one of kind {kind!r}, database {made.database!r}")
    return made.set(drivername="postgresql+psycopg") if kind.startswith("postgres") else made


def to_ms(at: datetime) -> int:
    """Milliseconds since 1970, as tables keep times."""
    return (at - _EPOCH) // _MILLISECOND


def from_ms(ms: int) -> datetime:
    """UTC."""
    return _EPOCH + ms * _MILLISECOND


def _close_to_others(database: str) -> None:
    """Create a new file for its owner only; SQLite gives what lies beside it the same mode."""
    if database != ":memory:":
        with suppress(OSError):  # SQLite says it better
            os.close(os.open(database, os.O_RDONLY | os.O_CREAT, 0o600))


def _engine(url: URL, settings: Sequence[str], begin: str, size: int | None) -> Engine:
    """An engine whose connections start with ``settings`` and whose transactions with ``begin``."""
    engine = (
        create_engine(url, poolclass=NullPool)
        if size is None
        else create_engine(url, poolclass=QueuePool, pool_size=size, max_overflow=0)
    )

    @event.listens_for(engine, "connect")
    def settle(connection: Any, _record: object) -> None:  # Any: DBAPIs have no common type
        connection.isolation_level = None  # else Python's sqlite3 adds a deferred BEGIN of its own
        for setting in settings:
            connection.execute(setting)

    @event.listens_for(engine, "begin")
    def open_transaction(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _in_our_words(url: URL, error: DBAPIError) -> Fedia3Error:
    name = getattr(error.orig, "sqlite_errorname", "")
    said = f"{url.database}: {error.orig}"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return Conflict(f"{said}; another process kept the write lock for 5 seconds, try again")
    if name.startswith("SQLITE_CONSTRAINT"):
        return Conflict(f"{said}; nothing was changed")
    if name.startswith("SQLITE_CORRUPT"):
        return Corrupt(f"{said}; restore it from a backup")
    if name.startswith("SQLITE_NOTADB"):
        return BadInput(f"{said}; expected a registry, choose another folder")
    if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY")):
        return BadSetting(f"{said}; choose a folder you can write")
    return StorageFailed(f"{said}; nothing was changed, look at the disk and try again")
