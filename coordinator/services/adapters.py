"""``fedia3.v1.Adapters``: everyone's adapters, and each user's own.

A device sees its user's and everyone's. What belongs to somebody else it is told as if there were
none: without a look at what there is, so that neither words nor time give it away.
"""

import logging
from datetime import timedelta

import numpy as np

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.schema import Schema
from fedia3.coordinator.manifests import Manifests
from fedia3.coordinator.records import (
    LATEST,
    AdapterRecord,
    AliasEvent,
    AliasMove,
    Owner,
    checked_alias,
    checked_count,
    checked_digest,
    checked_version,
    is_digest,
)
from fedia3.coordinator.registry import Registry, Which, not_there
from fedia3.coordinator.services.calls import Caller, Handlers, Signer
from fedia3.errors import BadAdapter, BadInput, NotAllowed, NotFound, WrongBaseModel
from fedia3.proto import adapters_pb2 as pb
from fedia3.proto.contract import MAX_MESSAGE

log = logging.getLogger(__name__)

MAX_ADAPTER = MAX_MESSAGE - (64 << 10)  # bytes; the rest of the message is for what is said of it
MAX_PAGE = 100
OLDEST = timedelta(days=3650)  # older than any erasure; its beginning can still be told


class AdaptersService:
    """Keeps and hands out adapters."""

    def __init__(self, registry: Registry, manifests: Manifests, signer: Signer) -> None:
        self._registry, self._manifests, self._signer = registry, manifests, signer

    @property
    def handlers(self) -> Handlers:
        """This service's methods by path."""
        return {
            "/fedia3.v1.Adapters/Publish": self.publish,
            "/fedia3.v1.Adapters/Resolve": self.resolve,
            "/fedia3.v1.Adapters/Fetch": self.fetch,
            "/fedia3.v1.Adapters/List": self.list,
            "/fedia3.v1.Adapters/Compare": self.compare,
            "/fedia3.v1.Adapters/ListAliases": self.list_aliases,
            "/fedia3.v1.Adapters/AliasHistory": self.alias_history,
            "/fedia3.v1.Adapters/Promote": self.promote,
            "/fedia3.v1.Adapters/RollBack": self.roll_back,
            "/fedia3.v1.Adapters/Yank": self.yank,
            "/fedia3.v1.Adapters/Erase": self.erase,
        }

    def publish(self, request: pb.PublishRequest, caller: Caller) -> pb.SignedRecord:
        """Keep the calling device's user's own part; with the same key and bytes, once."""
        if not request.idem_key:
            raise BadInput("a publish names its idem_key, 1 to 128 characters, got none")
        user = _user(caller)
        part = checked_part(request, self._schema_to_publish(request.base_digest))
        require_usable(part, self._trained_on(part))
        record = self._registry.publish_personal(
            user,
            part,
            num_examples=request.num_examples,
            metrics=dict(request.metrics),
            idem_key=request.idem_key,
            age=_age(request.age_ms),
        )
        log.info("device %s published %s", caller.known.name, record.digest[:12])
        revision = self._registry.store.revision(record.owner, record.base)
        return self._signed(record, record.version, revision)

    def resolve(self, request: pb.ResolveRequest, caller: Caller) -> pb.SignedRecord:
        """Which version an owner has, the newest where none is named."""
        which = _which(request)
        owner, base = _readable(request.owner, request.base_digest, caller, which)
        revision = self._registry.store.revision(owner, base)
        return self._signed(self._registry.find(owner, base, which), which, revision)

    def fetch(self, request: pb.FetchRequest, caller: Caller) -> pb.FetchResponse:
        """A version and its bytes; where the caller has those already, only that word."""
        which = _which(request)
        owner, base = _readable(request.owner, request.base_digest, caller, which)
        revision = self._registry.store.revision(owner, base)  # first: it may only be too small
        record = self._registry.find(owner, base, which)
        if request.if_none_match == record.digest:
            return pb.FetchResponse(unchanged=True)
        data = self._registry.read(record)
        return pb.FetchResponse(record=self._signed(record, which, revision), data=data)

    def list(self, request: pb.ListRequest, caller: Caller) -> pb.ListResponse:
        """A page of an owner's versions, newest first."""
        before, limit = _page(request.before_version, request.limit)
        owner, base = _readable(request.owner, request.base_digest, caller)
        revision = self._registry.store.revision(owner, base)
        records = self._registry.versions(owner, base, before, limit)
        return pb.ListResponse(records=[self._signed(r, r.version, revision) for r in records])

    def list_aliases(
        self, request: pb.ListAliasesRequest, caller: Caller
    ) -> pb.ListAliasesResponse:
        """An owner's aliases that point at something, by name."""
        owner, base = _readable(request.owner, request.base_digest, caller)
        moves = self._registry.store.aliases(owner, base)
        return pb.ListAliasesResponse(aliases=[move_message(move) for move in moves])

    def alias_history(
        self, request: pb.AliasHistoryRequest, caller: Caller
    ) -> pb.AliasHistoryResponse:
        """A page of an alias's moves, newest first."""
        before, limit = _page(request.before_rev, request.limit)
        owner, base = _readable(request.owner, request.base_digest, caller)
        name = checked_alias(request.name)
        moves = self._registry.store.alias_events(owner, base, name, before, limit)
        return pb.AliasHistoryResponse(moves=[move_message(move) for move in moves])

    def promote(self, request: pb.PromoteRequest, caller: Caller) -> pb.AliasMove:
        """Point an alias at a version, or at none."""
        owner, base = _changeable(request.owner, request.base_digest, caller)
        checked_count(request.expected_rev, "the expected revision")
        move = AliasMove(
            owner=owner,
            base=base,
            name=request.name,
            version=request.version or None,
            actor=caller.known.name,
            reason=request.reason,
        )
        moved = self._registry.promote(move, request.expected_rev)
        log.info("%s moved %s to %s", moved.actor, moved, moved.version or "nothing")
        return move_message(moved)

    def roll_back(self, request: pb.RollBackRequest, caller: Caller) -> pb.AliasMove:
        """Point an alias at the version where it pointed before."""
        owner, base = _changeable(request.owner, request.base_digest, caller)
        moved = self._registry.roll_back(
            owner,
            base,
            request.name,
            expected_rev=checked_count(request.expected_rev, "the expected revision"),
            actor=caller.known.name,
            reason=request.reason,
        )
        log.info("%s rolled %s back to version %s", moved.actor, moved, moved.version)
        return move_message(moved)

    def yank(self, request: pb.YankRequest, caller: Caller) -> pb.SignedRecord:
        """Let nobody be given a version who does not name it, or take that back."""
        owner, base = _changeable(request.owner, request.base_digest, caller)
        store, version = self._registry.store, request.version
        (store.unyank if request.undo else store.yank)(owner, base, version)
        log.info(
            "%s %s version %d", caller.known.name, "unyanked" if request.undo else "yanked", version
        )
        revision = store.revision(owner, base)
        return self._signed(store.find(owner, base, version), version, revision)

    def compare(self, request: pb.CompareRequest, caller: Caller) -> pb.CompareResponse:
        """How far apart the scales of two versions are, target by target.

        A user's own part counts with the global version that it was trained on.
        """
        base = request.base_digest
        versions = request.left_version or LATEST, request.right_version or LATEST
        left, _ = _readable(request.left_owner, base, caller, versions[0])
        right, _ = _readable(request.right_owner, base, caller, versions[1])
        schema = self._manifests.find(base).schema
        return compared(
            self._scales(left, schema, versions[0]),
            self._scales(right, schema, versions[1]),
        )

    def erase(self, request: pb.EraseRequest, caller: Caller) -> pb.EraseResponse:
        """Delete every version of the calling device's user's own parts, bytes included."""
        base = request.base_digest
        base_or_all = checked_digest(base, "a base model's digest") if base else None
        erased = self._registry.erase_user(_user(caller), base_or_all).tombstone
        log.info(
            "device %s erased its user's %d versions, receipt %s",
            caller.known.name,
            erased.versions,
            erased.receipt,
        )
        return pb.EraseResponse(versions=erased.versions)

    def _schema_to_publish(self, base: str) -> Schema:
        try:
            return self._manifests.find(base).schema
        except NotFound as error:
            raise WrongBaseModel(str(error)) from error

    def _scales(self, owner: Owner, schema: Schema, which: Which) -> Adapter:
        record = self._registry.find(owner, schema.base_digest, which)
        return self._registry.scales(record, schema)

    def _trained_on(self, personal: PersonalAdapter) -> Adapter:
        """The global version that a user's own part is relative to."""
        everyone, schema = Owner.everyone(), personal.schema
        found = self._registry.find(everyone, schema.base_digest, personal.global_digest)
        return self._registry.scales(found, schema)

    def _signed(self, record: AdapterRecord, which: Which, revision: int) -> pb.SignedRecord:
        is_named = isinstance(which, int) or is_digest(which)
        message = to_message(record, self._registry.size(record), revision)
        message.alias = "" if is_named else str(which)
        data = message.SerializeToString(deterministic=True)
        signature = self._signer.sign("record", data)
        return pb.SignedRecord(record=data, signature=signature, key=self._signer.public_key)


