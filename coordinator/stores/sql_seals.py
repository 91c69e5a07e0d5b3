"""Seals on what never changes: a changed number in a sound page would otherwise pass for the truth.

SQLite keeps no checksums of its pages. The sha256 of every version, of every round with its people
and of the server state lies in a table of its own; a row without its seal was changed, a seal
without its row was left behind by a row that went away.
"""

import hashlib
import json
from collections.abc import Iterator

from sqlalchemy import Connection, LargeBinary, delete, func, insert, select
from sqlalchemy.orm import Mapped, mapped_column

from fedia3.coordinator.stores.engine import Table


class SealRow(Table):
    """The sha256 of one thing that never changes."""

    __tablename__ = "seal"

    sha256: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)


def seal_of(kind: str, values: list[object]) -> bytes:
    """What is sealed: the values as they are stored, in the order of their columns."""
    return hashlib.sha256(json.dumps([kind, *values]).encode()).digest()


def add_seal(connection: Connection, seal: bytes) -> None:
    """Seal something that was just written."""
    connection.execute(insert(SealRow).values(sha256=seal))


def break_seals(connection: Connection, seals: list[bytes]) -> None:
    """What they sealed goes away."""
    for seal in seals:
        connection.execute(delete(SealRow).where(SealRow.sha256 == seal))


def broken(connection: Connection, sealed: Iterator[tuple[str, bytes]]) -> Iterator[str]:
    """The names of what lacks its seal; at the end, how many seals have lost what they sealed."""
    count = 0
    for name, seal in sealed:
        count += 1
        if connection.execute(select(SealRow).where(SealRow.sha256 == seal)).first() is None:
            yield f"{name} was changed where it lies: its seal does not fit"
    seals = connection.execute(select(func.count()).select_from(SealRow)).scalar_one()
    if seals > count:
        yield f"{seals - count} sealed rows are gone"
