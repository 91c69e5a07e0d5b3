"""PostgreSQL under the stores: how it is reached, who waits for whom, what its errors mean."""

from hashlib import sha256
from typing import Any

from sqlalchemy import URL, Connection, create_engine, text
from sqlalchemy.exc import DBAPIError

from fedia3.errors import BadInput, BadSetting, Conflict, Corrupt, Fedia3Error, StorageFailed

KEPT_CONNECTIONS, MORE_CONNECTIONS = 2, 6  # of one store; the latter only while there is a rush
# An acknowledged change is on disk, whatever the server's default. Who hangs lets go of its locks.
_SESSION = {
    "synchronous_commit": "on",
    "statement_timeout": "60s",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": "60s",
}
_MIGRATING = (
    "statement_timeout = 0",
    "lock_timeout = '60s'",
    "idle_in_transaction_session_timeout = '10min'",
)
# A server that is gone without a word is noticed within half a minute.
_LINK = {
    "application_name": "fedia3",
    "client_encoding": "utf8",
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",  # ms
}
# Why a server, or the way to it, lets nobody in until somebody changes something.
_REFUSED = (
    "password",
    "authentication",
    "pg_hba.conf",
    "does not exist",
    "not permitted",
    "resolve host",
)


class GaveWay(Conflict):
    """The server gave a transaction up for another one's sake; it may succeed when run again."""


# by the beginning of SQLSTATE
_MEANINGS: tuple[tuple[tuple[str, ...], type[Fedia3Error], str], ...] = (
    (("40001", "40P01"), GaveWay, "nothing was changed, try again"),
    (("55P03",), Conflict, "somebody kept a lock for too long, try again"),
    (("23",), Conflict, "nothing was changed"),
    (("22",), BadInput, "nothing was changed; give a value that PostgreSQL can keep"),
    (("XX001", "XX002"), Corrupt, "restore it from a backup"),
    (
        ("28", "3D", "3F", "42501", "25006"),
        BadSetting,
        "name a primary server's database, in UTF-8, and a role that may create tables in it",
    ),
)


class Postgres:
    """One database on a PostgreSQL server.

    Writers run in READ COMMITTED: each of their statements sees what was committed before it. So a
    writer that first takes an advisory lock reads what all earlier holders of that lock have left,
    and nobody changes it until the commit lets the lock go. :meth:`take_turn` takes it.
    Readers see one state (REPEATABLE READ, read-only).
    """

    def __init__(self, url: URL) -> None:
        self.name = f"{url.host or 'localhost'}:{url.port or 5432}/{url.database or ''}"
        try:
            self.writer = create_engine(
                url.set(drivername="postgresql+psycopg"),
                pool_size=KEPT_CONNECTIONS,
                max_overflow=MORE_CONNECTIONS,
                pool_pre_ping=True,
                isolation_level="READ COMMITTED",
                connect_args=_connection_options(url),
            )
        except ImportError as error:  # its libpq may be missing, too
            raise BadSetting(
                "PostgreSQL is reached through psycopg, which is not installed whole; run "
                "`pip install fedia3[postgres]`"
            ) from error
        self.reader = self.writer.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )

    def take_turn(self, connection: Connection, about: str | None) -> None:
        """Wait until nobody else writes about the same, or nobody else at all.

        Everybody takes the lock of the whole database, shared where ``about`` is given, and then
        that of ``about``; in this order, so that no two wait for each other.

        Raises:
            Conflict: that took more than five seconds.
        """
        if about is None:
            connection.execute(_ALONE, {"key": _key("")})
        else:
            connection.execute(_TOGETHER, {"key": _key("")})
            connection.execute(_ALONE, {"key": _key(about)})

    def prepare_to_migrate(self, connection: Connection) -> None:
        """Let this transaction work for as long as it takes, once nobody else writes.

        Raises:
            BadSetting: the database keeps no UTF-8.
            Conflict: somebody wrote, or migrated, for more than a minute.
        """
        for setting in _MIGRATING:
            connection.exec_driver_sql(f"SET LOCAL {setting}")
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
        if encoding != "UTF8":
            raise BadSetting(
                f"{self.name} keeps text as {encoding}, names need UTF8; create a database with "
                "`createdb --encoding UTF8 --template template0 NAME`"
            )
        self.take_turn(connection, None)

    def in_our_words(self, error: DBAPIError) -> Fedia3Error:
        """One of the server's errors, or of the way to it."""
        state = getattr(error.orig, "sqlstate", None)
        if state is None:
            return _without_state(error, f"{self.name}: {str(error.orig).strip()}")
        # Without the server's details: they quote rows.
        diagnosis = getattr(error.orig, "diag", None)
        said = f"{self.name}: {getattr(diagnosis, 'message_primary', None) or state}"
        for beginnings, kind, advice in _MEANINGS:
            if state.startswith(beginnings):
                return kind(f"{said}; {advice}")
        return _storage_failed(said)


_ALONE = text("SELECT pg_advisory_xact_lock(:key)")
_TOGETHER = text("SELECT pg_advisory_xact_lock_shared(:key)")


def _key(about: str) -> int:
    """What an advisory lock is called: 64 bits, signed. Two that collide only wait for nothing."""
    return int.from_bytes(sha256(f"fedia3 {about}".encode()).digest()[:8], signed=True)


def _connection_options(url: URL) -> dict[str, Any]:
    """Ours, under what the URL says itself."""
    ours = " ".join(f"-c {name}={value}" for name, value in _SESSION.items())
    return {**_LINK, **url.query, "options": f"{ours} {url.query.get('options', '')}"}


def _without_state(error: DBAPIError, said: str) -> Fedia3Error:
    """An error that no server sent: of the driver, or while connecting."""
    kind = type(error.orig).__name__
    if kind == "DataError":
        return BadInput(f"{said}; nothing was changed")
    if kind == "ProgrammingError" or any(words in said for words in _REFUSED):
        return BadSetting(f"{said}; check the database's URL and the role's password")
    return _storage_failed(said)


def _storage_failed(said: str) -> StorageFailed:
    return StorageFailed(
        f"{said}; look at the server. Whether a change under way was kept is not known: look "
        "before you repeat it"
    )
