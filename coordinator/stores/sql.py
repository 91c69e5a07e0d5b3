"""The store that lasts: SQLAlchemy tables, on SQLite.

SQLite is used the way that loses nothing: a write-ahead log flushed at every commit, writers that
take the write lock before they read (a transaction that reads first and then writes fails under
load, whatever the busy timeout), and readers on connections that cannot write.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import groupby
from json import loads
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    Connection,
    Double,
    Engine,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    Select,
    String,
    Text,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    insert,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool, QueuePool

from fedia3.coordinator.migrations import migrate
from fedia3.coordinator.records import (
    AdapterDraft,
    AdapterRecord,
    Contribution,
    Owner,
    OwnerKind,
    RoundCommit,
    RoundRecord,
    metrics_to_json,
)
from fedia3.coordinator.store import (
    no_digest,
    no_version,
    require_next_round,
    require_positive,
    require_same_bytes,
)
from fedia3.errors import BadInput, BadSetting, Conflict, Corrupt, Fedia3Error, StorageFailed

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)

# The timeout comes first: the statements after it may have to wait for another process.
_WAIT = "PRAGMA busy_timeout = 5000"
_DURABLE = ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL")
_WRITER = (_WAIT, *_DURABLE, "PRAGMA foreign_keys = ON")
_READER = (_WAIT, "PRAGMA query_only = ON")
_MIGRATOR = (_WAIT, *_DURABLE, "PRAGMA foreign_keys = OFF")


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


class AdapterRow(Table):
    """One owner's line of versions on one base; the counter makes numbers unique for ever."""

    __tablename__ = "adapter"
    __table_args__ = (UniqueConstraint("owner_kind", "owner_name", "base"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    owner_kind: Mapped[str] = mapped_column(String(16))
    owner_name: Mapped[str] = mapped_column(String(128))  # "" for everyone: NULLs are not unique
    base: Mapped[str] = mapped_column(String(64))
    next_version: Mapped[int]


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

    Opening creates the tables, or brings an older schema up to date.

    Raises:
        BadSetting: the URL is not SQLite's, or the file cannot be opened.
        BadInput: the file is no registry, or a newer fedia3 wrote it.
        Conflict: another process kept the write lock for five seconds (any call may raise this).
        Corrupt: the database is damaged (any call may raise this).
    """

    def __init__(self, url: str | URL) -> None:
        self._url = make_url(url)
        if self._url.get_backend_name() != "sqlite" or not self._url.database:
            raise BadSetting(
                f"a registry is kept in an SQLite file, got {self._url.render_as_string()}"
            )
        self._migrate()
        # One writing connection: this process's writers queue here instead of polling SQLite's
        # lock, which serves them in no order.
        self._writer = _engine(self._url, _WRITER, "BEGIN IMMEDIATE", size=1)
        self._reader = _engine(self._url, _READER, "BEGIN", size=8)

    @classmethod
    def at(cls, path: Path) -> "SqlStore":
        """The store in this file, created where there is none."""
        return cls(URL.create("sqlite", database=str(path)))

    def publish(
        self, draft: AdapterDraft, at: datetime, idem_key: str | None = None
    ) -> AdapterRecord:
        """See :meth:`fedia3.coordinator.store.Store.publish`."""
        with self._writing() as connection:
            if idem_key is not None:
                published = _by_key(connection, draft, idem_key)
                if published is not None:
                    return require_same_bytes(published, draft)
            return _append(connection, draft, at, idem_key)[1]

    def commit_round(self, commit: RoundCommit, at: datetime) -> AdapterRecord:
        """See :meth:`fedia3.coordinator.store.Store.commit_round`."""
        with self._writing() as connection:
            require_next_round(_latest_round(connection), commit)
            adapter_id, record = _append(connection, commit.draft, at, idem_key=None)
            connection.execute(
                insert(RoundRow).values(
                    round_num=commit.round_num,
                    adapter_id=adapter_id,
                    version=record.version,
                    metrics=metrics_to_json(commit.metrics),
                    committed_ms=_to_ms(at),
                )
            )
            if commit.contributions:
                connection.execute(insert(ContributionRow), _contribution_values(commit))
            connection.execute(delete(StateRow))
            connection.execute(
                insert(StateRow).values(round_num=commit.round_num, state=commit.state)
            )
            return record

    def latest_round(self) -> RoundRecord | None:
        """See :meth:`fedia3.coordinator.store.Store.latest_round`."""
        with self._reading() as connection:
            return _latest_round(connection)

    def server_state(self) -> bytes | None:
        """See :meth:`fedia3.coordinator.store.Store.server_state`."""
        with self._reading() as connection:
            return connection.execute(select(StateRow.state)).scalar_one_or_none()

    def rounds(self) -> tuple[RoundRecord, ...]:
        """See :meth:`fedia3.coordinator.store.Store.rounds`."""
        with self._reading() as connection:
            rows = connection.execute(_SELECT_ROUNDS.order_by(RoundRow.round_num)).all()
            return _round_records(rows, connection.execute(_SELECT_CONTRIBUTIONS).all())

    def find(self, owner: Owner, base: str, version: int | None = None) -> AdapterRecord:
        """See :meth:`fedia3.coordinator.store.Store.find`."""
        query = _select_versions(owner, base).limit(1)
        if version is not None:
            # Larger numbers do not fit a database's integer, nor a version.
            query = query.where(VersionRow.version == (version if 0 < version < 2**31 else 0))
        with self._reading() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise no_version(owner, base, version)
        return _adapter_record(row)

    def find_digest(self, owner: Owner, base: str, digest: str) -> AdapterRecord:
        """See :meth:`fedia3.coordinator.store.Store.find_digest`."""
        query = _select_versions(owner, base).where(VersionRow.digest == digest).limit(1)
        with self._reading() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise no_digest(owner, base, digest)
        return _adapter_record(row)

    def versions(self, owner: Owner, base: str) -> tuple[AdapterRecord, ...]:
        """See :meth:`fedia3.coordinator.store.Store.versions`."""
        with self._reading() as connection:
            rows = connection.execute(_select_versions(owner, base)).all()
        return tuple(_adapter_record(row) for row in rows)

    def owners(
        self, kind: OwnerKind, after: str | None = None, limit: int = 100
    ) -> tuple[Owner, ...]:
        """See :meth:`fedia3.coordinator.store.Store.owners`."""
        require_positive(limit)
        query = select(AdapterRow.owner_name).where(AdapterRow.owner_kind == kind).distinct()
        if after is not None:
            query = query.where(AdapterRow.owner_name > after)
        with self._reading() as connection:
            names = connection.scalars(query.order_by(AdapterRow.owner_name).limit(limit)).all()
        return tuple(Owner(kind, name) for name in names)

    def close(self) -> None:
        """See :meth:`fedia3.coordinator.store.Store.close`."""
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

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with _translated(self._url), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with _translated(self._url), self._reader.begin() as connection:
            yield connection


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
            created_ms=_to_ms(at),
            idem_key=idem_key,
        )
    )
    return adapter_id, AdapterRecord(**vars(draft), version=version, created_at=at)


def _take_version(connection: Connection, owner: Owner, base: str) -> tuple[int, int]:
    """The id of the owner's line on this base, and its next free version number."""
    taken = connection.execute(
        update(AdapterRow)
        .where(*_is_line(owner, base))
        .values(next_version=AdapterRow.next_version + 1)
        .returning(AdapterRow.id, AdapterRow.next_version)
    ).one_or_none()
    if taken is not None:
        return taken.id, taken.next_version - 1
    new_id = connection.execute(
        insert(AdapterRow)
        .values(owner_kind=owner.kind, owner_name=owner.name, base=base, next_version=2)
        .returning(AdapterRow.id)
    ).scalar_one()
    return new_id, 1


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


def _latest_round(connection: Connection) -> RoundRecord | None:
    row = connection.execute(
        _SELECT_ROUNDS.order_by(RoundRow.round_num.desc()).limit(1)
    ).one_or_none()
    if row is None:
        return None
    query = _SELECT_CONTRIBUTIONS.where(ContributionRow.round_num == row.round_num)
    return _round_records([row], connection.execute(query).all())[0]


def _is_line(owner: Owner, base: str) -> tuple[Any, ...]:  # Any: SQLAlchemy's own conditions
    return (
        AdapterRow.owner_kind == owner.kind,
        AdapterRow.owner_name == owner.name,
        AdapterRow.base == base,
    )


def _select_versions(owner: Owner, base: str) -> Select[Any]:  # Any: rows are read by name
    return (
        select(AdapterRow.owner_kind, AdapterRow.owner_name, AdapterRow.base, VersionRow.__table__)
        .join(VersionRow, VersionRow.adapter_id == AdapterRow.id)
        .where(*_is_line(owner, base))
        .order_by(VersionRow.version.desc())
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
        created_at=_from_ms(row.created_ms),
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
            committed_at=_from_ms(row.committed_ms),
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


def _to_ms(at: datetime) -> int:
    return (at - _EPOCH) // _MILLISECOND


def _from_ms(ms: int) -> datetime:
    return _EPOCH + ms * _MILLISECOND
