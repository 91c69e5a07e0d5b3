"""What a registry's database says of its own health: each fault a sentence."""

from collections.abc import Iterator
from itertools import chain

from sqlalchemy import Connection, func, select, true

from fedia3.coordinator.stores.sql import (
    AdapterRow,
    RoundRow,
    StateRow,
    VersionRow,
    round_seals,
    state_seals,
    version_seals,
)
from fedia3.coordinator.stores.sql_seals import broken


def faults(connection: Connection) -> Iterator[str]:
    """Everything that is wrong with pages, references, counters and rounds."""
    if connection.dialect.name == "sqlite":
        yield from _of_the_file(connection)
    yield from _counters(connection)
    yield from _rounds(connection)
    sealed = (
        version_seals(connection, true()), round_seals(connection, true()), state_seals(connection)
    )  # fmt: skip
    yield from broken(connection, chain(*sealed))


def _of_the_file(connection: Connection) -> Iterator[str]:
    for (said,) in connection.exec_driver_sql("PRAGMA integrity_check"):
        if said != "ok":
            yield f"the database is damaged: {said}"
    for table, row, parent, _key in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        yield f"row {row} of table {table} refers to nothing in {parent}"


def _counters(connection: Connection) -> Iterator[str]:
    highest = func.max(VersionRow.version)
    query = (
        select(AdapterRow.owner_kind, AdapterRow.owner_name, AdapterRow.next_version, highest)
        .join(VersionRow, VersionRow.adapter_id == AdapterRow.id)
        .group_by(AdapterRow.id)
        .having(highest >= AdapterRow.next_version)
    )
    for kind, name, following, top in connection.execute(query):
        yield f"the next version of {kind} {name!r} would be {following}, but {top} is there"


def _rounds(connection: Connection) -> Iterator[str]:
    count, first, last = connection.execute(
        select(func.count(), func.min(RoundRow.round_num), func.max(RoundRow.round_num))
    ).one()
    if count and last - first + 1 != count:
        yield f"{last - first + 1 - count} of the rounds {first} … {last} are missing"
    state = connection.scalars(select(StateRow.round_num)).all()
    if list(state) != ([] if last is None else [last]):
        yield f"the server state is of rounds {list(state)}, expected of the last one, {last}"
    made_elsewhere = (
        select(RoundRow.round_num, VersionRow.round_num, AdapterRow.owner_kind)
        .join(
            VersionRow,
            (VersionRow.adapter_id == RoundRow.adapter_id)
            & (VersionRow.version == RoundRow.version),
        )
        .join(AdapterRow, AdapterRow.id == RoundRow.adapter_id)
        .where((VersionRow.round_num != RoundRow.round_num) | (AdapterRow.owner_kind != "global"))
    )
    for round_num, said, kind in connection.execute(made_elsewhere):
        yield f"round {round_num} names a {kind} version that says it is of round {said}"
