"""The store that lasts: what the registry remembers, in SQLAlchemy tables."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from hashlib import sha256
from itertools import groupby
from json import loads
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    ColumnElement,
    Connection,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    Row,
    Select,
    String,
    Text,
    UniqueConstraint,
    delete,
    exists,
    insert,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.orm import Mapped, aliased, mapped_column

from fedia3.coordinator.records import (
    AdapterDraft,
    AdapterRecord,
    AliasEvent,
    AliasMove,
    Contribution,
    Owner,
    OwnerKind,
    RoundCommit,
    RoundRecord,
    Tombstone,
    metrics_to_json,
)
from fedia3.coordinator.store import (
    checked_key,
    hidden,
    new_tombstone,
    next_event,
    no_alias,
    no_digest,
    no_version,
    require_next_round,
    require_no_alias,
    require_positive,
    require_same_bytes,
    require_user,
)
from fedia3.coordinator.stores import sql_seals, sql_tombstones
from fedia3.coordinator.stores.engine import (
    BY_CODE_POINT,
    Database,
    Table,
    findable,
    from_ms,
    retried,
    to_ms,
)


class AdapterRow(Table):
    """One owner's line of versions on one base; the counter makes numbers unique for ever."""

    __tablename__ = "adapter"
    __table_args__ = (UniqueConstraint("owner_kind", "owner_name", "base"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    owner_kind: Mapped[str] = mapped_column(String(16))
    owner_name: Mapped[str] = mapped_column(BY_CODE_POINT)  # "" for everyone: NULLs are not unique
    base: Mapped[str] = mapped_column(String(64))
    next_version: Mapped[int]
    revision: Mapped[int] = mapped_column(BigInteger, server_default="0")


class VersionRow(Table):
    """One published version; a trigger refuses every change."""

    __tablename__ = "adapter_version"
    __table_args__ = (
        UniqueConstraint("adapter_id", "idem_key"),
        Index(None, "digest", "adapter_id"),
    )

    adapter_id: Mapped[int] = mapped_column(
        ForeignKey("adapter.id", ondelete="RESTRICT"), primary_key=True
    )
    version: Mapped[int] = mapped_column(primary_key=True)
    form: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64))
    schema_digest: Mapped[str] = mapped_column(String(64))
    round_num: Mapped[int] = mapped_column(BigInteger)
    num_examples: Mapped[int] = mapped_column(BigInteger)
    metrics: Mapped[str] = mapped_column(Text)  # JSON
    parent: Mapped[str | None] = mapped_column(String(64))
    global_digest: Mapped[str | None] = mapped_column(String(64))
    created_ms: Mapped[int] = mapped_column(BigInteger)
    idem_key: Mapped[str | None] = mapped_column(String(128))


class YankRow(Table):
    """A version that only those are given who name it."""

    __tablename__ = "yank"
    __table_args__ = (
        ForeignKeyConstraint(
            ["adapter_id", "version"],
            ["adapter_version.adapter_id", "adapter_version.version"],
            ondelete="RESTRICT",
        ),
    )

    adapter_id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)


class AliasEventRow(Table):
    """One move of an alias, the newest says where it points; a trigger refuses every change."""

    __tablename__ = "alias_event"
    __table_args__ = (
        ForeignKeyConstraint(
            ["adapter_id", "version"],
            ["adapter_version.adapter_id", "adapter_version.version"],
            ondelete="RESTRICT",
        ),
    )

    adapter_id: Mapped[int] = mapped_column(
        ForeignKey("adapter.id", ondelete="RESTRICT"), primary_key=True
    )
    name: Mapped[str] = mapped_column(BY_CODE_POINT, primary_key=True)
    rev: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int | None]  # None: it points at nothing any more
    actor: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str] = mapped_column(Text)
    at_ms: Mapped[int] = mapped_column(BigInteger)


