"""The seam to what the registry remembers: metadata only, bytes lie in the blob store.

A store is right when it passes ``tests/coordinator/test_store_contract.py``. What every backend
has to decide inside its own transaction is written once, as pure functions, at the end.
"""

import hmac
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime
from typing import Protocol

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
    checked_name,
)
from fedia3.errors import BadInput, BadSetting, Conflict, Erased, NotFound, WrongBaseModel


class Store(Protocol):
    """Versions of adapters by owner and base model, and the rounds of one federation.

    Every call is one transaction; calls may come from several threads. Times are UTC in whole
    milliseconds.
    """

    def publish(
        self,
        draft: AdapterDraft,
        at: datetime,
        idem_key: str | None = None,
        began_at: datetime | None = None,
    ) -> AdapterRecord:
        """Give the draft the owner's next version number and keep it.

        A repeated ``idem_key`` (per owner and base) with the same digest returns the version
        published first, so a client that lost the answer may ask again. ``began_at`` is when the
        work on the draft began; None stands for after every erasure.

        Raises:
            BadInput: the key is no name.
            Conflict: the key was used before, for other bytes.
            Erased: the key named a version that was erased since, or the owner was erased at
                ``began_at`` or later.
            NotFound: ``draft.parent`` is no version of this owner on this base.
        """
        ...

    def commit_round(self, commit: RoundCommit, at: datetime) -> AdapterRecord:
        """Keep server state, global version and contributions in one transaction.

        Raises:
            Conflict: this is not the round after the last one; somebody else committed it.
            NotFound: the draft's parent is no global version of this base.
            WrongBaseModel: earlier rounds trained another base model.
        """
        ...

    def latest_round(self) -> RoundRecord | None:
        """The last committed round, None before the first."""
        ...

    def server_state(self) -> bytes | None:
        """The state that was committed with the last round, None before the first."""
        ...

    def rounds(self) -> tuple[RoundRecord, ...]:
        """All rounds, oldest first."""
        ...

    def find(self, owner: Owner, base: str, version: int | None = None) -> AdapterRecord:
        """One version; where none is named, the latest that is not yanked.

        Raises:
            NotFound: the owner has no such version on this base.
        """
        ...

    def find_digest(self, owner: Owner, base: str, digest: str) -> AdapterRecord:
        """The owner's newest version that has these bytes.

        Raises:
            NotFound: none has.
        """
        ...

    def versions(
        self, owner: Owner, base: str, before: int | None = None, limit: int | None = None
    ) -> tuple[AdapterRecord, ...]:
        """An owner's versions, newest first; empty for an owner who has none.

        All of them, or up to ``limit`` of those below version ``before``.
        """
        ...

    def erase(
        self, owner: Owner, base: str | None, at: datetime, remove: Callable[[str], None]
    ) -> Tombstone:
        """Forget a user's versions and name, on one base (of that, the name's hash) or on all.

        ``remove`` is called for the digests that no other version has, before the versions go and
        while nobody publishes: what is cut short in between still has its versions, and is finished
        by erasing again. Neither numbers nor idempotency keys are given again.

        Raises:
            BadInput: the owner is everyone; rounds refer to those versions.
        """
        ...

    def accepted_from(self, clients: Collection[str]) -> tuple[int, ...]:
        """The global versions, in order, that came of rounds with an update of these clients."""
        ...

    def owners(
        self, kind: OwnerKind, after: str | None = None, limit: int = 100
    ) -> tuple[Owner, ...]:
        """A page of owners of versions, in code point order of names, from behind ``after`` on.

        Raises:
            BadSetting: the limit is not positive.
        """
        ...

    def bases(self, owner: Owner) -> tuple[str, ...]:
        """Digests of the base models that the owner has versions on, in order."""
        ...

    def revision(self, owner: Owner, base: str) -> int:
        """How often what the owner is served may have changed: publishes, moves, yanks.

        It never falls, also when the owner is erased; 0 for an owner who never had anything.
        """
        ...

    def yank(self, owner: Owner, base: str, version: int) -> None:
        """Let nobody be given this version who does not name it; again, nothing happens.

        Raises:
            NotFound: the owner has no such version on this base.
            Conflict: an alias points at it.
        """
        ...

    def unyank(self, owner: Owner, base: str, version: int) -> None:
        """Take a yank back; where there is none, nothing happens.

        Raises:
            NotFound: the owner has no such version on this base.
        """
        ...

    def move_alias(
        self, move: AliasMove, at: datetime, expected_rev: int | None = None
    ) -> AliasEvent:
        """Make the move the alias's newest event; where it points there already, nothing happens.

        Args:
            expected_rev: only if this is its newest event's number, 0 for one that never was.

        Raises:
            NotFound: the owner has no such version, or there is no alias to drop.
            Conflict: somebody else moved it, or the version is yanked.
        """
        ...

    def alias(self, owner: Owner, base: str, name: str, at: datetime | None = None) -> AliasEvent:
        """The move that says where an alias points, now or at that time; it has a version.

        Raises:
            NotFound: there is no such alias, or there was none then.
        """
        ...

    def aliases(self, owner: Owner, base: str) -> tuple[AliasEvent, ...]:
        """The newest moves of an owner's aliases that point at something, by name."""
        ...

    def alias_events(
        self,
        owner: Owner,
        base: str,
        name: str,
        before: int | None = None,
        limit: int | None = None,
    ) -> tuple[AliasEvent, ...]:
        """An alias's moves, newest first: all, or up to ``limit`` of those below rev ``before``."""
        ...

    def every_version(
        self, after: AdapterRecord | None = None, limit: int = 100
    ) -> tuple[AdapterRecord, ...]:
        """A page of all owners' versions, by digest, from behind ``after`` on.

        Raises:
            BadSetting: the limit is not positive.
        """
        ...

    def faults(self) -> Iterator[str]:
        """What the store finds wrong with itself, each in a sentence; reads everything."""
        ...

    def unused(self, digests: Collection[str]) -> frozenset[str]:
        """Those of the digests that no version has."""
        ...

    def remove_unused(self, digests: Collection[str], remove: Callable[[str], None]) -> None:
        """Call ``remove`` for those of the digests that no version has.

        Nobody publishes meanwhile, in no process, and none of what ``remove`` does is undone.
        """
        ...

    def close(self) -> None:
        """Let go of files and connections; the store is not used afterwards."""
        ...


