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
from fedia3.coordinator.records import AdapterRecord, Owner, checked_digest
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.services.calls import Caller, Handlers, Signer
from fedia3.coordinator.store import no_version
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
            "/fedia3.v1.Adapters/Erase": self.erase,
        }

    def publish(self, request: pb.PublishRequest, caller: Caller) -> pb.SignedRecord:
        """Keep the calling device's user's own part; with the same key and bytes, once."""
        if not request.idem_key:
            raise BadInput("a publish names its idem_key, 1 to 128 characters, got none")
        record = self._registry.publish_personal(
            _user(caller),
            checked_part(request, self._schema_to_publish(request.base_digest)),
            num_examples=request.num_examples,
            metrics=dict(request.metrics),
            idem_key=request.idem_key,
            age=_age(request.age_ms),
        )
        log.info("device %s published %s", caller.known.name, record.digest[:12])
        return self._signed(record)

    def resolve(self, request: pb.ResolveRequest, caller: Caller) -> pb.SignedRecord:
        """Which version an owner has, the newest where none is named."""
        owner, base = _readable(request.owner, request.base_digest, caller, request.version)
        return self._signed(self._registry.store.find(owner, base, request.version or None))

    def fetch(self, request: pb.FetchRequest, caller: Caller) -> pb.FetchResponse:
        """A version and its bytes; where the caller has those already, only that word."""
        owner, base = _readable(request.owner, request.base_digest, caller, request.version)
        version = request.version or None
        if request.if_none_match:
            found = self._registry.store.find(owner, base, version)
            if found.digest == request.if_none_match:
                return pb.FetchResponse(unchanged=True)
        record, data = self._registry.fetch(owner, base, version)
        return pb.FetchResponse(record=self._signed(record), data=data)

    def list(self, request: pb.ListRequest, caller: Caller) -> pb.ListResponse:
        """A page of an owner's versions, newest first."""
        if not 0 <= request.limit <= MAX_PAGE or request.before_version < 0:
            raise BadInput(
                f"a page holds 1 to {MAX_PAGE} versions below a positive one, got limit "
                f"{request.limit} below {request.before_version}"
            )
        owner, base = _readable(request.owner, request.base_digest, caller)
        before, limit = request.before_version or None, request.limit or MAX_PAGE
        records = self._registry.versions(owner, base, before, limit)
        return pb.ListResponse(records=[self._signed(record) for record in records])

    def compare(self, request: pb.CompareRequest, caller: Caller) -> pb.CompareResponse:
        """How far apart the scales of two versions are, target by target.

        A user's own part counts with the global version that it was trained on.
        """
        base, versions = request.base_digest, (request.left_version, request.right_version)
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

    def _scales(self, owner: Owner, schema: Schema, version: int) -> Adapter:
        record, data = self._registry.fetch(owner, schema.base_digest, version or None)
        if record.form == "adapter":
            return encoding.decode(data, schema)
        personal, everyone = encoding.decode_personal(data, schema), Owner.everyone()
        anchor = self._registry.store.find_digest(
            everyone, schema.base_digest, personal.global_digest
        )
        _, anchor_data = self._registry.fetch(everyone, schema.base_digest, anchor.version)
        return personal.on(encoding.decode(anchor_data, schema))

    def _signed(self, record: AdapterRecord) -> pb.SignedRecord:
        message = to_message(record, self._registry.size(record))
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


def to_message(record: AdapterRecord, size: int) -> pb.AdapterRecord:
    """A version as it is sent; ``size`` is its file's bytes."""
    everyone = record.owner.kind == "global"
    return pb.AdapterRecord(
        owner=pb.Owner(everyone=True) if everyone else pb.Owner(user=record.owner.name),
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
    )


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


def _readable(wanted: pb.Owner, base: str, caller: Caller, version: int = 0) -> tuple[Owner, str]:
    """Whose adapters are asked for on which base, if the caller may know of them.

    Raises:
        BadInput: the request names no owner, or no digest.
        NotFound: they are somebody else's.
    """
    checked_digest(base, "a base model's digest")
    which = wanted.WhichOneof("owner")
    if which is None or (which == "everyone" and not wanted.everyone):
        raise BadInput("an owner is everyone (true) or a user's name, got neither")
    owner = Owner.everyone() if which == "everyone" else Owner.user(wanted.user)
    is_device = caller.known.kind == "device"
    if is_device and owner.kind == "user" and owner.name != caller.known.user:
        raise no_version(owner, base, version or None)
    return owner, base