class RoundRow(Table):
    """One committed round and the global version it made; a trigger refuses every change."""

    __tablename__ = "round"
    __table_args__ = (
        ForeignKeyConstraint(
            ["adapter_id", "version"],
            ["adapter_version.adapter_id", "adapter_version.version"],
            ondelete="RESTRICT",
        ),
    )

    round_num: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    adapter_id: Mapped[int] = mapped_column(Integer)
    version: Mapped[int]
    metrics: Mapped[str] = mapped_column(Text)  # JSON
    committed_ms: Mapped[int] = mapped_column(BigInteger)


class ContributionRow(Table):
    """One client's part in one round; a trigger refuses every change."""

    __tablename__ = "contribution"

    round_num: Mapped[int] = mapped_column(
        ForeignKey("round.round_num", ondelete="RESTRICT"), primary_key=True
    )
    position: Mapped[int]  # in the order in which they were committed
    client: Mapped[str] = mapped_column(String(128), primary_key=True)
    verdict: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text)
    num_examples: Mapped[int] = mapped_column(BigInteger)
    norm: Mapped[float | None] = mapped_column(Double)
    metrics: Mapped[str] = mapped_column(Text)  # JSON


class StateRow(Table):
    """The server state of the last round; there is one row once there is a round."""

    __tablename__ = "server_state"

    round_num: Mapped[int] = mapped_column(
        ForeignKey("round.round_num", ondelete="RESTRICT"), primary_key=True
    )
    state: Mapped[bytes] = mapped_column(LargeBinary)