def require_next_round(last: RoundRecord | None, commit: RoundCommit) -> None:
    """Rounds follow each other without a gap, from any number on, and train one base model.

    Raises:
        Conflict: another number is next.
        WrongBaseModel: earlier rounds trained another base model.
    """
    if last is None:
        return
    if commit.draft.base != last.base:
        raise WrongBaseModel(
            f"the rounds of this registry train base model {last.base[:12]}, this commit is for "
            f"{commit.draft.base[:12]}; open another registry for it"
        )
    if commit.round_num != last.round_num + 1:
        raise Conflict(
            f"round {last.round_num + 1} is next, got round {commit.round_num}; "
            "load the server state anew and go on from there"
        )


def checked_key(idem_key: str | None) -> str | None:
    """The idempotency key as it is kept, None where there is none.

    Raises:
        BadInput: it is not of 1 to 128 characters, or holds control characters.
    """
    return None if idem_key is None else checked_name(idem_key, "an idempotency key")


def require_same_bytes(published: AdapterRecord, draft: AdapterDraft) -> AdapterRecord:
    """The version an idempotency key already names, for a draft that repeats it.

    Raises:
        Conflict: the draft has other bytes.
    """
    if published.digest != draft.digest:
        raise Conflict(
            f"this idempotency key already names {published} with digest {published.digest[:12]}, "
            f"got digest {draft.digest[:12]}; use a new key for new bytes"
        )
    return published


