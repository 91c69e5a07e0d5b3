"""What is left of erased users, in the registry's database; each call is part of a transaction.

Users, their lines and their idempotency keys are kept as HMACs under the registry's own pepper: who
has the database and a name can ask whether it was erased, nobody can read a name from it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

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
from sqlalchemy.orm import Mapped, mapped_column

from fedia3.coordinator.records import AdapterDraft, Owner, Tombstone
from fedia3.coordinator.store import erased_key, hidden, require_begun_after
from fedia3.coordinator.stores.engine import Table, findable, from_ms, to_ms
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
    revision: Mapped[int] = mapped_column(BigInteger)


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
            base=None if base is None else findable(base),
            erased_ms=to_ms(tombstone.erased_at),
            versions=tombstone.versions,
        )
    )


def bury_line(
    connection: Connection, owner: Owner, base: str, counters: "Counters", keys: Iterable[str]
) -> None:
    """Keep where a line's numbers go on, and refuse its keys from now on."""
    pepper = _pepper(connection)
    line = hidden(pepper, owner.name, base)
    connection.execute(
        insert(ErasedLineRow).values(
            line_hmac=line, next_version=counters.next_version, revision=counters.revision
        )
    )
    _refuse(connection, [hidden(pepper, owner.name, base, key) for key in keys])


class Counters(NamedTuple):
    """Where a line's numbers go on."""

    next_version: int = 1
    revision: int = 0


def erased_counters(connection: Connection, owner: Owner, base: str) -> Counters:
    """Where an erased line's numbers would go on; those of a new one where nothing was erased."""
    line = hidden(_pepper(connection), owner.name, base)
    query = select(ErasedLineRow.next_version, ErasedLineRow.revision)
    row = connection.execute(query.where(ErasedLineRow.line_hmac == line)).one_or_none()
    return Counters() if row is None else Counters(row.next_version, row.revision)


def exhumed_counters(connection: Connection, owner: Owner, base: str) -> Counters:
    """The same for an owner who comes back: the new line counts on by itself."""
    counters = erased_counters(connection, owner, base)
    line = hidden(_pepper(connection), owner.name, base)
    connection.execute(delete(ErasedLineRow).where(ErasedLineRow.line_hmac == line))
    return counters


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
    _refuse(connection, [row["key_hmac"] for row in buried.keys])
    bases: dict[bytes, list[str | None]] = {}
    for row in fresh:
        bases.setdefault(row["user_hmac"], []).append(row["base"])
    return bases


def adopt_lines(connection: Connection, buried: Buried) -> None:
    """Go on with the higher numbers of erased lines: they were given after this state."""
    given = {
        bytes(r["line_hmac"]): Counters(r["next_version"], r["revision"]) for r in buried.lines
    }
    for row in connection.execute(select(ErasedLineRow.__table__)).all():
        other = given.get(row.line_hmac, Counters())
        given[row.line_hmac] = Counters(
            max(row.next_version, other.next_version), max(row.revision, other.revision)
        )
    connection.execute(delete(ErasedLineRow))
    if given:
        rows = [{"line_hmac": line, **counters._asdict()} for line, counters in given.items()]
        connection.execute(insert(ErasedLineRow), rows)


def _refuse(connection: Connection, keys: Sequence[bytes]) -> None:
    """Keep the keys' HMACs, those that are kept already once; nobody else writes meanwhile."""
    known = {
        key
        for key in keys
        if connection.execute(select(ErasedKeyRow).where(ErasedKeyRow.key_hmac == key)).first()
    }
    if rows := [{"key_hmac": key} for key in dict.fromkeys(keys) if key not in known]:
        connection.execute(insert(ErasedKeyRow), rows)


def _pepper(connection: Connection) -> bytes:
    return connection.execute(select(PepperRow.pepper)).scalar_one()
