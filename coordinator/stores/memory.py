"""A store that forgets at exit: the honest twin of the SQL store, for tests and trial runs."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import islice
from secrets import token_bytes
from threading import Lock

from fedia3.coordinator.records import (
    AdapterDraft,
    AdapterRecord,
    AliasEvent,
    AliasMove,
    Owner,
    OwnerKind,
    RoundCommit,
    RoundRecord,
    Tombstone,
)
from fedia3.coordinator.store import (
    checked_key,
    erased_key,
    hidden,
    new_tombstone,
    next_event,
    no_alias,
    no_digest,
    no_version,
    require_begun_after,
    require_next_round,
    require_no_alias,
    require_positive,
    require_same_bytes,
    require_user,
)


@dataclass
class _Line:
    """One owner's versions on one base, oldest first."""

    records: list[AdapterRecord] = field(default_factory=list)
    next_version: int = 1
    by_key: dict[str, AdapterRecord] = field(default_factory=dict)
    revision: int = 0
    aliases: dict[str, list[AliasEvent]] = field(default_factory=dict)  # oldest first

    def find(self, version: int) -> AdapterRecord | None:
        """The version of this number."""
        return next((r for r in self.records if r.version == version), None)

    def current(self) -> tuple[AliasEvent, ...]:
        """The aliases that point at something, by name."""
        newest = (events[-1] for _name, events in sorted(self.aliases.items()))
        return tuple(event for event in newest if event.version is not None)


