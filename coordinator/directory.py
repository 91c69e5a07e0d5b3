"""Who may talk to the coordinator: users' devices, their tokens, invites; and the operator's word.

A directory is right when it passes ``tests/coordinator/test_directory_contract.py``. Secrets come
in as their sha256: nothing that opens a door is stored. Times are ms since 1970, given by the
caller: the directory has no clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fedia3.coordinator.records import checked_name
from fedia3.errors import BadInput

PrincipalKind = Literal["device", "service", "admin"]

SIGNING_KEY_BYTES = 32  # Ed25519, raw


@dataclass(frozen=True)
class Device:
    """One enrolled device of one user.

    Raises:
        BadInput: a name or a key is not sound.
    """

    device_id: str  # 32 hex digits; the Flower node's name
    user: str
    name: str
    signing_key: bytes  # Ed25519, raw 32 bytes
    node_key: bytes  # P-384, PEM SubjectPublicKeyInfo, byte for byte as Flower's header carries it
    enrolled_ms: int
    revoked_ms: int | None = None
    last_seen_ms: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "user", checked_name(self.user, "a user's name"))
        object.__setattr__(self, "name", checked_name(self.name, "a device's name"))
        if len(self.signing_key) != SIGNING_KEY_BYTES:
            raise BadInput(f"a signing key has 32 bytes, got {len(self.signing_key)}")


@dataclass(frozen=True)
class Token:
    """What a caller shows; the secret itself is only ever in its holder's hands."""

    sha256: bytes
    kind: PrincipalKind
    principal: str  # a device's id, a service's name, "operator"
    expires_ms: int
    signing_key: bytes | None = None  # of an operator; a device's stands in its own entry


@dataclass(frozen=True)
class Principal:
    """Who is calling, once the token holds."""

    kind: PrincipalKind
    name: str  # a device's id, a service's name, "operator"
    token_sha256: bytes
    user: str | None = None  # a device's
    signing_key: bytes | None = None  # checks the caller's signed requests; None may not sign


@dataclass(frozen=True)
class Invite:
    """A single-use right to enrol one device of one user."""

    code_sha256: bytes
    user: str
    expires_ms: int
    challenge: bytes  # 32 random bytes that the device signs
    device_id: str | None = None  # who used it


@dataclass(frozen=True)
class OpenRound:
    """A round whose messages are out: only its cohort has something to pull."""

    round_num: int
    cohort: tuple[str, ...]  # device ids
    until_ms: int  # its deadline; behind it the entry means nothing


@dataclass(frozen=True)
class RoundControl:
    """What the operator wants of the rounds, and where they are."""

    paused: bool = False
    run_requested_ms: int | None = None  # the operator's last run-now that no round has met yet
    open_round: OpenRound | None = None


class Directory(Protocol):
    """Devices, tokens, invites, nonces and the operator's word. Every call is one transaction."""

    def add_invite(self, invite: Invite) -> None:
        """Keep a new invite; expired ones are dropped on the way."""
        ...

    def invite(self, code_sha256: bytes, now_ms: int) -> Invite:
        """The invite, used or not.

        Raises:
            BadInvite: there is none, or its time is over.
        """
        ...

    def enrol(self, invite: Invite, device: Device, token: Token, now_ms: int) -> Device:
        """Use the invite up, keep the device and its token; the device as it is kept.

        Repeated with the same two keys while the invite lasts: the device that is there, whose
        earlier tokens end, and the new token.

        Raises:
            BadInvite: it is over, or another device used it.
            Conflict: one of the keys belongs to another device.
        """
        ...

    def add_token(self, token: Token) -> None:
        """Keep a token; expired ones are dropped on the way.

        Raises:
            NotFound: it is for a device that is not enrolled or is revoked.
        """
        ...

    def principal(self, token_sha256: bytes, now_ms: int) -> Principal:
        """Who shows this token.

        Raises:
            BadToken: it is unknown or expired, or its device is revoked.
        """
        ...

    def use_nonce(self, principal: str, nonce: bytes, expires_ms: int, now_ms: int) -> None:
        """Remember a signed request's nonce until ``expires_ms``; older ones are forgotten.

        Raises:
            Replayed: the principal used it before.
        """
        ...

    def devices(self, after: str | None = None, limit: int = 100) -> tuple[Device, ...]:
        """A page of devices, revoked ones too, in the order they were enrolled.

        Raises:
            NotFound: ``after`` is no device.
            BadSetting: the limit is not positive.
        """
        ...

    def device(self, device_id: str) -> Device:
        """One device.

        Raises:
            NotFound: there is none.
        """
        ...

    def enrolled(self) -> Sequence[Device]:
        """Every device that is not revoked."""
        ...

    def revoke(self, device_id: str, now_ms: int) -> Device:
        """Shut a device out for good, its tokens too; doing it again changes nothing.

        Raises:
            NotFound: there is none.
        """
        ...

    def saw(self, device_ids: Sequence[str], now_ms: int) -> None:
        """Note when these devices were last heard of."""
        ...

    def round_control(self) -> RoundControl:
        """What the operator wants of the rounds, and where they are."""
        ...

    def set_paused(self, paused: bool) -> None:
        """Start no more rounds, or start them again."""
        ...

    def request_run(self, now_ms: int) -> None:
        """Ask for one round at once."""
        ...

    def run_started(self, requested_ms: int) -> None:
        """A request is met; one made later stays."""
        ...

    def open_round(self, opened: OpenRound | None) -> None:
        """A round's messages are about to go out; None: it is over."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...