def require_positive(limit: int) -> None:
    """Pages hold at least one entry.

    Raises:
        BadSetting: this one would not.
    """
    if limit < 1:
        raise BadSetting(f"a page's limit is at least 1, got {limit}")


def require_user(owner: Owner) -> None:
    """Only what is a user's own is ever erased.

    Raises:
        BadInput: it is everyone's.
    """
    if owner.kind != "user":
        raise BadInput("everyone's versions are not erased: rounds refer to them; name a user")


def new_tombstone(at: datetime, versions: int) -> Tombstone:
    """With a receipt of its own."""
    return Tombstone(secrets.token_hex(16), at, versions)


def hidden(pepper: bytes, *names: str) -> bytes:
    """What tells the names again and does not tell them: 32 bytes of HMAC-SHA256.

    A name, a digest and a key hold no NUL, so they cannot be parted in two ways.
    """
    return hmac.digest(pepper, "\0".join(names).encode(), "sha256")


def require_begun_after(owner: Owner, erased_at: datetime, began_at: datetime | None) -> None:
    """What began before an erasure, or in its millisecond, does not outlive it.

    Raises:
        Erased: it would.
    """
    if began_at is not None and began_at <= erased_at:
        raise Erased(
            f"{owner} was erased at {erased_at:%Y-%m-%d %H:%M:%S} UTC, after this part was begun; "
            "train it anew and publish that"
        )


def erased_key(owner: Owner) -> Erased:
    """The error for an idempotency key whose version was erased."""
    return Erased(
        f"this idempotency key named a version that {owner} erased; it does not come back, "
        "publish a new part under a new key"
    )


def no_version(owner: Owner, base: str, version: int | None) -> NotFound:
    """The error for a version that is not there."""
    wanted = "no adapter" if version is None else f"no version {version}"
    return NotFound(f"{owner} has {wanted} for base model {base[:12]}; list what there is first")


def no_digest(owner: Owner, base: str, digest: str) -> NotFound:
    """The error for bytes that no version of the owner has."""
    return NotFound(
        f"no version of {owner} for base model {base[:12]} has digest {digest[:12]}; "
        "publish it first, or name one that is there"
    )


def no_alias(owner: Owner, base: str, name: str) -> NotFound:
    """The error for an alias that points at nothing."""
    return NotFound(
        f"{owner} has no alias {name!r} for base model {base[:12]}; list what there is first"
    )


def next_event(
    last: AliasEvent | None,
    move: AliasMove,
    at: datetime,
    expected_rev: int | None,
    record: AdapterRecord | None,
) -> AliasEvent:
    """What a move makes of an alias; ``last`` itself where that points there already.

    Args:
        last: the alias's newest event.
        record: the version that it shall point at.

    Raises:
        NotFound: there is no alias to drop.
        Conflict: somebody else moved it, or the version is yanked.
    """
    current = last.version if last else None
    if last is not None and current is not None and current == move.version:
        return last
    rev = last.rev if last else 0
    if expected_rev is not None and expected_rev != rev:
        where = f"points at version {current}" if current else "points at nothing"
        raise Conflict(
            f"alias {move.name!r} of {move.owner} was moved: it is at revision {rev}, not "
            f"{expected_rev}, and {where}; look at it and move it again"
        )
    if move.version is None and current is None:
        raise no_alias(move.owner, move.base, move.name)
    if record is not None and record.yanked:
        raise Conflict(f"{record} is yanked; take that back first, or choose another version")
    return AliasEvent(**vars(move), rev=rev + 1, at=max(at, last.at) if last else at)


def require_no_alias(record: AdapterRecord, aliases: Sequence[AliasEvent]) -> None:
    """A version that somebody is led to by name is not taken away.

    Raises:
        Conflict: an alias points at it.
    """
    if names := [alias.name for alias in aliases if alias.version == record.version]:
        raise Conflict(f"{record} is {', '.join(names)}; move that to another version first")
