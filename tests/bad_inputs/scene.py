"""A coordinator that listens, two people's phones, and calls that no caller of ours would make."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from fedia3.adapters import encoding, manifest
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.coordinator.records import Owner
from fedia3.errors import Fedia3Error
from fedia3.proto import adapters_pb2 as pb
from fedia3.proto import enrolment_pb2 as enrolment
from fedia3.proto.contract import METHODS
from fedia3.proto.rules_pb2 import Scope
from fedia3.proto.signing import (
    NONCE_HEADER,
    SIGNATURE_HEADER,
    TIME_HEADER,
    TOKEN_HEADER,
    enrolment_bytes,
    request_bytes,
)
from fedia3.testing_service import (
    NO_LIMITS,
    EnrolledDevice,
    RunningService,
    node_pem,
    running_service,
)

Code = grpc.StatusCode
Answer = tuple[grpc.StatusCode, str]

BAD_INPUT = Code.INVALID_ARGUMENT, "REASON_BAD_INPUT"
BAD_ADAPTER = Code.INVALID_ARGUMENT, "REASON_BAD_ADAPTER"
WRONG_BASE = Code.FAILED_PRECONDITION, "REASON_WRONG_BASE_MODEL"
NO_DEADLINE = Code.INVALID_ARGUMENT, "REASON_NO_DEADLINE"
OUT_OF_RANGE = Code.OUT_OF_RANGE, "REASON_OUT_OF_RANGE"
NOT_FOUND = Code.NOT_FOUND, "REASON_NOT_FOUND"
CONFLICT = Code.ABORTED, "REASON_CONFLICT"
CORRUPT = Code.DATA_LOSS, "REASON_CORRUPT"
BAD_TOKEN = Code.UNAUTHENTICATED, "REASON_BAD_TOKEN"
BAD_INVITE = Code.UNAUTHENTICATED, "REASON_BAD_INVITE"
BAD_SIGNATURE = Code.UNAUTHENTICATED, "REASON_BAD_SIGNATURE"
REPLAYED = Code.UNAUTHENTICATED, "REASON_REPLAYED"
WRONG_CLOCK = Code.UNAUTHENTICATED, "REASON_CLOCK"
NOT_ALLOWED = Code.PERMISSION_DENIED, "REASON_NOT_ALLOWED"
TOO_MANY_CALLS = Code.RESOURCE_EXHAUSTED, "REASON_TOO_MANY_CALLS"
UNAVAILABLE = Code.UNAVAILABLE, "REASON_UNAVAILABLE"
# What gRPC answers by itself, before a word of ours.
TOO_LARGE, UNKNOWN_METHOD = (Code.RESOURCE_EXHAUSTED, ""), (Code.UNIMPLEMENTED, "")
NO_CONNECTION = Code.UNAVAILABLE, ""

PUBLISH, FETCH, RESOLVE, LIST, COMPARE, ERASE, PROMOTE, ROLL_BACK, YANK, HISTORY = (
    f"/fedia3.v1.Adapters/{name}"
    for name in (
        "Publish", "Fetch", "Resolve", "List", "Compare", "Erase",
        "Promote", "RollBack", "Yank", "AliasHistory",
    )
)  # fmt: skip
BEGIN, COMPLETE = "/fedia3.v1.Enrolment/Begin", "/fedia3.v1.Enrolment/Complete"
EVERYONE, ANNA, BOB = pb.Owner(everyone=True), pb.Owner(user="anna"), pb.Owner(user="bob")


@dataclass(frozen=True)
class Who:
    """What a caller shows, and signs with."""

    token: str | None = None
    key: Ed25519PrivateKey | None = None


class Scene:
    """A service with everyone's adapter, and a part of anna's and one of bob's.

    Args:
        service: without a limit on calls.
        channel: a connection to it, without limits of its own.
        folder: where everything of it lies.
    """

    def __init__(self, service: RunningService, channel: grpc.Channel, folder: Path) -> None:
        self.service, self.channel, self.folder = service, channel, folder
        self.base = service.manifest.digest
        self.schema = manifest.schema(service.manifest)
        self.everyone = Adapter.ones(self.schema)
        service.registry.publish_global(self.everyone)
        self.anna, self.bob = (self.device(service.enrol(name)) for name in ("anna", "bob"))
        self.web = Who(service.service_token())
        self.operator = Who(service.operator_token, service.operator_key)
        self.good = self.part(0.5, 0, 0, 0, -0.5)
        self.publish()
        self.bobs = self.part(0, 0, 0.25, 0, 0)
        self.publish(self.bobs, who=self.bob)

    @staticmethod
    def device(enrolled: EnrolledDevice) -> Who:
        """What this device shows."""
        return Who(enrolled.token, enrolled.signing_key)

    def who_may(self, path: str) -> Who:
        """Somebody whose token reaches this method."""
        scopes = METHODS[path].scopes
        if Scope.SCOPE_DEVICE in scopes:
            return self.anna
        return self.operator if Scope.SCOPE_ADMIN in scopes else Who()

    def part(self, *delta: float, on: str | None = None) -> bytes:
        """A file with this delta, relative to everyone's adapter or to another digest."""
        digest = on or encoding.digest(encoding.encode(self.everyone))
        values = np.array(delta, dtype=np.float32)
        return encoding.encode_personal(PersonalAdapter(self.schema, values, digest))

    def publish(self, data: bytes | None = None, who: Who | None = None, **changed: Any) -> bytes:
        """Publish a part, by default anna's good one, with some of the request changed."""
        return self.call(PUBLISH, self.publish_request(data, **changed), who or self.anna)

    def publish_request(self, data: bytes | None = None, **changed: Any) -> pb.PublishRequest:
        """What a publish carries."""
        data = self.good if data is None else data
        fields: dict[str, Any] = {
            "base_digest": self.base,
            "data": data,
            "digest": encoding.digest(data),
            "num_examples": 7,
            "idem_key": encoding.digest(data),
        }
        return pb.PublishRequest(**{**fields, **changed})

    def read(self, path: str, owner: pb.Owner, who: Who | None = None, **more: Any) -> bytes:
        """Ask for somebody's adapters; anna does, where nobody else is named."""
        if path == COMPARE:
            request: Message = pb.CompareRequest(
                left_owner=owner, right_owner=EVERYONE, base_digest=self.base
            )
        else:
            kind = METHODS[path].request
            request = kind(**{"owner": owner, "base_digest": self.base, **more})
        return self.call(path, request, who or self.anna)

    def promote(self, name: str = "stable", version: int = 1, **more: Any) -> bytes:
        """Point an alias of anna's at a version; anna does."""
        return self.read(PROMOTE, ANNA, name=name, version=version, **more)

    def someone(self, versions: int, *moves: int) -> "Someone":
        """A new user with so many versions, whose stable was moved from version to version."""
        name = f"user {os.urandom(4).hex()}"
        someone = Someone(self, self.device(self.service.enrol(name)), pb.Owner(user=name))
        for number in range(versions):
            self.publish(self.part(0, 0.25 + number, 0, 0, 0), someone.who)
        for rev, version in enumerate(moves):
            someone.ask(PROMOTE, version=version, expected_rev=rev)
        return someone

    def call(
        self,
        path: str,
        request: Message | bytes = b"",
        who: Who | None = None,
        *,
        timeout: float | None = 10,
        metadata: Sequence[tuple[str, str | bytes]] | None = None,
        **options: Any,
    ) -> bytes:
        """The answer's bytes, all of a stream's behind each other; by default nobody calls."""
        body = request if isinstance(request, bytes) else request.SerializeToString()
        shown = self.metadata(path, body, who or Who()) if metadata is None else metadata
        given = {"timeout": timeout, "metadata": shown, **options}
        if path in METHODS and METHODS[path].streams:
            return b"".join(self.channel.unary_stream(path)(body, **given))
        answer: bytes = self.channel.unary_unary(path)(body, **given)
        return answer

    def metadata(
        self,
        path: str,
        body: bytes,
        who: Who,
        *,
        nonce: bytes | None = None,
        off_ms: int = 0,
    ) -> list[tuple[str, str | bytes]]:
        """What lets the body in; ``off_ms`` is how far the caller's clock is off."""
        shown: list[tuple[str, str | bytes]] = []
        if who.token is not None:
            shown = [(TOKEN_HEADER, f"Bearer {who.token}")]
        if path in METHODS and METHODS[path].is_signed and who.key is not None:
            nonce, time_ms = nonce or os.urandom(16), self.service.now_ms() + off_ms
            signed = who.key.sign(request_bytes(path, body, time_ms, nonce, who.token or ""))
            shown += [
                (NONCE_HEADER, nonce), (TIME_HEADER, str(time_ms)), (SIGNATURE_HEADER, signed),
            ]  # fmt: skip
        return shown

    def kept(self) -> tuple[object, ...]:
        """What no refused call may change."""
        owners = (Owner.everyone(), *self.service.registry.owners("user"))
        versions = [self.service.registry.versions(owner, self.base) for owner in owners]
        aliases = [self.service.registry.store.aliases(owner, self.base) for owner in owners]
        devices = [device.device_id for device in self.service.directory.devices()]
        return versions, aliases, devices