class MemoryStore:
    """Everything in dictionaries behind one lock; see :class:`fedia3.coordinator.store.Store`."""

    def __init__(self) -> None:
        self._lines: dict[tuple[Owner, str], _Line] = {}
        self._rounds: list[RoundRecord] = []
        self._state: bytes | None = None
        self._hidden = partial(hidden, token_bytes(32))
        self._erased_at: dict[tuple[bytes, str | None], datetime] = {}  # by user and base or all
        self._erased_lines: dict[bytes, tuple[int, int]] = {}  # the numbers they go on with
        self._erased_keys: set[bytes] = set()
        self._lock = Lock()

    def publish(
        self,
        draft: AdapterDraft,
        at: datetime,
        idem_key: str | None = None,
        began_at: datetime | None = None,
    ) -> AdapterRecord:
        """See :meth:`fedia3.coordinator.store.Store.publish`."""
        idem_key = checked_key(idem_key)
        with self._lock:
            published = self._line(draft.owner, draft.base).by_key.get(idem_key or "")
            if published is not None:
                return require_same_bytes(published, draft)
            self._require_not_erased(draft, idem_key, began_at)
            record = self._append(draft, at)
            if idem_key is not None:
                self._lines[draft.owner, draft.base].by_key[idem_key] = record
            return record

    def commit_round(self, commit: RoundCommit, at: datetime) -> AdapterRecord:
        """See :meth:`fedia3.coordinator.store.Store.commit_round`."""
        with self._lock:
            require_next_round(self._rounds[-1] if self._rounds else None, commit)
            record = self._append(commit.draft, at)
            self._rounds.append(
                RoundRecord(
                    round_num=commit.round_num,
                    base=record.base,
                    version=record.version,
                    digest=record.digest,
                    contributions=commit.contributions,
                    metrics=commit.metrics,
                    committed_at=at,
                )
            )
            self._state = commit.state
            return record

    def latest_round(self) -> RoundRecord | None:
        """See :meth:`fedia3.coordinator.store.Store.latest_round`."""
        with self._lock:
            return self._rounds[-1] if self._rounds else None

    def server_state(self) -> bytes | None:
        """See :meth:`fedia3.coordinator.store.Store.server_state`."""
        with self._lock:
            return self._state

    def rounds(self) -> tuple[RoundRecord, ...]:
        """See :meth:`fedia3.coordinator.store.Store.rounds`."""
        with self._lock:
            return tuple(self._rounds)

    def find(self, owner: Owner, base: str, version: int | None = None) -> AdapterRecord:
        """See :meth:`fedia3.coordinator.store.Store.find`."""
        for record in self.versions(owner, base):
            if version == record.version or (version is None and not record.yanked):
                return record
        raise no_version(owner, base, version)

    def find_digest(self, owner: Owner, base: str, digest: str) -> AdapterRecord:
        """See :meth:`fedia3.coordinator.store.Store.find_digest`."""
        for record in self.versions(owner, base):
            if record.digest == digest:
                return record
        raise no_digest(owner, base, digest)

    def versions(
        self, owner: Owner, base: str, before: int | None = None, limit: int | None = None
    ) -> tuple[AdapterRecord, ...]:
        """See :meth:`fedia3.coordinator.store.Store.versions`."""
        with self._lock:
            newest_first = reversed(self._line(owner, base).records)
            below = (r for r in newest_first if before is None or r.version < before)
            return tuple(islice(below, limit))

    def erase(
        self, owner: Owner, base: str | None, at: datetime, remove: Callable[[str], None]
    ) -> Tombstone:
        """See :meth:`fedia3.coordinator.store.Store.erase`."""
        require_user(owner)
        with self._lock:
            meant = [on for whose, on in self._lines if whose == owner and base in (None, on)]
            for digest in self._unshared(owner, meant):
                remove(digest)
            lines = [(on, self._lines.pop((owner, on))) for on in meant]
            for on, line in lines:
                self._erased_lines[self._hidden(owner.name, on)] = (
                    line.next_version,
                    line.revision + 1,
                )
                self._erased_keys |= {self._hidden(owner.name, on, key) for key in line.by_key}
            self._erased_at[self._hidden(owner.name), base] = at
        return new_tombstone(at, sum(len(line.records) for _on, line in lines))

    def accepted_from(self, clients: Collection[str]) -> tuple[int, ...]:
        """See :meth:`fedia3.coordinator.store.Store.accepted_from`."""
        return tuple(
            made.version
            for made in self.rounds()
            if any(c.client in clients and c.verdict == "accepted" for c in made.contributions)
        )

    def owners(
        self, kind: OwnerKind, after: str | None = None, limit: int = 100
    ) -> tuple[Owner, ...]:
        """See :meth:`fedia3.coordinator.store.Store.owners`."""
        require_positive(limit)
        with self._lock:
            lines = self._lines.items()
            owners = {o for (o, _base), line in lines if o.kind == kind and line.records}
        return tuple(sorted(o for o in owners if after is None or o.name > after)[:limit])

    def bases(self, owner: Owner) -> tuple[str, ...]:
        """See :meth:`fedia3.coordinator.store.Store.bases`."""
        with self._lock:
            lines = self._lines.items()
            return tuple(sorted(on for (who, on), line in lines if who == owner and line.records))

    def revision(self, owner: Owner, base: str) -> int:
        """See :meth:`fedia3.coordinator.store.Store.revision`."""
        with self._lock:
            return self._line(owner, base).revision

    def yank(self, owner: Owner, base: str, version: int) -> None:
        """See :meth:`fedia3.coordinator.store.Store.yank`."""
        self._set_yanked(owner, base, version, is_yanked=True)

    def unyank(self, owner: Owner, base: str, version: int) -> None:
        """See :meth:`fedia3.coordinator.store.Store.unyank`."""
        self._set_yanked(owner, base, version, is_yanked=False)

    def move_alias(
        self, move: AliasMove, at: datetime, expected_rev: int | None = None
    ) -> AliasEvent:
        """See :meth:`fedia3.coordinator.store.Store.move_alias`."""
        with self._lock:
            line, record = self._line(move.owner, move.base), None
            if (move.owner, move.base) not in self._lines:
                raise no_version(move.owner, move.base, None)
            if move.version is not None and (record := line.find(move.version)) is None:
                raise no_version(move.owner, move.base, move.version)
            events = line.aliases.get(move.name, [])
            last = events[-1] if events else None
            event = next_event(last, move, at, expected_rev, record)
            if event is not last:
                line.aliases[move.name] = [*events, event]
                line.revision += 1
            return event

    def alias(self, owner: Owner, base: str, name: str, at: datetime | None = None) -> AliasEvent:
        """See :meth:`fedia3.coordinator.store.Store.alias`."""
        for event in self.alias_events(owner, base, name):
            if at is None or event.at <= at:
                if event.version is None:
                    break
                return event
        raise no_alias(owner, base, name)

    def aliases(self, owner: Owner, base: str) -> tuple[AliasEvent, ...]:
        """See :meth:`fedia3.coordinator.store.Store.aliases`."""
        with self._lock:
            return self._line(owner, base).current()

    def alias_events(
        self,
        owner: Owner,
        base: str,
        name: str,
        before: int | None = None,
        limit: int | None = None,
    ) -> tuple[AliasEvent, ...]:
        """See :meth:`fedia3.coordinator.store.Store.alias_events`."""
        with self._lock:
            newest_first = reversed(self._line(owner, base).aliases.get(name, []))
            below = (e for e in newest_first if before is None or e.rev < before)
            return tuple(islice(below, limit))

    def every_version(
        self, after: AdapterRecord | None = None, limit: int = 100
    ) -> tuple[AdapterRecord, ...]:
        """See :meth:`fedia3.coordinator.store.Store.every_version`."""
        require_positive(limit)
        with self._lock:
            every = sorted((r for line in self._lines.values() for r in line.records), key=_place)
        behind = (r for r in every if after is None or _place(r) > _place(after))
        return tuple(islice(behind, limit))

    def faults(self) -> Iterator[str]:
        """See :meth:`fedia3.coordinator.store.Store.faults`; memory does not rot."""
        return iter(())

    def unused(self, digests: Collection[str]) -> frozenset[str]:
        """See :meth:`fedia3.coordinator.store.Store.unused`."""
        with self._lock:
            return self._unused(digests)

    def remove_unused(self, digests: Collection[str], remove: Callable[[str], None]) -> None:
        """See :meth:`fedia3.coordinator.store.Store.remove_unused`."""
        with self._lock:
            for digest in self._unused(digests):
                remove(digest)

    def close(self) -> None:
        """Nothing to let go of."""

    def _set_yanked(self, owner: Owner, base: str, version: int, *, is_yanked: bool) -> None:
        with self._lock:
            line = self._line(owner, base)
            record = line.find(version)
            if record is None:
                raise no_version(owner, base, version)
            if record.yanked == is_yanked:
                return
            if is_yanked:
                require_no_alias(record, line.current())
            line.records[line.records.index(record)] = replace(record, yanked=is_yanked)
            line.revision += 1

    def _unused(self, digests: Collection[str]) -> frozenset[str]:
        used = {record.digest for line in self._lines.values() for record in line.records}
        return frozenset(digests) - used

    def _unshared(self, owner: Owner, bases: Collection[str]) -> set[str]:
        mine, others = set[str](), set[str]()
        for (whose, on), line in self._lines.items():
            meant = whose == owner and on in bases
            (mine if meant else others).update(record.digest for record in line.records)
        return mine - others

    def _require_not_erased(
        self, draft: AdapterDraft, idem_key: str | None, began_at: datetime | None
    ) -> None:
        owner, base = draft.owner, draft.base
        if idem_key is not None and self._hidden(owner.name, base, idem_key) in self._erased_keys:
            raise erased_key(owner)
        for on in (None, base):
            if (erased_at := self._erased_at.get((self._hidden(owner.name), on))) is not None:
                require_begun_after(owner, erased_at, began_at)

    def _line(self, owner: Owner, base: str) -> _Line:
        number, revision = self._erased_lines.get(self._hidden(owner.name, base), (1, 0))
        return self._lines.get((owner, base)) or _Line(next_version=number, revision=revision)

    def _append(self, draft: AdapterDraft, at: datetime) -> AdapterRecord:
        line = self._line(draft.owner, draft.base)
        if draft.parent is not None and all(r.digest != draft.parent for r in line.records):
            raise no_digest(draft.owner, draft.base, draft.parent)
        record = AdapterRecord(**vars(draft), version=line.next_version, created_at=at)
        line.records.append(record)
        line.next_version += 1
        line.revision += 1
        self._lines[draft.owner, draft.base] = line
        return record


def _place(record: AdapterRecord) -> tuple[str, Owner, str, int]:
    return record.digest, record.owner, record.base, record.version