class SqlStore:
    """The store in a database; see :class:`fedia3.coordinator.store.Store`.

    Whoever writes writes about one owner, so an owner's numbers and keys are decided on one after
    another, and rounds, which are everyone's, as well. Publishes of two owners do not wait.

    Its errors are :class:`fedia3.coordinator.stores.engine.Database`'s.
    """

    def __init__(self, url: str | URL) -> None:
        self._database = Database(url)

    @classmethod
    def at(cls, path: Path) -> "SqlStore":
        """The store in this file, created where there is none."""
        return cls(Database.url_of(path))

    @retried
    def publish(
        self,
        draft: AdapterDraft,
        at: datetime,
        idem_key: str | None = None,
        began_at: datetime | None = None,
    ) -> AdapterRecord:
        """See :meth:`fedia3.coordinator.store.Store.publish`."""
        idem_key = checked_key(idem_key)
        with self._database.writing(str(draft.owner)) as connection:
            if idem_key is not None:
                published = _by_key(connection, draft, idem_key)
                if published is not None:
                    return require_same_bytes(published, draft)
            sql_tombstones.require_not_erased(connection, draft, idem_key, began_at)
            return _append(connection, draft, at, idem_key)[1]

    @retried
    def commit_round(self, commit: RoundCommit, at: datetime) -> AdapterRecord:
        """See :meth:`fedia3.coordinator.store.Store.commit_round`."""
        with self._database.writing(str(commit.draft.owner)) as connection:
            require_next_round(_latest_round(connection), commit)
            adapter_id, record = _append(connection, commit.draft, at, idem_key=None)
            connection.execute(
                insert(RoundRow).values(
                    round_num=commit.round_num,
                    adapter_id=adapter_id,
                    version=record.version,
                    metrics=metrics_to_json(commit.metrics),
                    committed_ms=to_ms(at),
                )
            )
            if commit.contributions:
                connection.execute(insert(ContributionRow), _contribution_values(commit))
            sql_seals.break_seals(connection, [seal for _name, seal in state_seals(connection)])
            connection.execute(delete(StateRow))
            connection.execute(
                insert(StateRow).values(round_num=commit.round_num, state=commit.state)
            )
            for _name, seal in (
                *round_seals(connection, RoundRow.round_num == commit.round_num),
                *state_seals(connection),
            ):
                sql_seals.add_seal(connection, seal)
            return record

    def latest_round(self) -> RoundRecord | None:
        """See :meth:`fedia3.coordinator.store.Store.latest_round`."""
        with self._database.reading() as connection:
            return _latest_round(connection)

    def server_state(self) -> bytes | None:
        """See :meth:`fedia3.coordinator.store.Store.server_state`."""
        with self._database.reading() as connection:
            return connection.execute(select(StateRow.state)).scalar_one_or_none()

    def rounds(self) -> tuple[RoundRecord, ...]:
        """See :meth:`fedia3.coordinator.store.Store.rounds`."""
        with self._database.reading() as connection:
            rows = connection.execute(_SELECT_ROUNDS.order_by(RoundRow.round_num)).all()
            return _round_records(rows, connection.execute(_SELECT_CONTRIBUTIONS).all())

    def find(self, owner: Owner, base: str, version: int | None = None) -> AdapterRecord:
        """See :meth:`fedia3.coordinator.store.Store.find`."""
        with self._database.reading() as connection:
            return _find(connection, owner, base, version)

    def find_digest(self, owner: Owner, base: str, digest: str) -> AdapterRecord:
        """See :meth:`fedia3.coordinator.store.Store.find_digest`."""
        query = _select_versions(owner, base).where(VersionRow.digest == findable(digest)).limit(1)
        with self._database.reading() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise no_digest(owner, base, digest)
        return _adapter_record(row)

    def versions(
        self, owner: Owner, base: str, before: int | None = None, limit: int | None = None
    ) -> tuple[AdapterRecord, ...]:
        """See :meth:`fedia3.coordinator.store.Store.versions`."""
        query = _select_versions(owner, base).limit(limit)
        if before is not None:
            query = query.where(VersionRow.version < min(before, 2**31 - 1))
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return tuple(_adapter_record(row) for row in rows)

    @retried
    def erase(
        self, owner: Owner, base: str | None, at: datetime, remove: Callable[[str], None]
    ) -> Tombstone:
        """See :meth:`fedia3.coordinator.store.Store.erase`."""
        require_user(owner)
        with self._database.writing() as connection:
            for digest in _unshared(connection, owner, base):
                remove(digest)
            versions = _erase_lines(connection, owner, base)
            tombstone = new_tombstone(at, versions)
            sql_tombstones.bury(connection, owner, tombstone, base)
        return replace(tombstone, traceless=self._database.empty_log())

    def accepted_from(self, clients: Collection[str]) -> tuple[int, ...]:
        """See :meth:`fedia3.coordinator.store.Store.accepted_from`."""
        query = (
            select(RoundRow.version)
            .join(ContributionRow, ContributionRow.round_num == RoundRow.round_num)
            .where(ContributionRow.client.in_(list(clients)), ContributionRow.verdict == "accepted")
            .distinct()
            .order_by(RoundRow.version)
        )
        with self._database.reading() as connection:
            return tuple(connection.scalars(query))

    def owners(
        self, kind: OwnerKind, after: str | None = None, limit: int = 100
    ) -> tuple[Owner, ...]:
        """See :meth:`fedia3.coordinator.store.Store.owners`."""
        require_positive(limit)
        query = (
            select(AdapterRow.owner_name)
            .where(AdapterRow.owner_kind == kind, _HAS_VERSIONS)
            .distinct()
        )
        if after is not None:
            query = query.where(AdapterRow.owner_name > after)
        with self._database.reading() as connection:
            names = connection.scalars(query.order_by(AdapterRow.owner_name).limit(limit)).all()
        return tuple(Owner(kind, name) for name in names)

    def bases(self, owner: Owner) -> tuple[str, ...]:
        """See :meth:`fedia3.coordinator.store.Store.bases`."""
        query = (
            select(AdapterRow.base)
            .where(
                AdapterRow.owner_kind == owner.kind,
                AdapterRow.owner_name == owner.name,
                _HAS_VERSIONS,
            )
            .order_by(AdapterRow.base)
        )
        with self._database.reading() as connection:
            return tuple(connection.scalars(query))

    def revision(self, owner: Owner, base: str) -> int:
        """See :meth:`fedia3.coordinator.store.Store.revision`."""
        query = select(AdapterRow.revision).where(*_is_line(owner, base))
        with self._database.reading() as connection:
            revision = connection.execute(query).scalar_one_or_none()
            if revision is None:
                revision = sql_tombstones.erased_counters(connection, owner, base).revision
            return revision

    @retried
    def yank(self, owner: Owner, base: str, version: int) -> None:
        """See :meth:`fedia3.coordinator.store.Store.yank`."""
        with self._database.writing(str(owner)) as connection:
            adapter_id = _line_id(connection, owner, base)
            record = _find(connection, owner, base, version)
            if not record.yanked:
                require_no_alias(record, _current_aliases(connection, owner, base))
                connection.execute(
                    insert(YankRow).values(adapter_id=adapter_id, version=record.version)
                )
                _note_change(connection, adapter_id)

    @retried
    def unyank(self, owner: Owner, base: str, version: int) -> None:
        """See :meth:`fedia3.coordinator.store.Store.unyank`."""
        with self._database.writing(str(owner)) as connection:
            adapter_id = _line_id(connection, owner, base)
            record = _find(connection, owner, base, version)
            if record.yanked:
                connection.execute(
                    delete(YankRow).where(
                        YankRow.adapter_id == adapter_id, YankRow.version == record.version
                    )
                )
                _note_change(connection, adapter_id)

    @retried
    def move_alias(
        self, move: AliasMove, at: datetime, expected_rev: int | None = None
    ) -> AliasEvent:
        """See :meth:`fedia3.coordinator.store.Store.move_alias`."""
        owner, base, record = move.owner, move.base, None
        with self._database.writing(str(owner)) as connection:
            adapter_id = _line_id(connection, owner, base)
            if move.version is not None:
                record = _find(connection, owner, base, move.version)
            events = _select_events(owner, base, move.name).limit(1)
            row = connection.execute(events).one_or_none()
            last = None if row is None else _alias_event(row)
            event = next_event(last, move, at, expected_rev, record)
            if event is not last:
                connection.execute(
                    insert(AliasEventRow).values(
                        adapter_id=adapter_id,
                        name=event.name,
                        rev=event.rev,
                        version=event.version,
                        actor=event.actor,
                        reason=event.reason,
                        at_ms=to_ms(event.at),
                    )
                )
                _note_change(connection, adapter_id)
            return event

    def alias(self, owner: Owner, base: str, name: str, at: datetime | None = None) -> AliasEvent:
        """See :meth:`fedia3.coordinator.store.Store.alias`."""
        query = _select_events(owner, base, name).limit(1)
        if at is not None:
            query = query.where(AliasEventRow.at_ms <= to_ms(at))
        with self._database.reading() as connection:
            row = connection.execute(query).one_or_none()
        if row is None or row.version is None:
            raise no_alias(owner, base, name)
        return _alias_event(row)

    def aliases(self, owner: Owner, base: str) -> tuple[AliasEvent, ...]:
        """See :meth:`fedia3.coordinator.store.Store.aliases`."""
        with self._database.reading() as connection:
            return _current_aliases(connection, owner, base)

    def alias_events(
        self,
        owner: Owner,
        base: str,
        name: str,
        before: int | None = None,
        limit: int | None = None,
    ) -> tuple[AliasEvent, ...]:
        """See :meth:`fedia3.coordinator.store.Store.alias_events`."""
        query = _select_events(owner, base, name).limit(limit)
        if before is not None:
            query = query.where(AliasEventRow.rev < min(before, 2**31 - 1))
        with self._database.reading() as connection:
            return tuple(_alias_event(row) for row in connection.execute(query))

    def every_version(
        self, after: AdapterRecord | None = None, limit: int = 100
    ) -> tuple[AdapterRecord, ...]:
        """See :meth:`fedia3.coordinator.store.Store.every_version`."""
        require_positive(limit)
        place = (
            VersionRow.digest,
            AdapterRow.owner_kind,
            AdapterRow.owner_name,
            AdapterRow.base,
            VersionRow.version,
        )
        query = _SELECT_VERSIONS.order_by(*place).limit(limit)
        if after is not None:
            owner = after.owner
            behind = (after.digest, owner.kind, owner.name, after.base, after.version)
            query = query.where(VersionRow.digest >= after.digest, tuple_(*place) > tuple_(*behind))
        with self._database.reading() as connection:
            return tuple(_adapter_record(row) for row in connection.execute(query))

    def faults(self) -> Iterator[str]:
        """See :meth:`fedia3.coordinator.store.Store.faults`."""
        from fedia3.coordinator.stores.sql_faults import (  # noqa: PLC0415 it needs these tables
            faults,
        )

        with self._database.reading() as connection:
            yield from faults(connection)

    def unused(self, digests: Collection[str]) -> frozenset[str]:
        """See :meth:`fedia3.coordinator.store.Store.unused`."""
        with self._database.reading() as connection:
            return _unused(connection, digests)

    def remove_unused(self, digests: Collection[str], remove: Callable[[str], None]) -> None:
        """See :meth:`fedia3.coordinator.store.Store.remove_unused`."""
        with self._database.writing() as connection:
            for digest in _unused(connection, digests):
                remove(digest)

    def copy_to(self, path: Path) -> None:
        """Write the database as it is now to a new file.

        Raises:
            StorageFailed: the disk refused.
        """
        self._database.copy_to(path)

    def replay_erasures(self, known: "SqlStore", remove: Callable[[str], None]) -> None:
        """Erase whom another state of this registry knows as erased, as :meth:`erase` would.

        Raises:
            BadInput: it is no state of this registry.
        """
        with known._database.reading() as theirs:
            buried = sql_tombstones.dug_up(theirs)
        with self._database.writing() as connection:
            fresh = sql_tombstones.adopt(connection, buried)
            users = select(AdapterRow.owner_name).where(AdapterRow.owner_kind == "user").distinct()
            for name in connection.scalars(users).all():
                owner = Owner.user(name)
                for base in fresh.get(hidden(buried.pepper, name), ()):
                    for digest in _unshared(connection, owner, base):
                        remove(digest)
                    _erase_lines(connection, owner, base)
            sql_tombstones.adopt_lines(connection, buried)
        self._database.empty_log()

    def close(self) -> None:
        """See :meth:`fedia3.coordinator.store.Store.close`."""
        self._database.close()


