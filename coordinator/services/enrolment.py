"""``fedia3.v1.Enrolment``: how a device comes to belong to a user, and keeps its token fresh."""

import hmac
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from fedia3.coordinator.access import Limits
from fedia3.coordinator.directory import (
    SIGNING_KEY_BYTES,
    Device,
    Directory,
    Invite,
    Token,
    bad_invite,
)
from fedia3.coordinator.rates import Limiter
from fedia3.coordinator.services.calls import Caller, Clock, Handlers
from fedia3.coordinator.tokens import DEVICE_TOKEN_MS, code_sha256, new_token, token_sha256
from fedia3.errors import BadInput, BadInvite, BadSignature, Conflict, NotFound
from fedia3.proto import enrolment_pb2 as pb
from fedia3.proto.signing import enrolment_bytes, signed_bytes

log = logging.getLogger(__name__)

MAX_NODE_KEY = 1024  # bytes of PEM; a P-384 key takes 215


class NodeRegistrar(Protocol):
    """Tells Flower whose nodes it may talk to. Both calls may be repeated."""

    def register(self, device_id: str, node_key: bytes) -> None:
        """Let the node with this key in, under the device's id.

        Raises:
            Unreachable: Flower does not answer.
        """
        ...

    def unregister(self, device_id: str) -> None:
        """Shut the device's node out; one that is not there is no error.

        Raises:
            Unreachable: Flower does not answer.
        """
        ...


@dataclass(frozen=True)
class Federation:
    """What a new device has to know of the coordinator."""

    ca: bytes  # PEM
    coordinator_keys: tuple[bytes, ...]  # Ed25519, raw
    fleet_address: str
    base_digest: str


class EnrolmentService:
    """Lets devices in by invites."""

    def __init__(
        self,
        directory: Directory,
        registrar: NodeRegistrar,
        federation: Federation,
        limits: Limits,
        now_ms: Clock,
        now_s: Callable[[], float],
    ) -> None:
        self._directory, self._registrar, self._federation = directory, registrar, federation
        self._now_ms = now_ms
        self._wrong_codes = Limiter(limits.wrong_codes, now_s)
        self._all_wrong_codes = Limiter(limits.all_wrong_codes, now_s)

    @property
    def handlers(self) -> Handlers:
        """This service's methods by path."""
        return {
            "/fedia3.v1.Enrolment/Begin": self.begin,
            "/fedia3.v1.Enrolment/Complete": self.complete,
            "/fedia3.v1.Enrolment/Renew": self.renew,
        }

    def begin(self, request: pb.BeginRequest, caller: Caller) -> pb.BeginResponse:
        """Answer an invite's code with the challenge that the device has to sign."""
        return pb.BeginResponse(challenge=self._invite(request.code, caller).challenge)

    def complete(self, request: pb.CompleteRequest, caller: Caller) -> pb.CompleteResponse:
        """Take the device in once it proved that both keys are its own.

        Flower hears of the node first: while it does not answer, the invite stays unused.
        """
        invite = self._invite(request.code, caller)
        require_proofs(request, invite)
        device = self._device(request, invite)
        self._registrar.register(device.device_id, device.node_key)
        text, token = self._new_token(device.device_id)
        enrolled = self._directory.enrol(invite, device, token, self._now_ms())
        log.info("device %s enrolled", enrolled.device_id)
        return self._welcome(enrolled, text, token)

    def renew(self, _request: pb.RenewRequest, caller: Caller) -> pb.RenewResponse:
        """Give the calling device a new token; the old one keeps its time."""
        text, token = self._new_token(caller.known.name)
        self._directory.add_token(token)
        return pb.RenewResponse(token=text, token_expires_ms=token.expires_ms)

    def _invite(self, code: str, caller: Caller) -> Invite:
        """The invite of this code; wrong ones are counted, and who guesses has to wait."""
        self._wrong_codes.require_some(caller.address)
        self._all_wrong_codes.require_some("everybody")
        try:
            return self._directory.invite(code_sha256(code), self._now_ms())
        except BadInvite:
            log.warning("a wrong invite's code from %s", caller.address)
            self._wrong_codes.take(caller.address)
            self._all_wrong_codes.take("everybody")
            raise

    def _device(self, request: pb.CompleteRequest, invite: Invite) -> Device:
        """The device that asks, once nothing that is known speaks against it."""
        device = Device(
            device_id=device_id_of(request.signing_key, request.node_key),
            user=invite.user,
            name=request.device_name,
            signing_key=request.signing_key,
            node_key=request.node_key,
            enrolled_ms=self._now_ms(),
        )
        if invite.device_id not in (None, device.device_id):
            raise bad_invite()
        try:
            known = self._directory.device(device.device_id)
        except NotFound:
            return device
        if known.revoked_ms is not None:
            raise Conflict("these keys belong to a device that was shut out; make new keys")
        return device

    def _new_token(self, device_id: str) -> tuple[str, Token]:
        text = new_token("device", os.urandom)
        expires_ms = self._now_ms() + DEVICE_TOKEN_MS
        return text, Token(token_sha256(text), "device", device_id, expires_ms)

    def _welcome(self, device: Device, text: str, token: Token) -> pb.CompleteResponse:
        return pb.CompleteResponse(
            device_id=device.device_id,
            user=device.user,
            token=text,
            token_expires_ms=token.expires_ms,
            ca=self._federation.ca,
            coordinator_keys=self._federation.coordinator_keys,
            fleet_address=self._federation.fleet_address,
            base_digest=self._federation.base_digest,
        )