@dataclass(frozen=True)
class Someone:
    """A user of whom a test may do as it likes."""

    scene: Scene
    who: Who
    owner: pb.Owner

    def ask(self, path: str, **fields: Any) -> bytes:
        """Of their own adapters; aliases are stable."""
        if "name" in METHODS[path].request.DESCRIPTOR.fields_by_name:
            fields = {"name": "stable", **fields}
        return self.scene.read(path, self.owner, self.who, **fields)

    def yanked(self, version: int) -> "Someone":
        """Once this version is yanked."""
        self.ask(YANK, version=version)
        return self

    def erased(self) -> "Someone":
        """Once nothing of theirs is left."""
        self.scene.call(ERASE, pb.EraseRequest(), self.who)
        return self


class Phone:
    """A device before it belongs to anybody."""

    def __init__(self) -> None:
        self.signing = Ed25519PrivateKey.generate()
        self.node = ec.generate_private_key(ec.SECP384R1())
        self.public = self.signing.public_key().public_bytes_raw()

    def enrol(self, scene: Scene, code: str, **keys: bytes) -> bytes:
        """Ask to be let in."""
        return scene.call(COMPLETE, self.request(scene, code, **keys))

    def request(self, scene: Scene, code: str, **other: bytes) -> enrolment.CompleteRequest:
        """What it sends to be let in, with other keys than its own where some are given."""
        begun = scene.call(BEGIN, enrolment.BeginRequest(code=code))
        challenge = enrolment.BeginResponse.FromString(begun).challenge
        keys = {"signing_key": self.public, "node_key": node_pem(self.node)} | other
        proven = enrolment_bytes(code, challenge, "phone", keys["signing_key"], keys["node_key"])
        return enrolment.CompleteRequest(
            code=code,
            challenge=challenge,
            device_name="phone",
            signing_key_proof=self.signing.sign(proven),
            node_key_proof=self.node.sign(proven, ec.ECDSA(SHA256())),
            **keys,
        )