def _append(
    connection: Connection, draft: AdapterDraft, at: datetime, idem_key: str | None
) -> tuple[int, AdapterRecord]:
    """Insert the draft as its owner's next version; with it comes the id of the owner's line."""
    adapter_id, version = _take_version(connection, draft.owner, draft.base)
    if draft.parent is not None:
        _require_parent(connection, adapter_id, draft)
    connection.execute(
        insert(VersionRow).values(
            adapter_id=adapter_id,
            version=version,
            form=draft.form,
            digest=draft.digest,
            schema_digest=draft.schema_digest,
            round_num=draft.round_num,
            num_examples=draft.num_examples,
            metrics=metrics_to_json(draft.metrics),
            parent=draft.parent,
            global_digest=draft.global_digest,
            created_ms=to_ms(at),
            idem_key=idem_key,
        )
    )
    (seal,) = version_seals(connection, VersionRow.version == version, adapter_id)
    sql_seals.add_seal(connection, seal[1])
    return adapter_id, AdapterRecord(**vars(draft), version=version, created_at=at)


def version_seals(
    connection: Connection, which: ColumnElement[bool], adapter_id: int | None = None
) -> Iterator[tuple[str, bytes]]:
    """Versions and what seals each, of one line or of all."""
    line, version = AdapterRow, VersionRow
    query = select(
        line.owner_kind, line.owner_name, line.base,
        version.version, version.form, version.digest, version.schema_digest, version.round_num,
        version.num_examples, version.metrics, version.parent, version.global_digest,
        version.created_ms, version.idem_key,
    ).join(version, version.adapter_id == line.id).where(which)  # fmt: skip
    if adapter_id is not None:
        query = query.where(line.id == adapter_id)
    for row in connection.execute(query.execution_options(yield_per=200)):
        owner = row.owner_name or "everyone"
        name = f"version {row.version} of {owner!r} on base {row.base[:12]}"
        yield name, sql_seals.seal_of("version", list(row))


