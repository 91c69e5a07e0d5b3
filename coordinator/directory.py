"""Who may talk to the coordinator: users' devices, their tokens, invites; and the operator's word.

A directory is right when it passes ``tests/coordinator/test_directory_contract.py``. Secrets come
in as their sha256: nothing that opens a door is stored. Times are ms since 1970, given by the
caller: the directory has no clock. What every backend has to decide inside its own transaction is
written once, as pure functions, at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fedia3.coordinator.records import checked_name
from fedia3.errors import BadInput, BadInvite, BadSetting, BadToken, Conflict, NotFound, Replayed

PrincipalKind = Literal["device", "service", "admin"]

SIGNING_KEY_BYTES = 32  # Ed25519, raw
TOKENS_OF_A_DEVICE = 4  # those that end last; no clock decides, so a wrong one shuts nobody out
FORGOTTEN = "(erased)"  # a device's name, and its user's, once they are not kept any more
INVITE_KEPT_MS = 24 * 3600 * 1000  # an invite is forgotten when one ends that much later


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
        checked_name(self.device_id, "a device's id")
        object.__setattr__(self, "user", checked_name(self.user, "a user's name"))
        object.__setattr__(self, "name", checked_name(self.name, "a device's name"))
        if len(self.signing_key) != SIGNING_KEY_BYTES:
            raise BadInput(f"a signing key has 32 bytes, got {len(self.signing_key)}")


@dataclass(frozen=True)
class Token:
    """What a caller shows; the secret itself is only ever in its holder's hands.

    Raises:
        BadInput: the principal is no name.
    """

    sha256: bytes
    kind: PrincipalKind
    principal: str  # a device's id, a service's name, "operator"
    expires_ms: int
    signing_key: bytes | None = None  # of an operator; a device's stands in its own entry

    def __post_init__(self) -> None:
        if self.principal:  # enrolment says whose it is
            checked_name(self.principal, "a principal")


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
    """A single-use right to enrol one device of one user.

    Raises:
        BadInput: the user's name is not sound.
    """

    code_sha256: bytes
    user: str
    expires_ms: int
    challenge: bytes  # 32 random bytes that the device signs
    device_id: str | None = None  # who used it

    def __post_init__(self) -> None:
        object.__setattr__(self, "user", checked_name(self.user, "a user's name"))


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
        """Keep a new invite; those that ended a day before it are dropped on the way."""
        ...

    def invite(self, code_sha256: bytes, now_ms: int) -> Invite:
        """The invite, used or not.

        Raises:
            BadInvite: there is none, or its time is over.
        """
        ...

    def enrol(self, invite: Invite, device: Device, token: Token, now_ms: int) -> Device:
        """Use the invite up, keep the device and its token; the device as it is kept.

        Repeated with the same two keys while the invite lasts, or with another invite of the same
        user: the device that is there, whose earlier tokens end, and the new token.

        Raises:
            BadInvite: it is over, or another device used it.
            Conflict: one of the keys belongs to another device.
        """
        ...

    def add_token(self, token: Token) -> None:
        """Keep a token; of a device's, the four that end last.

        Raises:
            NotFound: it is for a device that is not enrolled or is revoked.
            Conflict: it is there already.
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

    def devices_of(self, user: str) -> Sequence[Device]:
        """Every device of a user, revoked ones too."""
        ...

    def forget_user(self, user: str, now_ms: int) -> bool:
        """Shut a user's devices out, and keep neither their names nor the user's.

        Whether nothing of them is left in the database's log either.
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


def open_directory(folder: Path, database: str | None = None) -> Directory:
    """The directory in ``folder``, in the database of its registry; created where it is new.

    Where ``database`` is given, a PostgreSQL database's URL mostly, it stands for the file.

    Raises:
        BadSetting: the folder cannot be created or written, or the database not be opened.
        BadInput: its database is no registry's, or a newer fedia3 wrote it.
    """
    from fedia3.coordinator.stores.sql_directory import (  # noqa: PLC0415 slow, unused in memory
        SqlDirectory,
    )

    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadSetting(
            f"cannot keep a directory in {folder}: {error.strerror}; choose a folder you can write"
        ) from error
    return SqlDirectory(database) if database else SqlDirectory.at(folder / "registry.db")


def require_invite(found: Invite | None, now_ms: int) -> Invite:
    """The invite that was found, if its time is not over.

    Raises:
        BadInvite: none was found, or it is over; the message is the same.
    """
    if found is None or found.expires_ms <= now_ms:
        raise bad_invite()
    return found


def enrolled_before(invite: Invite, device: Device, alike: Sequence[Device]) -> Device | None:
    """The device that enrols again, None for a new one; ``alike`` share its id or a key.

    Raises:
        BadInvite: another device used the invite.
        Conflict: one of the keys belongs to another device, or to one that was shut out.
    """
    again = next((known for known in alike if _is_again(known, device, invite.user)), None)
    if invite.device_id is not None and (again is None or again.device_id != invite.device_id):
        raise bad_invite()
    if again is None and alike:
        raise Conflict(
            "one of the keys belongs to another device, or to one that was shut out; make new keys"
        )
    return again


def require_known_token(
    token: Token | None, device: Device | None, token_sha256: bytes, now_ms: int
) -> Principal:
    """Who shows this token; ``device`` is the one that the token names, if any.

    Raises:
        BadToken: there is no such token, its time is over, or its device is shut out.
    """
    if token is None or token.expires_ms <= now_ms:
        raise bad_token()
    if token.kind != "device":
        return Principal(token.kind, token.principal, token_sha256, None, token.signing_key)
    if device is None or device.revoked_ms is not None:
        raise bad_token()
    return Principal("device", device.device_id, token_sha256, device.user, device.signing_key)


def bad_invite() -> BadInvite:
    """One error for unknown, used and ended invites: a guess learns nothing from it."""
    return BadInvite("the invite is unknown, used or expired; ask the operator for a new code")


def bad_token() -> BadToken:
    """One error for unknown, ended and revoked tokens."""
    return BadToken("the token is unknown, expired or revoked; enrol this device again")


def no_device(device_id: str) -> NotFound:
    """The error for a device that is not there."""
    return NotFound(f"no device {device_id[:40]!r} is enrolled; list what there is first")


def replayed() -> Replayed:
    """The error for a nonce that was used before."""
    return Replayed("this request was answered before; sign a new one with a new nonce")


def _is_again(known: Device, device: Device, user: str) -> bool:
    same_keys = (known.signing_key, known.node_key) == (device.signing_key, device.node_key)
    return same_keys and known.user == user and known.revoked_ms is None