def device_id_of(signing_key: bytes, node_key: bytes) -> str:
    """The id of the device with these keys, 32 hex digits.

    It follows from the keys, so that enrolling again names the same node to Flower.
    """
    return sha256(signed_bytes("device", signing_key, node_key)).hexdigest()[:32]


def require_proofs(request: pb.CompleteRequest, invite: Invite) -> None:
    """Refuse keys that the caller cannot sign with.

    Raises:
        BadInvite: the challenge is not the invite's.
        BadInput: a key is not of the kind that is asked for.
        BadSignature: a proof does not hold.
    """
    if not hmac.compare_digest(request.challenge, invite.challenge):
        raise bad_invite()
    signing_key, node_key = _signing_key(request.signing_key), _node_key(request.node_key)
    proven = enrolment_bytes(
        request.code,
        request.challenge,
        request.device_name,
        request.signing_key,
        request.node_key,
    )
    try:
        signing_key.verify(request.signing_key_proof, proven)
        node_key.verify(request.node_key_proof, proven, ec.ECDSA(SHA256()))
    except InvalidSignature as error:
        raise BadSignature("a proof of the device's keys does not hold; sign anew") from error


def register_everyone(directory: Directory, registrar: NodeRegistrar) -> int:
    """Tell Flower of every enrolled device, as when its own database is new; how many there are.

    Raises:
        Unreachable: Flower does not answer; asking again goes on.
    """
    devices = directory.enrolled()
    for device in devices:
        registrar.register(device.device_id, device.node_key)
    return len(devices)


def _signing_key(raw: bytes) -> Ed25519PublicKey:
    if len(raw) != SIGNING_KEY_BYTES:
        raise BadInput(f"a signing key is Ed25519, raw {SIGNING_KEY_BYTES} bytes, got {len(raw)}")
    return Ed25519PublicKey.from_public_bytes(raw)


def _node_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """The node's key, if it is written as Flower writes it: one key has one form."""
    wanted = "a node key is a P-384 public key as Flower writes it (PEM SubjectPublicKeyInfo)"
    if len(pem) > MAX_NODE_KEY:
        raise BadInput(f"{wanted}, got {len(pem)} bytes")
    try:
        key = load_pem_public_key(pem)
    except Exception as error:  # whatever a parser of a stranger's bytes may raise
        raise BadInput(f"{wanted}, got bytes that are none") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise BadInput(f"{wanted}, got another kind of key")
    if key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) != pem:
        raise BadInput(f"{wanted}, got it in another form")
    return key
