"""The registry: every published adapter, everyone's and each user's, and the rounds they came from.

The rules are here, the same for every store. Blob first, database second, acknowledgement last: a
crash in between leaves bytes that nobody refers to, never a version without its bytes.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.dial import Alpha
from fedia3.adapters.schema import Schema
from fedia3.coordinator.blobs import BlobStore, FileBlobs, MemoryBlobs
from fedia3.coordinator.records import (
    LATEST,
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
    checked_alias,
    is_digest,
)
from fedia3.coordinator.store import Store, no_alias, no_digest, no_version
from fedia3.coordinator.stores.memory import MemoryStore
from fedia3.errors import BadAdapter, BadSetting, Conflict, Corrupt, Erased, NotFound

Clock = Callable[[], datetime]
Which = int | str  # a version's number, its digest or an alias


@dataclass(frozen=True)
class Effective:
    """What one user is served: the newest global adapter, with their own part on it if any."""

    adapter: Adapter
    everyone: AdapterRecord
    personal: AdapterRecord | None

    @property
    def record(self) -> AdapterRecord:
        """The version that speaks for the user: their own, else everyone's."""
        return self.personal or self.everyone


@dataclass(frozen=True)
class Receipt:
    """What an erasure did, and what it cannot undo."""

    tombstone: Tombstone
    global_versions: tuple[int, ...]  # that the user's contributions went into, and stay in


def utc_now() -> datetime:
    """The time of this machine's clock."""
    return datetime.now(UTC)