def round_seals(connection: Connection, which: ColumnElement[bool]) -> Iterator[tuple[str, bytes]]:
    """Rounds and what seals each, with its people."""
    rounds = select(
        RoundRow.round_num, RoundRow.version, RoundRow.metrics, RoundRow.committed_ms
    ).where(which)
    for row in connection.execute(rounds.execution_options(yield_per=200)):
        people = connection.execute(
            select(
                ContributionRow.position, ContributionRow.client, ContributionRow.verdict,
                ContributionRow.reason, ContributionRow.num_examples, ContributionRow.norm,
                ContributionRow.metrics,
            )
            .where(ContributionRow.round_num == row.round_num)
            .order_by(ContributionRow.position)
        )  # fmt: skip
        values = [*row, [list(person) for person in people]]
        yield f"round {row.round_num}", sql_seals.seal_of("round", values)


def state_seals(connection: Connection) -> Iterator[tuple[str, bytes]]:
    """The server state, once there is one, and what seals it."""
    for round_num, state in connection.execute(select(StateRow.round_num, StateRow.state)).all():
        values = [round_num, sha256(state).hexdigest()]
        yield "the server state", sql_seals.seal_of("state", values)


def _take_version(connection: Connection, owner: Owner, base: str) -> tuple[int, int]:
    """The id of the owner's line on this base, and its next free version number."""
    taken = connection.execute(
        update(AdapterRow)
        .where(*_is_line(owner, base))
        .values(next_version=AdapterRow.next_version + 1, revision=AdapterRow.revision + 1)
        .returning(AdapterRow.id, AdapterRow.next_version)
    ).one_or_none()
    if taken is not None:
        return taken.id, taken.next_version - 1
    first, revision = sql_tombstones.exhumed_counters(connection, owner, base)
    new_id = connection.execute(
        insert(AdapterRow)
        .values(
            owner_kind=owner.kind,
            owner_name=owner.name,
            base=base,
            next_version=first + 1,
            revision=revision + 1,
        )
        .returning(AdapterRow.id)
    ).scalar_one()
    return new_id, first


