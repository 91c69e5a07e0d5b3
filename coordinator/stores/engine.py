"""The database that lasts: SQLAlchemy on one SQLite file, whose tables several stores share.

SQLite is used the way that loses nothing: a write-ahead log flushed at every commit, writers that
take the write lock before they read (a transaction that reads first and then writes fails under
load, whatever the busy timeout), and readers on connections that cannot write.
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, MetaData, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.pool import NullPool, QueuePool

from fedia3.coordinator.migrations import migrate
from fedia3.errors import BadInput, BadSetting, Conflict, Corrupt, Fedia3Error, StorageFailed

# The timeout comes first: the statements after it may have to wait for another process.
_WAIT = "PRAGMA busy_timeout = 5000"
_DURABLE = ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL")
# What is erased is overwritten, not only unlinked from its table.
_WRITER = (_WAIT, *_DURABLE, "PRAGMA foreign_keys = ON", "PRAGMA secure_delete = ON")
_READER = (_WAIT, "PRAGMA query_only = ON")
_MIGRATOR = (_WAIT, *_DURABLE, "PRAGMA foreign_keys = OFF")


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
    """One file's transactions. Opening creates the tables, or brings an older schema up to date.

    Raises:
        BadSetting: the URL is not SQLite's, or the file cannot be opened.
        BadInput: the file is no registry, or a newer fedia3 wrote it.
        Conflict: another process kept the write lock for five seconds (any use may raise this).
        Corrupt: the database is damaged (any use may raise this).
    """

    def __init__(self, url: str | URL) -> None:
        self._url = make_url(url)
        if self._url.get_backend_name() != "sqlite" or not self._url.database:
            raise BadSetting(
                f"a registry is kept in an SQLite file, got {self._url.render_as_string()}"
            )
        _close_to_others(self._url.database)
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
    def writing(self) -> Iterator[Connection]:
        """A transaction that holds the write lock from its start."""
        with _translated(self._url), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the file and cannot change it."""
        with _translated(self._url), self._reader.begin() as connection:
            yield connection

    def copy_to(self, path: Path) -> None:
        """Write the file as it is now to a new place, for its owner alone, and flush it.

        Raises:
            StorageFailed: the disk refused.
        """
        _close_to_others(str(path))
        try:
            with (
                _translated(self._url),
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

        Waits for readers up to five seconds; whether it was done.
        """
        with _translated(self._url), closing(self._writer.raw_connection()) as connection:
            statement = "PRAGMA wal_checkpoint(TRUNCATE)"
            (busy, _pages, _moved) = connection.cursor().execute(statement).fetchone()
            return not busy

    def close(self) -> None:
        """Let go of the file."""
        self._reader.dispose()
        self._writer.dispose()

    def _migrate(self) -> None:
        engine = _engine(self._url, _MIGRATOR, "BEGIN IMMEDIATE", size=None)
        with _translated(self._url), engine.begin() as connection:
            migrate(connection)
            # Foreign keys are off on this connection, so nothing else would notice.
            if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all():
                raise Corrupt(
                    f"{self._url.database} has {len(broken)} rows that refer to nothing, first "
                    f"in table {broken[0][0]}; restore it from a backup"
                )


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


@contextmanager
def _translated(url: URL) -> Iterator[None]:
    """The database's errors in our words."""
    try:
        yield
    except PoolTimeout as error:
        raise Conflict(f"{url.database} was busy for 30 seconds; try again") from error
    except UnicodeDecodeError as error:  # a damaged name in what SQLite says
        raise Corrupt(f"{url.database}: {error}; restore it from a backup") from error
    except DBAPIError as error:
        raise _in_our_words(url, error) from error


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
