"""A coordinator from Python: fetch what a user is served, publish, compare, erase, get the base.

    from fedia3 import Coordinator

    with Coordinator.from_state() as home:              # an enrolled device
        served = home.served()
    with Coordinator("home:8443", ca=pem, token=token) as home:   # a service with its token
        served = home.served("alice")

What was fetched is kept on the disk and checked whenever it is used. Where the coordinator is out
of reach, or says what does not hold, the last good version answers, and ``fallback`` says why.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeGuard, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import Message

from fedia3.adapters import encoding, manifest
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.base_store import BaseEntry, BaseStore, default_home
from fedia3.adapters.dial import Alpha
from fedia3.adapters.manifest import Manifest
from fedia3.adapters.peft_folder import write_peft_folder_for
from fedia3.adapters.schema import Schema
from fedia3.client.base_download import BaseDownload, Progress
from fedia3.client.cache import AdapterCache, Good, checked
from fedia3.client.device import DeviceFolder
from fedia3.client.personal_store import KeptPart, PersonalStore, Shared
from fedia3.client.records import (
    LATEST,
    AdapterVersion,
    AliasMove,
    TrustedKeys,
    Which,
    move_of,
    named,
    opened_manifest,
    opened_version,
    owner_of,
    require_asked_for,
    require_bytes,
)
from fedia3.client.renewal import Renewal
from fedia3.clock import wall_ms
from fedia3.errors import (
    BadInput,
    BadSignature,
    Corrupt,
    Fedia3Error,
    NotFound,
    StorageFailed,
    Unreachable,
    WrongBaseModel,
)
from fedia3.private_files import write_private
from fedia3.proto import adapters_pb2 as pb
from fedia3.proto.base_models_pb2 import GetManifestRequest, SignedManifest
from fedia3.proto.caller import TIMEOUT_S, Caller

Answer = TypeVar("Answer", bound=Message)

PAGE = 100  # versions asked for at once
# The coordinator has nothing better to offer just now, or what it offers does not hold.
_FALLBACK = (Unreachable, Corrupt, StorageFailed, BadSignature, WrongBaseModel)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fetched:
    """A version and its file; every promise about it was checked."""

    version: AdapterVersion
    data: bytes
    fallback: str | None = None  # why this is the last good one and not the coordinator's word


@dataclass(frozen=True)
class Served:
    """What a user is served: the newest global adapter, with their own part on it if there is one.

    ``personal`` is the part in the coordinator's registry, ``unshared`` the one that only this
    device has; at most one of them is set.
    """

    adapter: Adapter
    everyone: AdapterVersion | None  # None before the first round
    personal: AdapterVersion | None = None
    unshared: KeptPart | None = None
    fallback: str | None = None  # why something in it is the last good one

    @property
    def choice(self) -> str:
        """``personal`` or ``global``."""
        return "personal" if self.personal or self.unshared else "global"


@dataclass(frozen=True)
class TargetDifference:
    """How far apart two adapters are on one target."""

    key: str
    distance: float  # L2, between the effective scales
    largest: float  # of one scale


@dataclass(frozen=True)
class Comparison:
    """How far apart two versions are."""

    distance: float
    targets: tuple[TargetDifference, ...]


class Coordinator:
    """One coordinator; may be used by several threads at once.

    Any call may raise what :meth:`Caller.call` raises.

    Args:
        address: ``host:port``.
        ca: PEM of the authority that signs the coordinator's certificates.
        token: a device's, a service's or the operator's.
        signing_key: of a device; without it nothing can be published or erased.
        keys: Ed25519, raw; sign manifests and records. By default the first that comes.
        user: the device's; whose adapter is meant where none is named.
        base: digest of the base model, by default the one that rounds train.
        cache: folder of what was fetched, by default one for this coordinator in fedia3's home.
        store: where base models lie.
        timeout_s: how long a call may take, its repeats included.
    """

    def __init__(
        self,
        address: str,
        *,
        ca: bytes,
        token: str,
        signing_key: Ed25519PrivateKey | None = None,
        keys: tuple[bytes, ...] = (),
        user: str | None = None,
        base: str | None = None,
        cache: Path | None = None,
        store: BaseStore | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.user = user
        self._base = base
        self._root = cache or _cache_of(address, ca)
        self._store = store or BaseStore()
        self._keys = TrustedKeys(keys, None if keys else self._root / "keys.json")
        self._cache = AdapterCache(self._root / "adapters", self._keys)
        self._caller = Caller(
            address, ca=ca, token=token, signing_key=signing_key, timeout_s=timeout_s
        )
        self._renewal: Renewal | None = None

    @classmethod
    def from_state(
        cls,
        state: Path | DeviceFolder | None = None,
        *,
        store: BaseStore | None = None,
        timeout_s: float = TIMEOUT_S,
        now_ms: Callable[[], int] = wall_ms,
    ) -> Self:
        """The coordinator that the device in ``state`` is enrolled with.

        Raises:
            NotFound: there is no enrolled device.
        """
        folder = state if isinstance(state, DeviceFolder) else DeviceFolder(state)
        known = folder.enrolment()
        made = cls(
            known.address,
            ca=folder.ca(),
            token=known.token,
            signing_key=folder.keys().signing,
            keys=known.coordinator_keys,
            user=known.user,
            base=known.base_digest,
            cache=folder.path,
            store=store,
            timeout_s=timeout_s,
        )
        made._renewal = Renewal(folder, known, made._caller, now_ms)
        return made

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
        """Hang up; calls under way end as :class:`Unreachable`."""
        self._caller.close()

    @property
    def address(self) -> str:
        """``host:port``."""
        return self._caller.address

    def manifest(self, base: str | None = None) -> Manifest:
        """A base model's manifest, by digest or name; by default that of :attr:`base_digest`.

        Raises:
            NotFound: the coordinator has no such base model.
            BadSignature: what came was not signed by the coordinator.
        """
        wanted = self.base_digest if base is None else base
        if not encoding.SHA256_HEX.fullmatch(wanted):
            return self._asked_manifest(GetManifestRequest(name=wanted))
        known = self._known_manifest(wanted)
        return known or self._asked_manifest(GetManifestRequest(digest=wanted))

    @cached_property
    def base_digest(self) -> str:
        """The base model whose adapters are meant."""
        if self._base is not None:
            return self._base
        kept = self._root / "base"
        try:
            digest = self._asked_manifest(GetManifestRequest()).digest
        except Unreachable:
            if not kept.exists():
                raise
            return kept.read_text()
        write_private(kept, digest.encode())
        return digest

    def base_of_rounds(self) -> Manifest:
        """The manifest of the base model that rounds train now, whichever this caller uses."""
        return self._asked_manifest(GetManifestRequest())

    @cached_property
    def schema(self) -> Schema:
        """The shape of this base model's adapters."""
        return manifest.schema(self.manifest())

    def download_base(
        self, base: str | None = None, progress: Progress = lambda _done, _total: None
    ) -> BaseEntry:
        """Have the base model on this machine; see :class:`BaseDownload`."""
        download = BaseDownload(self._caller, self._store, progress)
        return download.fetch(self.manifest(base))

    def resolve(self, user: str | None = None, which: Which = LATEST) -> AdapterVersion:
        """A version without its bytes: everyone's, or ``user``'s.

        Args:
            which: its number, its digest or an alias; ``latest`` is the newest not yanked.

        Raises:
            NotFound: there is none, or it is somebody else's.
        """
        request = pb.ResolveRequest(
            owner=owner_of(user), base_digest=self.base_digest, **_named(which)
        )
        signed = self._call("Adapters/Resolve", request, pb.SignedRecord)
        floor = self._cache.floor(user, self.base_digest, which) if _moves(which) else 0
        return self._opened(signed, user, which, floor)

    def fetch(self, user: str | None = None, which: Which = LATEST) -> Fetched:
        """A version and its file: everyone's, or ``user``'s; see :meth:`resolve`.

        What an alias points at is kept, the latest too; where nothing changed, the coordinator
        sends but a word.

        Raises:
            NotFound: there is none, or it is somebody else's; what was kept of a user's part is
                deleted.
            BadSignature, WrongBaseModel, Corrupt: what came does not hold, and nothing good is
                kept.
        """
        if not _moves(which):
            return self._fetched_exactly(user, which)
        good = self._kept(user, which)
        try:
            return self._fetched_now(user, which, good)
        except (NotFound, *_FALLBACK) as error:
            if isinstance(error, NotFound) and (user is not None or which != LATEST):
                self._cache.forget_alias(user, self.base_digest, which)  # erased, or dropped
                raise
            if good is None:
                raise
            logger.warning("going on with %s: %s", good.version, error)
            return Fetched(good.version, good.data, fallback=str(error))

    def served(self, user: str | None = None, alpha: Alpha = 1.0, which: Which = LATEST) -> Served:
        """What a user is served, by default the device's: ``alpha`` 0 is the global adapter alone.

        A part that only this device has counts where it is newer than the shared one.

        Args:
            which: of everyone's adapters, such as ``stable``.

        Raises:
            NotFound: there is no global adapter yet, no such alias, or it is another user's device.
            BadSetting: the dial ``alpha`` does not fit the base model's schema.
        """
        whose = self._whose(user)
        everyone = self._found(None) if which == LATEST else self.fetch(None, which)
        own, silence = self._own(whose, everyone)
        local = self._local(own)
        notes = [found.fallback for found in (everyone, own) if found and found.fallback]
        notes += [silence] if silence else []
        if everyone is None and local is None:
            raise NotFound(
                f"{self.address} has no adapter for base model {self.base_digest[:12]} yet; it "
                "comes with the first round"
            )
        served = Served(
            self._global(everyone),
            everyone.version if everyone else None,
            fallback="; ".join(dict.fromkeys(notes)) or None,
        )
        if local is not None and local[0].judged.choice == "global":
            return served
        if local is not None and not _is_same(local[0], own):
            kept, part = local
            return _with(served, part, alpha, unshared=kept)
        if own is not None:
            part = encoding.decode_personal(own.data, self.schema)
            return _with(served, part, alpha, personal=own.version)
        return served

    def save(
        self,
        out: Path,
        user: str | None = None,
        alpha: Alpha = 1.0,
        which: Which = LATEST,
    ) -> Served:
        """Write what a user is served as a Hugging Face PEFT folder; see :meth:`served`.

        The base model need not be on this machine.

        Raises:
            BadInput: ``out`` holds something else than an adapter.
        """
        served, base = self.served(user, alpha, which), self.manifest()
        write_peft_folder_for(base, served.adapter, out, base_name=self._base_name(base))
        return served

    def versions(self, user: str | None = None) -> Iterator[AdapterVersion]:
        """Everyone's versions, or ``user``'s, newest first, page by page."""
        before = 0
        while True:
            request = pb.ListRequest(
                owner=owner_of(user),
                base_digest=self.base_digest,
                before_version=before,
                limit=PAGE,
            )
            page = self._call("Adapters/List", request, pb.ListResponse).records
            for signed in page:
                found = self._opened(signed, user)
                yield found
                before = found.version
            if len(page) < PAGE:
                return

    def aliases(self, user: str | None = None) -> tuple[AliasMove, ...]:
        """Everyone's aliases that point at something, or ``user``'s, by name."""
        request = pb.ListAliasesRequest(owner=owner_of(user), base_digest=self.base_digest)
        answer = self._call("Adapters/ListAliases", request, pb.ListAliasesResponse)
        return tuple(move_of(move) for move in answer.aliases)

    def alias_history(self, name: str, user: str | None = None) -> Iterator[AliasMove]:
        """Where an alias of everyone's, or ``user``'s, pointed when, newest first."""
        before = 0
        while True:
            request = pb.AliasHistoryRequest(
                owner=owner_of(user),
                base_digest=self.base_digest,
                name=name,
                before_rev=before,
                limit=PAGE,
            )
            moves = self._call("Adapters/AliasHistory", request, pb.AliasHistoryResponse).moves
            for move in moves:
                yield move_of(move)
                before = move.rev
            if len(moves) < PAGE:
                return

    def promote(
        self,
        name: str,
        version: int | None,
        *,
        expected_rev: int,
        user: str | None = None,
        reason: str = "",
    ) -> AliasMove:
        """Point an alias at a version, or at none; the operator everyone's, a device its user's.

        Args:
            expected_rev: only if nobody moved it since this revision, 0 for a new alias.

        Raises:
            NotFound: there is no such version, or no alias to drop.
            Conflict: somebody else moved it, or the version is yanked.
            NotAllowed: everyone's aliases are the operator's to move.
        """
        request = pb.PromoteRequest(
            owner=owner_of(user),
            base_digest=self.base_digest,
            name=name,
            version=version or 0,
            expected_rev=expected_rev,
            reason=reason,
        )
        return move_of(self._call("Adapters/Promote", request, pb.AliasMove))

    def roll_back(
        self, name: str, *, expected_rev: int, user: str | None = None, reason: str = ""
    ) -> AliasMove:
        """Point an alias at the version where it pointed before revision ``expected_rev``.

        Raises:
            NotFound: there is no such alias.
            Conflict: it pointed nowhere else before, or somebody else moved it.
            NotAllowed: everyone's aliases are the operator's to move.
        """
        request = pb.RollBackRequest(
            owner=owner_of(user),
            base_digest=self.base_digest,
            name=name,
            expected_rev=expected_rev,
            reason=reason,
        )
        return move_of(self._call("Adapters/RollBack", request, pb.AliasMove))

    def yank(self, version: int, *, user: str | None = None, undo: bool = False) -> AdapterVersion:
        """Let nobody be given a version who does not name it, or take that back.

        Raises:
            NotFound: there is no such version.
            Conflict: an alias points at it.
            NotAllowed: everyone's versions are the operator's to yank.
        """
        request = pb.YankRequest(
            owner=owner_of(user), base_digest=self.base_digest, version=version, undo=undo
        )
        return self._opened(self._call("Adapters/Yank", request, pb.SignedRecord), user, version)

    def compare(
        self,
        left: tuple[str | None, int],
        right: tuple[str | None, int],
    ) -> Comparison:
        """How far apart two versions are; each is a user, or None for everyone, and a number."""
        request = pb.CompareRequest(
            left_owner=owner_of(left[0]),
            left_version=left[1],
            right_owner=owner_of(right[0]),
            right_version=right[1],
            base_digest=self.base_digest,
        )
        answer = self._call("Adapters/Compare", request, pb.CompareResponse)
        targets = (TargetDifference(t.key, t.distance, t.largest) for t in answer.targets)
        return Comparison(answer.distance, tuple(targets))

    def publish(
        self,
        part: PersonalAdapter,
        *,
        num_examples: int,
        metrics: dict[str, float] | None = None,
        idem_key: str | None = None,
        age_ms: int = 0,
    ) -> AdapterVersion:
        """Give the device's user's own part to the registry; repeated, it is published once.

        ``age_ms`` is how long ago its training began: an erasure since then refuses it.

        Raises:
            Erased: the user was erased since, or erased what ``idem_key`` named.
            NotFound: the global version that it was trained on was never published.
            BadAdapter: nobody could read it back.
        """
        data = encoding.encode_personal(part)
        digest = encoding.digest(data)
        request = pb.PublishRequest(
            base_digest=part.schema.base_digest,
            data=data,
            digest=digest,
            num_examples=num_examples,
            metrics=metrics or {},
            idem_key=idem_key or f"part-{digest}",
            age_ms=age_ms,
        )
        signed = self._call("Adapters/Publish", request, pb.SignedRecord)
        version = opened_version(signed, self._keys)
        require_asked_for(version, self.user, part.schema.base_digest)
        require_bytes(version, data)
        return version

    def erase(self, base: str | None = None) -> int:
        """Delete the device's user's own parts, here and there; how many versions there were.

        ``base`` is a base model's digest; by default on every base model.
        """
        request = pb.EraseRequest(base_digest=base or "")
        erased = self._call("Adapters/Erase", request, pb.EraseResponse)
        if self.user is not None:
            self._cache.forget_user(self.user)
        return int(erased.versions)

    def _fetched_now(self, user: str | None, alias: str, good: Good | None) -> Fetched:
        request = pb.FetchRequest(
            owner=owner_of(user),
            base_digest=self.base_digest,
            alias=alias,
            if_none_match=good.version.digest if good else "",
        )
        answer = self._call("Adapters/Fetch", request, pb.FetchResponse)
        if answer.unchanged:
            if good is None:
                raise Corrupt(f"{self.address} says that nothing changed, but nothing was here")
            return Fetched(good.version, good.data)
        kept = self._cache.keep(answer, user, self.base_digest, alias)
        return Fetched(kept.version, kept.data)

    def _fetched_exactly(self, user: str | None, which: Which) -> Fetched:
        request = pb.FetchRequest(
            owner=owner_of(user), base_digest=self.base_digest, **_named(which)
        )
        answer = self._call("Adapters/Fetch", request, pb.FetchResponse)
        good = checked(answer, self._keys, user, self.base_digest, which)
        return Fetched(good.version, good.data)

    def _opened(
        self,
        signed: pb.SignedRecord,
        user: str | None,
        which: Which | None = None,
        floor: int = 0,
    ) -> AdapterVersion:
        version = opened_version(signed, self._keys)
        require_asked_for(version, user, self.base_digest, which, floor=floor)
        return version

    def _kept(self, user: str | None, alias: str = LATEST) -> Good | None:
        """The last good version; one that was damaged on the disk is as good as none."""
        try:
            return self._cache.load(user, self.base_digest, alias)
        except Fedia3Error as error:
            logger.warning("the kept adapter of %s is not used: %s", named(user), error)
            return None

    def _whose(self, user: str | None) -> str:
        whose = user or self.user
        if whose is None:
            raise BadInput("say whose adapter: this caller is no user's device")
        if self.user not in (None, whose):
            raise NotFound(
                f"no adapter of user {whose!r} here: this device belongs to {self.user!r} and "
                "reads only theirs"
            )
        return whose

    def _found(self, user: str | None) -> Fetched | None:
        try:
            return self.fetch(user)
        except NotFound:
            return None

    def _own(self, whose: str, everyone: Fetched | None) -> tuple[Fetched | None, str | None]:
        """The user's part; where it was not asked for and none is kept, why it may be missing.

        A coordinator that was no help with everyone's adapter is not waited for a second time.
        """
        try:
            if everyone is None or everyone.fallback is None:
                return self._found(whose), None
            silence = everyone.fallback
        except Unreachable as error:
            silence = str(error)
        good = self._kept(whose)
        kept = Fetched(good.version, good.data, fallback=silence) if good else None
        return kept, silence

    def _global(self, everyone: Fetched | None) -> Adapter:
        if everyone is None:
            return Adapter.ones(self.schema)
        return encoding.decode(everyone.data, self.schema)

    def _local(self, own: Fetched | None) -> tuple[KeptPart, PersonalAdapter] | None:
        """The part that this device made last, unless the shared one is newer."""
        if self._renewal is None:
            return None
        store = PersonalStore(self._renewal.folder.personal)
        local, given = store.current(self.schema), store.shared(self.base_digest)
        if local is None or own is None or _is_newer(local[0], given, own.version):
            return local
        return None

    def _known_manifest(self, digest: str) -> Manifest | None:
        """From this machine: the digest is all that has to hold."""
        places = [self._root / "manifests" / f"{digest}.json"]
        with suppress(NotFound, BadInput):
            places.insert(0, self._store.find(digest) / manifest.MANIFEST_FILE)
        for place in places:
            try:
                known = Manifest.from_json(place.read_text())
            except (OSError, ValueError, BadInput):
                continue
            if known.digest == digest:
                return known
        return None

    def _base_name(self, base: Manifest) -> str:
        """Its folder where it is on this machine."""
        with suppress(NotFound):
            return str(self._store.find(base.digest))
        return base.name

    def _asked_manifest(self, request: GetManifestRequest) -> Manifest:
        signed = self._call("BaseModels/GetManifest", request, SignedManifest)
        found = opened_manifest(signed, self._keys)
        if request.digest and found.digest != request.digest:
            raise Corrupt(
                f"asked for base model {request.digest[:12]}, got {found.digest[:12]}; it is not "
                "used"
            )
        if request.name and found.name != request.name:
            raise Corrupt(f"asked for base model {request.name}, got {found.name}; it is not used")
        write_private(self._root / "manifests" / f"{found.digest}.json", found.to_json().encode())
        return found

    def _call(self, name: str, request: Message, answer: type[Answer]) -> Answer:
        answered = self._caller.call(name, request, answer)
        if self._renewal is not None:
            self._renewal.renew_if_due()
        return answered


