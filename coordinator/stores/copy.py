"""A registry moves to another database: every row of every table, as it is."""

from collections.abc import Iterator
from contextlib import closing

from sqlalchemy import URL, Connection, delete, func, insert, select
from sqlalchemy import Table as SqlTable

from fedia3.coordinator.stores import sql, sql_directory  # noqa: F401 they declare the tables
from fedia3.coordinator.stores.engine import Database, Table
from fedia3.coordinator.stores.sql_tombstones import PepperRow
from fedia3.errors import Conflict

ROWS_AT_ONCE = 1000
_OWN = PepperRow.__table__  # a new database has made one up for itself


def copy(source: str | URL, target: str | URL) -> int:
    """Copy all rows in one transaction; how many there were. The source is only read.

    Raises:
        Conflict: the target holds something; nothing was changed.
        BadInput: one of the two is no registry, or a newer fedia3 wrote it.
        BadSetting: one of the two cannot be opened.
    """
    with (
        closing(Database(source)) as old,
        closing(Database(target)) as new,
        old.reading() as reader,
        new.writing() as writer,
    ):
        _require_empty(writer)
        writer.execute(delete(PepperRow))
        return sum(_copy(table, reader, writer) for table in Table.metadata.sorted_tables)


def require_empty(target: str | URL) -> None:
    """Make sure that no registry was kept in this database before.

    Raises:
        Conflict: it holds something.
        BadSetting: it cannot be opened.
    """
    with closing(Database(target)) as database, database.reading() as reader:
        _require_empty(reader)


def _require_empty(connection: Connection) -> None:
    for table in Table.metadata.sorted_tables:
        if table is not _OWN and connection.execute(select(table).limit(1)).first() is not None:
            raise Conflict(
                f"the database {connection.engine.url.database} holds a registry already: its "
                f"table {table.name} has rows; name one that is empty"
            )


def _copy(table: SqlTable, reader: Connection, writer: Connection) -> int:
    copied = 0
    for rows in _rows(table, reader):
        writer.execute(insert(table), rows)
        copied += len(rows)
    counted = table.autoincrement_column
    if counted is not None and writer.dialect.name == "postgresql":
        # it counts on from where the copied numbers end; where there are none, nothing happens
        sequence = func.pg_get_serial_sequence(table.name, counted.name)
        writer.execute(select(func.setval(sequence, select(func.max(counted)).scalar_subquery())))
    return copied


def _rows(table: SqlTable, reader: Connection) -> Iterator[list[dict[str, object]]]:
    for rows in reader.execute(select(table)).mappings().partitions(ROWS_AT_ONCE):
        yield [{name: _kept(value) for name, value in row.items()} for row in rows]


def _kept(value: object) -> object:
    """The value itself; of a text from before NULs were refused, what PostgreSQL can keep."""
    return value.replace("\0", "?") if isinstance(value, str) else value