def checked_part(request: pb.PublishRequest, schema: Schema) -> PersonalAdapter:
    """The personal part that a publish carries.

    Raises:
        BadAdapter: the bytes are too many, not what was announced, break the form or do not fit.
        WrongBaseModel: they are for another base model than the request.
    """
    if len(request.data) > MAX_ADAPTER:
        raise BadAdapter(f"an adapter has at most {MAX_ADAPTER} bytes, got {len(request.data)}")
    part = encoding.decode_personal(request.data, schema, claimed_digest=request.digest)
    # Kept are the form's own bytes: under any others the publisher would not find it again.
    if encoding.encode_personal(part) != request.data:
        raise BadAdapter("the file is not in the form's one order; write it with encode_personal")
    return part


def require_usable(part: PersonalAdapter, trained_on: Adapter) -> None:
    """Refuse a part under which the base model could not speak.

    Raises:
        BadAdapter: on the version it was trained on, its scales all vanish or one is beyond ±100.
    """
    try:
        encoding.require_scales(trained_on.vector + part.delta)
    except BadAdapter as error:
        raise BadAdapter(f"on the global version that the part names: {error}") from error


def compared(left: Adapter, right: Adapter) -> pb.CompareResponse:
    """The distance of every target's scales, and of all of them."""
    difference = left.vector.astype(np.float64) - right.vector
    targets = [
        pb.CompareResponse.Target(
            key=key,
            distance=float(np.linalg.norm(difference[part])),
            largest=float(np.abs(difference[part]).max()),
        )
        for key, part in left.schema.slices.items()
    ]
    return pb.CompareResponse(targets=targets, distance=float(np.linalg.norm(difference)))


