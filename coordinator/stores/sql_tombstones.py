"""What is left of erased users, in the registry's database; each call is part of a transaction.

Users, their lines and their idempotency keys are kept as HMACs under the registry's own pepper: who
has the database and a name can ask whether it was erased, nobody can read a name from it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Connection,
    LargeBinary,
    String,
    delete,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.orm import Mapped, mapped_column

from fedia3.coordinator.records import AdapterDraft, Owner, Tombstone
from fedia3.coordinator.store import erased_key, hidden, require_begun_after
from fedia3.coordinator.stores.engine import Table, from_ms, to_ms
from fedia3.errors import BadInput


class PepperRow(Table):
    """The secret of this registry's HMACs; one row, made with the table."""

    __tablename__ = "pepper"

    id: Mapped[int] = mapped_column(primary_key=True)
    pepper: Mapped[bytes] = mapped_column(LargeBinary)


class TombstoneRow(Table):
    """One erasure; what began before it is not published for this user any more."""

    __tablename__ = "tombstone"

    receipt: Mapped[str] = mapped_column(String(32), primary_key=True)
    user_hmac: Mapped[bytes] = mapped_column(LargeBinary, index=True)
    base: Mapped[str | None] = mapped_column(String(64))  # None: on all
    erased_ms: Mapped[int] = mapped_column(BigInteger)
    versions: Mapped[int]


class ErasedLineRow(Table):
    """Where an erased line's numbers go on, should its owner come back."""

    __tablename__ = "erased_line"

    line_hmac: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    next_version: Mapped[int]


class ErasedKeyRow(Table):
    """The idempotency key of an erased version; it is refused for ever."""

    __tablename__ = "erased_key"

    key_hmac: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)


def bury(connection: Connection, owner: Owner, tombstone: Tombstone, base: str | None) -> None:
    """Write down that a user was erased."""
    connection.execute(
        insert(TombstoneRow).values(
            receipt=tombstone.receipt,
            user_hmac=hidden(_pepper(connection), owner.name),
            base=base,
            erased_ms=to_ms(tombstone.erased_at),
            versions=tombstone.versions,
        )
    )


def bury_line(
    connection: Connection, owner: Owner, base: str, next_version: int, keys: Iterable[str]
) -> None:
    """Keep where a line's numbers go on, and refuse its keys from now on."""
    pepper = _pepper(connection)
    line = hidden(pepper, owner.name, base)
    connection.execute(insert(ErasedLineRow).values(line_hmac=line, next_version=next_version))
    if rows := [{"key_hmac": hidden(pepper, owner.name, base, key)} for key in keys]:
        connection.execute(upsert(ErasedKeyRow).on_conflict_do_nothing(), rows)


def exhumed_number(connection: Connection, owner: Owner, base: str) -> int:
    """The number an owner's new line begins with: 1, or behind what was erased."""
    line = hidden(_pepper(connection), owner.name, base)
    query = delete(ErasedLineRow).where(ErasedLineRow.line_hmac == line)
    found = connection.execute(query.returning(ErasedLineRow.next_version)).scalar_one_or_none()
    return found or 1


def require_not_erased(
    connection: Connection, draft: AdapterDraft, idem_key: str | None, began_at: datetime | None
) -> None:
    """Refuse what would bring erased versions back.

    Raises:
        Erased: the key named an erased version, or an erasure came after ``began_at``.
    """
    name, pepper = draft.owner.name, _pepper(connection)
    if idem_key is not None:
        key = hidden(pepper, name, draft.base, idem_key)
        if connection.execute(select(ErasedKeyRow).where(ErasedKeyRow.key_hmac == key)).first():
            raise erased_key(draft.owner)
    erased_ms = connection.execute(
        select(TombstoneRow.erased_ms)
        .where(
            TombstoneRow.user_hmac == hidden(pepper, name),
            or_(TombstoneRow.base.is_(None), TombstoneRow.base == draft.base),
        )
        .order_by(TombstoneRow.erased_ms.desc())
        .limit(1)
    ).scalar_one_or_none()
    if erased_ms is not None:
        require_begun_after(draft.owner, from_ms(erased_ms), began_at)


@dataclass(frozen=True)
class Buried:
    """Everything that is left of erased users in one registry; rows as they are stored."""

    pepper: bytes
    tombstones: Sequence[dict[str, Any]]
    lines: Sequence[dict[str, Any]]
    keys: Sequence[dict[str, Any]]


def dug_up(connection: Connection) -> Buried:
    """For another state of the same registry."""
    tables = (TombstoneRow.__table__, ErasedLineRow.__table__, ErasedKeyRow.__table__)
    rows = [[dict(row) for row in connection.execute(select(t)).mappings()] for t in tables]
    return Buried(_pepper(connection), *rows)


def adopt(connection: Connection, buried: Buried) -> Mapping[bytes, list[str | None]]:
    """Take over tombstones and keys; of those that are new here, the bases by user's HMAC.

    Raises:
        BadInput: they are another registry's.
    """
    known = set(connection.scalars(select(TombstoneRow.receipt)))
    if _pepper(connection) != buried.pepper:
        if known:
            raise BadInput(
                "these erasures are another registry's; name the one that the backup is of"
            )
        # This state is from before there were tombstones, and made up a pepper when it was opened.
        connection.execute(update(PepperRow).values(pepper=buried.pepper))
    fresh = [row for row in buried.tombstones if row["receipt"] not in known]
    if fresh:
        connection.execute(insert(TombstoneRow), fresh)
    if buried.keys:
        connection.execute(upsert(ErasedKeyRow).on_conflict_do_nothing(), buried.keys)
    bases: dict[bytes, list[str | None]] = {}
    for row in fresh:
        bases.setdefault(row["user_hmac"], []).append(row["base"])
    return bases


def adopt_lines(connection: Connection, buried: Buried) -> None:
    """Go on with the higher numbers of erased lines: they were given after this state."""
    given = {bytes(row["line_hmac"]): row["next_version"] for row in buried.lines}
    for row in connection.execute(select(ErasedLineRow.__table__)).all():
        given[row.line_hmac] = max(row.next_version, given.get(row.line_hmac, 1))
    connection.execute(delete(ErasedLineRow))
    if given:
        rows = [{"line_hmac": line, "next_version": number} for line, number in given.items()]
        connection.execute(insert(ErasedLineRow), rows)


def _pepper(connection: Connection) -> bytes:
    return connection.execute(select(PepperRow.pepper)).scalar_one()
