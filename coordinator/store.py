"""The seam to what the registry remembers: metadata only, bytes lie in the blob store.

A store is right when it passes ``tests/coordinator/test_store_contract.py``. What every backend
has to decide inside its own transaction is written once, as pure functions, at the end.
"""

import hmac
import secrets
from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from typing import Protocol

from fedia3.coordinator.records import (
    AdapterDraft,
    AdapterRecord,
    Owner,
    OwnerKind,
    RoundCommit,
    RoundRecord,
    Tombstone,
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
        """One version, the latest where none is named.

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