def _moves(which: Which) -> TypeGuard[str]:
    """Whether this is an alias, which may point elsewhere tomorrow."""
    return isinstance(which, str) and not encoding.SHA256_HEX.fullmatch(which)


def _named(which: Which) -> Mapping[str, Any]:
    """The request's field that says which version is meant."""
    if isinstance(which, int):
        return {"version": which}
    return {"alias" if _moves(which) else "digest": which}


def _with(
    served: Served,
    part: PersonalAdapter,
    alpha: Alpha,
    *,
    personal: AdapterVersion | None = None,
    unshared: KeptPart | None = None,
) -> Served:
    adapter = part.on(served.adapter, alpha)
    return replace(served, adapter=adapter, personal=personal, unshared=unshared)


def _is_same(kept: KeptPart, own: Fetched | None) -> bool:
    """Whether the registry has just this part."""
    return own is not None and own.version.digest == kept.digest


def _is_newer(kept: KeptPart, given: Shared | None, own: AdapterVersion) -> bool:
    """Whether the registry's part is no later than what this device gave it, or made itself."""
    if given is not None and given.version >= own.version:
        return True
    return kept.judged.made_ms >= own.created_at.timestamp() * 1000


def _cache_of(address: str, ca: bytes) -> Path:
    """A folder for one coordinator: another CA is another coordinator."""
    name = sha256(address.encode() + b"\0" + ca).hexdigest()[:16]
    return default_home() / "coordinators" / name