def _line_id(connection: Connection, owner: Owner, base: str) -> int:
    """The id of the owner's line on this base."""
    query = select(AdapterRow.id).where(*_is_line(owner, base))
    adapter_id = connection.execute(query).scalar_one_or_none()
    if adapter_id is None:
        raise no_version(owner, base, None)
    return adapter_id


def _note_change(connection: Connection, adapter_id: int) -> None:
    connection.execute(
        update(AdapterRow)
        .where(AdapterRow.id == adapter_id)
        .values(revision=AdapterRow.revision + 1)
    )


def _find(connection: Connection, owner: Owner, base: str, version: int | None) -> AdapterRecord:
    query = _select_versions(owner, base).limit(1)
    if version is None:
        query = query.where(YankRow.version.is_(None))
    else:
        # Larger numbers do not fit a database's integer, nor a version.
        query = query.where(VersionRow.version == (version if 0 < version < 2**31 else 0))
    row = connection.execute(query).one_or_none()
    if row is None:
        raise no_version(owner, base, version)
    return _adapter_record(row)


def _current_aliases(connection: Connection, owner: Owner, base: str) -> tuple[AliasEvent, ...]:
    later = aliased(AliasEventRow)
    is_newest = ~exists().where(
        later.adapter_id == AliasEventRow.adapter_id,
        later.name == AliasEventRow.name,
        later.rev > AliasEventRow.rev,
    )
    query = _select_events(owner, base).where(is_newest, AliasEventRow.version.is_not(None))
    return tuple(_alias_event(row) for row in connection.execute(query))


