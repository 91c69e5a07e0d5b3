"""What a coordinator says about adapters and base models, once its signature holds.

Nothing that it sends is used before it is checked here: by a key that this client trusts, for the
owner and the base model that were asked for, with the bytes that were promised.
"""

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf.message import DecodeError

from fedia3.adapters.encoding import digest
from fedia3.adapters.manifest import Manifest
from fedia3.errors import BadInput, BadSignature, Corrupt, WrongBaseModel
from fedia3.private_files import write_private
from fedia3.proto import adapters_pb2 as pb
from fedia3.proto.base_models_pb2 import SignedManifest
from fedia3.proto.signing import signed_bytes

Which = int | str  # a version's number, its digest, or an alias
LATEST = "latest"  # the alias of the newest version that is not yanked


@dataclass(frozen=True)
class AdapterVersion:
    """One version in the coordinator's registry; it never changes."""

    user: str | None  # whose own part it is; None is everyone's
    version: int  # 1, 2, 3, … for each owner and base
    digest: str  # sha256 (hex) of its file
    size: int  # bytes of its file
    base_digest: str
    schema_digest: str
    round_num: int
    num_examples: int
    created_at: datetime  # UTC, by the coordinator's clock
    global_digest: str | None = None  # the global version that an own part is relative to
    parent_digest: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    yanked: bool = False  # only who names it is given it
    revision: int = 0  # how often what its owner is served had changed by then
    alias: str = ""  # that was asked for; "" where a version or a digest was named

    def __str__(self) -> str:
        return f"version {self.version} of {named(self.user)}"


class TrustedKeys:
    """The keys that sign a coordinator's words.

    A device pins them when it enrols. Who has none takes the first that comes over a connection
    that the CA vouches for, and no other after it; with ``file`` also in later processes.
    """

    def __init__(self, keys: tuple[bytes, ...] = (), file: Path | None = None) -> None:
        self._file = file
        self._keys = keys or self._kept()

    def require(self, kind: str, payload: bytes, signature: bytes, key: bytes) -> None:
        """Refuse what none of the keys signed.

        Raises:
            BadSignature: the key is another, or the signature is not its.
        """
        if self._keys and key not in self._keys:
            raise BadSignature(
                f"the {kind} is signed with a key that is not the coordinator's; if the operator "
                "changed it, enrol anew"
            )
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(signature, signed_bytes(kind, payload))
        except (InvalidSignature, ValueError) as error:
            raise BadSignature(f"the {kind} is not what the coordinator signed") from error
        if not self._keys:
            self._pin(key)

    def _pin(self, key: bytes) -> None:
        self._keys = (key,)
        if self._file is not None:
            write_private(self._file, json.dumps([b64encode(key).decode()]).encode())

    def _kept(self) -> tuple[bytes, ...]:
        if self._file is None or not self._file.exists():
            return ()
        try:
            return tuple(b64decode(key) for key in json.loads(self._file.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(
                f"{self._file} cannot be read ({error}); delete it to trust anew"
            ) from error


def opened_version(signed: pb.SignedRecord, keys: TrustedKeys) -> AdapterVersion:
    """The version that a signed record is about.

    Raises:
        BadSignature: no trusted key signed it.
        Corrupt: it is of no time that there is.
    """
    keys.require("record", signed.record, signed.signature, signed.key)
    try:
        record = pb.AdapterRecord.FromString(signed.record)
    except DecodeError as error:
        raise BadSignature("the signed record is no record") from error
    return AdapterVersion(
        user=_user_of(record.owner),
        version=record.version,
        digest=record.digest,
        size=record.size,
        base_digest=record.base_digest,
        schema_digest=record.schema_digest,
        round_num=record.round_num,
        num_examples=record.num_examples,
        created_at=_time(record.created_ms),
        global_digest=record.global_digest or None,
        parent_digest=record.parent_digest or None,
        metrics=dict(record.metrics),
        yanked=record.yanked,
        revision=record.revision,
        alias=record.alias,
    )


@dataclass(frozen=True)
class AliasMove:
    """One move of an alias, such as ``stable``; the newest says where it points."""

    user: str | None  # whose it is; None is everyone's
    name: str
    version: int | None  # None: at nothing any more
    rev: int  # 1, 2, 3, … for each alias
    actor: str
    reason: str
    at: datetime  # UTC, by the coordinator's clock


def move_of(move: pb.AliasMove) -> AliasMove:
    """A move as it was sent.

    Raises:
        Corrupt: it is of no time that there is.
    """
    return AliasMove(
        user=_user_of(move.owner),
        name=move.name,
        version=move.version or None,
        rev=move.rev,
        actor=move.actor,
        reason=move.reason,
        at=_time(move.at_ms),
    )


def _user_of(owner: pb.Owner) -> str | None:
    return owner.user if owner.WhichOneof("owner") == "user" else None


def _time(ms: int) -> datetime:
    try:
        return datetime.fromtimestamp(ms / 1000, UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise Corrupt(f"the record's time is {ms} ms since 1970, which is no time") from error


def opened_manifest(signed: SignedManifest, keys: TrustedKeys) -> Manifest:
    """The manifest that was signed.

    Raises:
        BadSignature: no trusted key signed it.
        BadInput: this version of fedia3 cannot read it.
    """
    keys.require("manifest", signed.manifest, signed.signature, signed.key)
    try:
        return Manifest.from_json(signed.manifest.decode())
    except UnicodeDecodeError as error:
        raise BadSignature("the signed manifest is no text") from error


def require_asked_for(
    version: AdapterVersion,
    user: str | None,
    base_digest: str,
    which: Which | None = None,
    *,
    floor: int = 0,
) -> None:
    """Refuse a version of somebody else, of another base model, another, or of the past.

    Args:
        which: that was asked for; any, where it is None.
        floor: the largest revision seen before.

    Raises:
        WrongBaseModel: it belongs to another base model.
        Corrupt: it is not what was asked for.
    """
    if version.user != user:
        raise Corrupt(f"asked for an adapter of {named(user)}, got {version}; it is not used")
    if version.base_digest != base_digest:
        raise WrongBaseModel(
            f"asked for an adapter of base model {base_digest[:12]}, got one of "
            f"{version.base_digest[:12]}; it is not used"
        )
    if which is not None and which not in (version.version, version.digest, version.alias):
        raise Corrupt(f"asked for {which!r} of {named(user)}, got {version}; it is not used")
    if version.revision < floor:
        raise Corrupt(
            f"{version} is what was served at revision {version.revision}, and revision {floor} "
            "was here before; it is not used: was the coordinator restored from an old backup?"
        )


def require_bytes(version: AdapterVersion, data: bytes) -> None:
    """Refuse bytes other than those that were signed for.

    Raises:
        Corrupt: size or sha256 differ.
    """
    if len(data) != version.size or digest(data) != version.digest:
        raise Corrupt(
            f"{version} has {version.size} bytes of digest {version.digest[:12]}, got {len(data)} "
            f"of {digest(data)[:12]}; they are not used"
        )


def owner_of(user: str | None) -> pb.Owner:
    """An owner as it is sent."""
    return pb.Owner(everyone=True) if user is None else pb.Owner(user=user)


def named(user: str | None) -> str:
    """An owner in words."""
    return "everyone" if user is None else f"user {user!r}"