def to_message(record: AdapterRecord, size: int, revision: int) -> pb.AdapterRecord:
    """A version as it is sent; ``size`` is its file's bytes, ``revision`` its owner's."""
    return pb.AdapterRecord(
        owner=_owner_message(record.owner),
        version=record.version,
        digest=record.digest,
        size=size,
        base_digest=record.base,
        schema_digest=record.schema_digest,
        round_num=record.round_num,
        num_examples=record.num_examples,
        global_digest=record.global_digest or "",
        parent_digest=record.parent or "",
        created_ms=round(record.created_at.timestamp() * 1000),
        metrics=record.metrics,
        yanked=record.yanked,
        revision=revision,
    )


def move_message(move: AliasEvent) -> pb.AliasMove:
    """A move as it is sent."""
    return pb.AliasMove(
        owner=_owner_message(move.owner),
        base_digest=move.base,
        name=move.name,
        version=move.version or 0,
        rev=move.rev,
        actor=move.actor,
        reason=move.reason,
        at_ms=round(move.at.timestamp() * 1000),
    )


def _owner_message(owner: Owner) -> pb.Owner:
    return pb.Owner(everyone=True) if owner.kind == "global" else pb.Owner(user=owner.name)


def _which(request: pb.ResolveRequest | pb.FetchRequest) -> Which:
    """What is asked for: a version's number, a digest, an alias, by default the latest.

    Raises:
        BadInput: it is none of these.
    """
    match request.WhichOneof("which"):
        case "version":
            return checked_version(request.version)
        case "digest":
            return checked_digest(request.digest, "a version's digest")
        case "alias" if request.alias != LATEST:
            return checked_alias(request.alias)
    return LATEST


def _page(before: int, limit: int) -> tuple[int | None, int]:
    """Below what a page begins, and how much it holds.

    Raises:
        BadInput: no page is like that.
    """
    if not 0 <= limit <= MAX_PAGE or before < 0:
        raise BadInput(
            f"a page holds 1 to {MAX_PAGE} entries below a positive number, got limit {limit} "
            f"below {before}"
        )
    return before or None, limit or MAX_PAGE


def _changeable(wanted: pb.Owner, base: str, caller: Caller) -> tuple[Owner, str]:
    """Whose adapters are to be changed on which base, if they are the caller's to change.

    Raises:
        BadInput: the request names no owner, or no digest.
        NotFound: they are somebody else's.
        NotAllowed: they are everyone's, and the caller is not the operator.
    """
    owner, base = _readable(wanted, base, caller)
    if owner.kind == "global" and caller.known.kind != "admin":
        raise NotAllowed("everyone's adapters are changed by the operator")
    return owner, base


def _age(age_ms: int) -> timedelta:
    """How long ago a part's training began."""
    if age_ms < 0:
        raise BadInput(f"a part's age_ms is not negative, got {age_ms}")
    return min(timedelta(milliseconds=min(age_ms, 2**53)), OLDEST)


def _user(caller: Caller) -> str:
    """The user whose device is calling."""
    if caller.known.user is None:
        raise NotAllowed("only a user's device has parts of its own")
    return caller.known.user


def _readable(
    wanted: pb.Owner, base: str, caller: Caller, which: Which = LATEST
) -> tuple[Owner, str]:
    """Whose adapters are asked for on which base, if the caller may know of them.

    Raises:
        BadInput: the request names no owner, or no digest.
        NotFound: they are somebody else's.
    """
    checked_digest(base, "a base model's digest")
    named = wanted.WhichOneof("owner")
    if named is None or (named == "everyone" and not wanted.everyone):
        raise BadInput("an owner is everyone (true) or a user's name, got neither")
    owner = Owner.everyone() if named == "everyone" else Owner.user(wanted.user)
    is_device = caller.known.kind == "device"
    if is_device and owner.kind == "user" and owner.name != caller.known.user:
        raise not_there(owner, base, which)
    return owner, base