def _require_parent(connection: Connection, adapter_id: int, draft: AdapterDraft) -> None:
    known = connection.execute(
        select(VersionRow.version)
        .where(VersionRow.adapter_id == adapter_id, VersionRow.digest == draft.parent)
        .limit(1)
    ).one_or_none()
    if known is None:
        raise no_digest(draft.owner, draft.base, draft.parent or "")


def _by_key(connection: Connection, draft: AdapterDraft, idem_key: str) -> AdapterRecord | None:
    query = _select_versions(draft.owner, draft.base).where(VersionRow.idem_key == idem_key)
    row = connection.execute(query).one_or_none()
    return None if row is None else _adapter_record(row)


def _unused(connection: Connection, digests: Collection[str]) -> frozenset[str]:
    used = connection.scalars(
        select(VersionRow.digest).where(VersionRow.digest.in_(list(digests))).distinct()
    )
    return frozenset(digests) - set(used)


def _latest_round(connection: Connection) -> RoundRecord | None:
    row = connection.execute(
        _SELECT_ROUNDS.order_by(RoundRow.round_num.desc()).limit(1)
    ).one_or_none()
    if row is None:
        return None
    query = _SELECT_CONTRIBUTIONS.where(ContributionRow.round_num == row.round_num)
    return _round_records([row], connection.execute(query).all())[0]


def _unshared(connection: Connection, owner: Owner, base: str | None) -> frozenset[str]:
    """Digests that versions of this owner, on one base or on all, have and no others have."""
    mine = _line_ids(owner, base)
    other = aliased(VersionRow)
    shared = select(other.digest).where(
        other.digest == VersionRow.digest, other.adapter_id.not_in(mine)
    )
    query = select(VersionRow.digest).where(VersionRow.adapter_id.in_(mine), ~shared.exists())
    return frozenset(connection.scalars(query))


def _erase_lines(connection: Connection, owner: Owner, base: str | None) -> int:
    """Delete the owner's versions and the lines that name them; how many versions there were."""
    lines = AdapterRow.id.in_(_line_ids(owner, base))
    versions = 0
    for row in connection.execute(select(AdapterRow.__table__).where(lines)).all():
        of_line = VersionRow.adapter_id == row.id
        keys = connection.scalars(
            select(VersionRow.idem_key).where(of_line, VersionRow.idem_key.is_not(None))
        ).all()
        counters = sql_tombstones.Counters(row.next_version, row.revision + 1)
        sql_tombstones.bury_line(
            connection, owner, row.base, counters, [key for key in keys if key is not None]
        )
        for table in (YankRow, AliasEventRow):
            connection.execute(delete(table).where(table.adapter_id == row.id))
        seals = [seal for _name, seal in version_seals(connection, true(), row.id)]
        sql_seals.break_seals(connection, seals)
        versions += connection.execute(delete(VersionRow).where(of_line)).rowcount
        connection.execute(delete(AdapterRow).where(AdapterRow.id == row.id))
    return versions


def _line_ids(owner: Owner, base: str | None) -> Select[int]:
    """The owner's lines, on one base or on all."""
    query = select(AdapterRow.id).where(
        AdapterRow.owner_kind == owner.kind, AdapterRow.owner_name == owner.name
    )
    return query if base is None else query.where(AdapterRow.base == findable(base))


def _is_line(owner: Owner, base: str) -> tuple[Any, ...]:  # Any: SQLAlchemy's own conditions
    return (
        AdapterRow.owner_kind == owner.kind,
        AdapterRow.owner_name == owner.name,
        AdapterRow.base == findable(base),
    )


def _select_versions(owner: Owner, base: str) -> Select[Any]:  # Any: rows are read by name
    return _SELECT_VERSIONS.where(*_is_line(owner, base)).order_by(VersionRow.version.desc())