class Registry:
    """Adapters by owner and base model, and the rounds of one federation.

    Any call may also raise the store's and the blob store's errors: ``Conflict`` while another
    process holds the database too long, ``Corrupt`` for damaged files, ``StorageFailed`` for a disk
    that refuses.
    """

    def __init__(self, store: Store, blobs: BlobStore, clock: Clock = utc_now) -> None:
        self.store = store
        self.blobs = blobs
        self._clock = clock
        # Two users may have the same bytes, such as a part that learned nothing: erasing one's
        # must not take those that the other is about to publish.
        self._personal = Lock()

    @classmethod
    def open(cls, folder: Path, database: str | None = None) -> Self:
        """The registry in ``folder``: ``registry.db`` beside ``blobs/``, created where it is new.

        Where ``database`` is given, a PostgreSQL database's URL mostly, it stands for the file.

        Raises:
            BadSetting: the folder cannot be created or written, or the database not be opened.
            BadInput: its database is no registry's, or a newer fedia3 wrote it.
        """
        from fedia3.coordinator.stores.sql import (  # noqa: PLC0415 slow, unused in memory
            SqlStore,
        )

        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise BadSetting(
                f"cannot keep a registry in {folder}: {error.strerror}; choose a folder you can "
                "write"
            ) from error
        store = SqlStore(database) if database else SqlStore.at(folder / "registry.db")
        return cls(store, FileBlobs(folder / "blobs"))

    @classmethod
    def in_memory(cls, clock: Clock = utc_now) -> Self:
        """A registry that forgets at exit."""
        return cls(MemoryStore(), MemoryBlobs(), clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of files and connections."""
        self.store.close()

    def publish_global(
        self,
        adapter: Adapter,
        *,
        round_num: int = 0,
        num_examples: int = 0,
        metrics: Mapping[str, float] | None = None,
        idem_key: str | None = None,
    ) -> AdapterRecord:
        """Publish everyone's adapter outside of a round, such as one trained elsewhere.

        Raises:
            BadInput: a count or the metrics are not sound.
            Conflict: ``idem_key`` already names other bytes.
        """
        data = encoding.encode(adapter)
        draft = self._draft_global(adapter, data, round_num, num_examples, metrics or {})
        return self._publish(draft, data, idem_key)

    def publish_personal(
        self,
        user: str,
        personal: PersonalAdapter,
        *,
        num_examples: int,
        metrics: Mapping[str, float] | None = None,
        idem_key: str | None = None,
        age: timedelta = timedelta(),
    ) -> AdapterRecord:
        """Publish a user's own part; with ``idem_key`` a repeated call publishes once.

        ``age`` is how long ago its training began.

        Raises:
            BadInput: the name, a count or the metrics are not sound.
            NotFound: the global version it was trained on was never published for this base.
            BadAdapter: that global version scales other targets.
            Conflict: ``idem_key`` already names other bytes.
            Erased: the user was erased since it was begun, or erased what ``idem_key`` named.
        """
        owner, schema = Owner.user(user), personal.schema
        trained_on, data = self._global_version(personal), encoding.encode_personal(personal)
        with self._personal:
            began_at = self._now() - age
            draft = AdapterDraft(
                owner=owner,
                form="personal",
                digest=self.blobs.put(data),
                schema_digest=schema.digest,
                base=schema.base_digest,
                round_num=trained_on.round_num,
                num_examples=num_examples,
                metrics=metrics or {},
                parent=self._latest_digest(owner, schema.base_digest),
                global_digest=trained_on.digest,
            )
            try:
                return self._publish(draft, data, idem_key, began_at)
            except Erased:
                self.store.remove_unused([draft.digest], self.blobs.delete)
                raise

    def erase_user(
        self, user: str, base: str | None = None, clients: Collection[str] = ()
    ) -> Receipt:
        """Delete a user's own parts, on one base or on all: bytes, versions, the name.

        The bytes go first: an erasure that a crash cuts short is finished by asking again. What
        rounds made of the contributions of the user's ``clients`` stays, and the receipt names it.
        What was begun before the erasure cannot be published after it.

        Raises:
            BadInput: the name is not sound.
        """
        owner = Owner.user(user)
        with self._personal:
            tombstone = self.store.erase(owner, base, self._now(), self.blobs.delete)
            time.sleep(0.001)  # what begins from here on has a later millisecond
        # A simulation's clients are called as their users.
        return Receipt(tombstone, self.store.accepted_from({owner.name, *clients}))

    def commit_round(
        self,
        round_num: int,
        state: bytes,
        adapter: Adapter,
        contributions: Sequence[Contribution] = (),
        metrics: Mapping[str, float] | None = None,
    ) -> AdapterRecord:
        """Keep a finished round whole: server state, everyone's new adapter, who took part.

        The first round may have any number, later ones follow without a gap.

        Raises:
            Conflict: another round is next; somebody else committed this one.
            WrongBaseModel: earlier rounds trained another base model.
            BadInput: a client is listed twice, or the metrics are not sound.
        """
        num_examples = sum(c.num_examples for c in contributions if c.verdict == "accepted")
        data = encoding.encode(adapter)
        draft = self._draft_global(adapter, data, round_num, num_examples, metrics or {})
        commit = RoundCommit(round_num, state, draft, tuple(contributions), metrics or {})
        return self._with_bytes(self.store.commit_round(commit, self._now()), data)

    def find(self, owner: Owner, base: str, which: Which = LATEST) -> AdapterRecord:
        """A version by its number, its digest, or an alias; ``latest`` is the newest not yanked.

        Raises:
            NotFound: the owner has no such version or alias on this base.
            BadInput: this is no alias.
        """
        if isinstance(which, int):
            return self.store.find(owner, base, which)
        if which == LATEST:
            return self.store.find(owner, base)
        if is_digest(which):
            return self.store.find_digest(owner, base, which)
        alias = self.store.alias(owner, base, checked_alias(which))
        return self.store.find(owner, base, alias.version)

    def fetch(self, owner: Owner, base: str, which: Which = LATEST) -> tuple[AdapterRecord, bytes]:
        """A version as :meth:`find` finds it, and its bytes.

        Raises:
            NotFound: the owner has no such version or alias on this base.
            BadInput: this is no alias.
            Corrupt: the version is known, but its bytes are damaged or gone.
        """
        record = self.find(owner, base, which)
        return record, self.read(record)

    def read(self, record: AdapterRecord) -> bytes:
        """The bytes of a version.

        Raises:
            Corrupt: they are damaged or gone.
        """
        try:
            return self.blobs.get(record.digest)
        except NotFound as error:
            raise _bytes_gone(record) from error

    def promote(self, move: AliasMove, expected_rev: int | None = None) -> AliasEvent:
        """Point an alias at a version, or at none; where it points there already, nothing happens.

        Args:
            expected_rev: only if nobody moved it since this revision, 0 for a new alias.

        Raises:
            NotFound: the owner has no such version, or there is no alias to drop.
            Conflict: somebody else moved it, or the version is yanked.
        """
        return self.store.move_alias(move, self._now(), expected_rev)

    def roll_back(
        self,
        owner: Owner,
        base: str,
        name: str,
        *,
        expected_rev: int | None = None,
        actor: str = "operator",
        reason: str = "",
    ) -> AliasEvent:
        """Point an alias at the version where it pointed before, as a new move.

        So a second one undoes the first; with the same ``expected_rev`` a repeated call rolls back
        once.

        Raises:
            NotFound: there is no such alias.
            Conflict: it pointed nowhere else before, somebody else moved it, or that version is
                yanked.
        """
        before = None if expected_rev is None else expected_rev + 1
        moves = self.store.alias_events(owner, base, checked_alias(name), before)
        if not moves or moves[0].version is None:
            raise no_alias(owner, base, name)
        current = moves[0]
        earlier = (move.version for move in moves if move.version not in (None, current.version))
        version = next(earlier, None)
        if version is None:
            raise Conflict(
                f"{current} pointed at no other version before; promote one to it instead"
            )
        move = AliasMove(
            owner=owner, base=base, name=name, version=version, actor=actor, reason=reason
        )
        return self.promote(move, current.rev)

    def global_adapter(
        self, schema: Schema, which: Which = LATEST
    ) -> tuple[AdapterRecord, Adapter]:
        """Everyone's adapter, by default the newest.

        Raises:
            NotFound: none was published for this base, or there is no such version or alias.
            Corrupt: its bytes are damaged or gone.
        """
        record, data = self.fetch(Owner.everyone(), schema.base_digest, which)
        return record, encoding.decode(data, schema)

    def resolve(
        self, user: str, schema: Schema, alpha: Alpha = 1.0, which: Which = LATEST
    ) -> Effective:
        """What this user is served: ``global + alpha * delta``, by default on the newest global.

        A user who never published is served everyone's adapter.

        Args:
            which: of everyone's adapters, such as ``stable``.

        Raises:
            NotFound: there is no global adapter for this base yet, or no such alias.
            BadSetting: the dial ``alpha`` does not fit the schema.
            Corrupt: the bytes of either part are damaged or gone.
        """
        everyone, global_adapter = self.global_adapter(schema, which)
        try:
            record, data = self.fetch(Owner.user(user), schema.base_digest)
        except NotFound:
            return Effective(global_adapter, everyone, personal=None)
        personal = encoding.decode_personal(data, schema)
        return Effective(personal.on(global_adapter, alpha), everyone, record)

    def scales(self, record: AdapterRecord, schema: Schema) -> Adapter:
        """A version's scales; a user's own part counts on the global version it was trained on.

        Raises:
            WrongBaseModel: the version is for another base model than the schema.
            Corrupt: its bytes, or those of that global version, are damaged or gone.
        """
        data = self.read(record)
        if record.form == "adapter":
            return encoding.decode(data, schema)
        personal = encoding.decode_personal(data, schema)
        trained_on = self.read(self._global_version(personal))
        return personal.on(encoding.decode(trained_on, schema))

    def size(self, record: AdapterRecord) -> int:
        """Bytes of a version's file.

        Raises:
            Corrupt: the version is known, but its bytes are gone.
        """
        try:
            return self.blobs.size(record.digest)
        except NotFound as error:
            raise _bytes_gone(record) from error

    def versions(
        self, owner: Owner, base: str, before: int | None = None, limit: int | None = None
    ) -> tuple[AdapterRecord, ...]:
        """An owner's versions, newest first: all, or up to ``limit`` of those below ``before``."""
        return self.store.versions(owner, base, before, limit)

    def owners(
        self, kind: OwnerKind, after: str | None = None, limit: int = 100
    ) -> tuple[Owner, ...]:
        """A page of owners by name, from behind ``after`` on.

        Raises:
            BadSetting: the limit is not positive.
        """
        return self.store.owners(kind, after, limit)

    def base_of(self, owner: Owner, beginning: str = "") -> str:
        """Digest of the one base model that the owner has versions on and that begins like this.

        Raises:
            NotFound: there is none.
            BadSetting: there are several.
        """
        bases = self.store.bases(owner)
        found = [base for base in bases if base.startswith(beginning)]
        if len(found) == 1:
            return found[0]
        if not bases:
            raise NotFound(f"{owner} has no adapter; list the owners there are")
        listed = ", ".join(base[:12] for base in bases)
        if not found:
            raise NotFound(
                f"{owner} has no adapter for a base model {beginning!r}; there are {listed}"
            )
        raise BadSetting(f"{owner} has adapters for {len(found)} base models, name one: {listed}")

    def latest_round(self) -> RoundRecord | None:
        """The last committed round, None before the first."""
        return self.store.latest_round()

    def server_state(self) -> bytes | None:
        """The state to go on from, None before the first round."""
        return self.store.server_state()

    def rounds(self) -> tuple[RoundRecord, ...]:
        """All rounds, oldest first."""
        return self.store.rounds()

    def _publish(
        self,
        draft: AdapterDraft,
        data: bytes,
        idem_key: str | None,
        began_at: datetime | None = None,
    ) -> AdapterRecord:
        record = self.store.publish(draft, self._now(), idem_key, began_at)
        return self._with_bytes(record, data)

    def _with_bytes(self, record: AdapterRecord, data: bytes) -> AdapterRecord:
        """The version, once its bytes are there.

        Another process may have collected them between their put and the version's commit, when
        nobody referred to them; or it has erased the version since, and they are not to come back.
        """
        if not self.blobs.has(record.digest):
            self.blobs.put(data)
            self.store.remove_unused([record.digest], self.blobs.delete)
        return record

    def _draft_global(
        self,
        adapter: Adapter,
        data: bytes,
        round_num: int,
        num_examples: int,
        metrics: Mapping[str, float],
    ) -> AdapterDraft:
        return AdapterDraft(
            owner=Owner.everyone(),
            form="adapter",
            digest=self.blobs.put(data),
            schema_digest=adapter.schema.digest,
            base=adapter.schema.base_digest,
            round_num=round_num,
            num_examples=num_examples,
            metrics=metrics,
            parent=self._latest_digest(Owner.everyone(), adapter.schema.base_digest),
        )

    def _global_version(self, personal: PersonalAdapter) -> AdapterRecord:
        # Looked up outside of the write's transaction: global versions never go away.
        base = personal.schema.base_digest
        found = self.store.find_digest(Owner.everyone(), base, personal.global_digest)
        if found.schema_digest != personal.schema.digest:
            raise BadAdapter(
                f"the personal adapter scales other targets than {found}, which it names; train "
                "it on that version's schema"
            )
        return found

    def _latest_digest(self, owner: Owner, base: str) -> str | None:
        newest = self.store.versions(owner, base, limit=1)  # yanked or not: it came before
        return newest[0].digest if newest else None

    def _now(self) -> datetime:
        now = self._clock()
        return now.replace(microsecond=now.microsecond // 1000 * 1000)  # as fine as stores keep it


def _bytes_gone(record: AdapterRecord) -> Corrupt:
    return Corrupt(
        f"the bytes of {record} are gone; restore blob {record.digest[:12]} from a backup"
    )


def not_there(owner: Owner, base: str, which: Which) -> NotFound:
    """The error for what :meth:`Registry.find` does not find."""
    if isinstance(which, int):
        return no_version(owner, base, which)
    if which == LATEST:
        return no_version(owner, base, None)
    return (no_digest if is_digest(which) else no_alias)(owner, base, which)