@dataclass(frozen=True)
class Refused:
    """An input by its number, how it is sent, and the code, reason and words it is refused with."""

    number: int
    what: str
    send: Callable[..., object]  # takes the scene, and what ``given`` made
    answer: Answer
    says: str  # a pattern: what was expected, what came, or what to do
    given: Callable[[Scene], object] | None = None  # makes what has to be there before

    def __str__(self) -> str:
        return f"{self.number} {self.what}"


@dataclass(frozen=True)
class Raised:
    """An input that no caller sends, such as an answer that a device must not believe."""

    number: int
    what: str
    use: Callable[[Scene], object]
    error: type[Fedia3Error]
    says: str  # as above

    def __str__(self) -> str:
        return f"{self.number} {self.what}"


def require_refused(scene: Scene, case: Refused) -> None:
    """It is refused as the table says, and nothing was changed."""
    made = [] if case.given is None else [case.given(scene)]
    before = scene.kept()
    try:
        case.send(scene, *made)
    except grpc.RpcError as error:
        code, words = error.code(), error.details()
        assert (code, reason(error)) == case.answer, words
        assert re.search(case.says, words), words
    else:
        raise AssertionError(f"{case} was not refused")
    assert scene.kept() == before


def reason(error: grpc.RpcError) -> str:
    """Our reason in a failed call's status; empty where the status is not ours."""
    status, info = rpc_status.from_call(error), ErrorInfo()
    if status is not None and status.details[0].Unpack(info):
        return str(info.reason)
    return ""


@contextmanager
def a_scene(folder: Path, **settings: Any) -> Iterator[Scene]:
    """A service on files, with TLS, on loopback; ``settings`` as ``running_service`` takes them."""
    with (
        running_service(folder, **{"limits": NO_LIMITS, **settings}) as service,
        a_channel(service) as channel,
    ):
        yield Scene(service, channel, folder)


@contextmanager
def a_channel(
    service: RunningService, ca: bytes | None = None, **options: Any
) -> Iterator[grpc.Channel]:
    """A connection without limits of its own; ``options`` without their ``grpc.``."""
    credentials = grpc.ssl_channel_credentials(ca or service.ca)
    given = {
        "use_local_subchannel_pool": 1,
        "max_metadata_size": 1 << 20,
        "http2.bdp_probe": 0,  # or the window grows until a whole file fits it
        "http2.lookahead_bytes": 1 << 16,
        **options,
    }
    named = [(f"grpc.{name}", value) for name, value in given.items()]
    with grpc.secure_channel(service.address, credentials, options=named) as opened:
        yield opened