def _select_events(owner: Owner, base: str, name: str | None = None) -> Select[Any]:  # as above
    """By name, each alias's newest first."""
    query = (
        select(
            AdapterRow.owner_kind, AdapterRow.owner_name, AdapterRow.base, AliasEventRow.__table__
        )
        .join(AliasEventRow, AliasEventRow.adapter_id == AdapterRow.id)
        .where(*_is_line(owner, base))
        .order_by(AliasEventRow.name, AliasEventRow.rev.desc())
    )
    return query if name is None else query.where(AliasEventRow.name == findable(name))


_HAS_VERSIONS = select(VersionRow.version).where(VersionRow.adapter_id == AdapterRow.id).exists()
_SELECT_VERSIONS = (
    select(
        AdapterRow.owner_kind,
        AdapterRow.owner_name,
        AdapterRow.base,
        VersionRow.__table__,
        YankRow.version.is_not(None).label("yanked"),
    )
    .join(VersionRow, VersionRow.adapter_id == AdapterRow.id)
    .outerjoin(
        YankRow,
        (YankRow.adapter_id == VersionRow.adapter_id) & (YankRow.version == VersionRow.version),
    )
)
_SELECT_ROUNDS = (
    select(RoundRow.__table__, AdapterRow.base, VersionRow.digest)
    .join(
        VersionRow,
        (VersionRow.adapter_id == RoundRow.adapter_id) & (VersionRow.version == RoundRow.version),
    )
    .join(AdapterRow, AdapterRow.id == RoundRow.adapter_id)
)
_SELECT_CONTRIBUTIONS = select(ContributionRow.__table__).order_by(
    ContributionRow.round_num, ContributionRow.position
)


def _adapter_record(row: Row[Any]) -> AdapterRecord:  # Any: rows are read by name
    return AdapterRecord(
        owner=Owner(row.owner_kind, row.owner_name),
        form=row.form,
        digest=row.digest,
        schema_digest=row.schema_digest,
        base=row.base,
        round_num=row.round_num,
        num_examples=row.num_examples,
        metrics=loads(row.metrics),
        parent=row.parent,
        global_digest=row.global_digest,
        version=row.version,
        created_at=from_ms(row.created_ms),
        yanked=bool(row.yanked),
    )


def _alias_event(row: Row[Any]) -> AliasEvent:  # Any: rows are read by name
    return AliasEvent(
        owner=Owner(row.owner_kind, row.owner_name),
        base=row.base,
        name=row.name,
        version=row.version,
        actor=row.actor,
        reason=row.reason,
        rev=row.rev,
        at=from_ms(row.at_ms),
    )


def _round_records(
    rounds: Sequence[Row[Any]],  # Any: rows are read by name
    contributions: Sequence[Row[Any]],
) -> tuple[RoundRecord, ...]:
    """Rounds with their contributions, which come ordered by round and position."""
    by_round = {
        round_num: tuple(_contribution(row) for row in rows)
        for round_num, rows in groupby(contributions, lambda row: row.round_num)
    }
    return tuple(
        RoundRecord(
            round_num=row.round_num,
            base=row.base,
            version=row.version,
            digest=row.digest,
            contributions=by_round.get(row.round_num, ()),
            metrics=loads(row.metrics),
            committed_at=from_ms(row.committed_ms),
        )
        for row in rounds
    )


def _contribution(row: Row[Any]) -> Contribution:  # Any: rows are read by name
    return Contribution(
        client=row.client,
        verdict=row.verdict,
        reason=row.reason,
        num_examples=row.num_examples,
        norm=row.norm,
        metrics=loads(row.metrics),
    )


def _contribution_values(commit: RoundCommit) -> list[dict[str, object]]:
    return [
        {
            "round_num": commit.round_num,
            "position": position,
            "client": contribution.client,
            "verdict": contribution.verdict,
            "reason": contribution.reason,
            "num_examples": contribution.num_examples,
            "norm": contribution.norm,
            "metrics": metrics_to_json(contribution.metrics),
        }
        for position, contribution in enumerate(commit.contributions)
    ]
