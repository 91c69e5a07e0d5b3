"""What has to hold before a method's code runs, checked in this order.

The deadline that the method's rule asks for, the message's size, the token, its scope, how often
the caller calls, and for what changes something the body's signature, the caller's clock, and that
the request is new. What a rule does not allow is denied; a method without a rule allows nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from urllib.parse import unquote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedia3.coordinator.directory import Directory, Principal, PrincipalKind
from fedia3.coordinator.rates import Limiter, Rate
from fedia3.coordinator.tokens import token_sha256
from fedia3.errors import BadInput, BadSignature, BadToken, NoDeadline, NotAllowed, WrongClock
from fedia3.proto.contract import MAX_MESSAGE, Method
from fedia3.proto.rules_pb2 import Scope
from fedia3.proto.signing import (
    CLOCK_WINDOW_MS,
    NONCE_BYTES,
    NONCE_HEADER,
    SIGNATURE_HEADER,
    TIME_HEADER,
    TOKEN_HEADER,
    request_bytes,
)

DEADLINE_ROUNDING = 1.02  # gRPC sends a deadline with two or three digits, rounded up
# Far longer than a request's time may differ: a clock that is set forward and back again must not
# make an old request new.
NONCE_KEPT_MS = 24 * 3600 * 1000

_SCOPES: dict[PrincipalKind, Scope] = {
    "device": Scope.SCOPE_DEVICE,
    "service": Scope.SCOPE_SERVICE,
    "admin": Scope.SCOPE_ADMIN,
}


@dataclass(frozen=True)
class Limits:
    """How often who may call."""

    device: Rate = field(default=Rate(per_s=20, burst=200))
    service: Rate = field(default=Rate(per_s=500, burst=1000))
    admin: Rate = field(default=Rate(per_s=50, burst=200))
    stranger: Rate = field(
        default=Rate(per_s=10, burst=100)
    )  # one address, without a token that holds
    wrong_codes: Rate = field(default=Rate(per_s=0.1, burst=10))  # one address guessing invites
    all_wrong_codes: Rate = field(default=Rate(per_s=20, burst=1000))  # everybody guessing invites


@dataclass(frozen=True)
class Call:
    """One call as it arrived, before anything about it is believed."""

    method: Method
    body: bytes
    metadata: Sequence[tuple[str, str | bytes]]
    remaining_s: float | None  # until its deadline; None without one
    peer: str  # as gRPC names it: ipv4:127.0.0.1:50123


@dataclass(frozen=True)
class Signed:
    """What a signed request carries beside its body."""

    nonce: bytes
    time_ms: int
    signature: bytes


class Access:
    """Lets calls in; may be used by several threads at once.

    Args:
        directory: who has which token, and which nonces were used.
        now_ms: this machine's clock, ms since 1970.
        now_s: a clock that only goes forward, for the rates.
    """

    def __init__(
        self,
        directory: Directory,
        limits: Limits,
        now_ms: Callable[[], int],
        now_s: Callable[[], float],
    ) -> None:
        self._directory, self._now_ms = directory, now_ms
        self._rates: dict[PrincipalKind, Limiter] = {
            "device": Limiter(limits.device, now_s),
            "service": Limiter(limits.service, now_s),
            "admin": Limiter(limits.admin, now_s),
        }
        self._strangers = Limiter(limits.stranger, now_s)

    def admit(self, call: Call) -> Principal | None:
        """Who is calling; None where the method is open to anybody.

        Raises:
            NoDeadline: the call says no time to give up, or one too far away.
            BadInput: the message is too large.
            BadToken: no token, or one that is unknown, expired or revoked.
            NotAllowed: the token does not reach this method.
            TooManyCalls: the caller has to wait.
            BadSignature: the body is not what the caller signed, or it carries no signature.
            WrongClock: the request's time is too far from ours.
            Replayed: the request came before.
        """
        require_deadline(call.method, call.remaining_s)
        require_size(call.body)
        if Scope.SCOPE_ANYONE in call.method.scopes:
            self._strangers.take(peer_address(call.peer))
            return None
        principal, token = self._identified(call)
        require_scope(call.method, principal)
        self._rates[principal.kind].take(principal.name)
        if call.method.is_signed:
            self._require_signed(call, principal, token)
        return principal

    def _identified(self, call: Call) -> tuple[Principal, str]:
        """The caller and the token they show; a stranger is counted."""
        try:
            token = shown_token(call.metadata)
            return self._directory.principal(token_sha256(token), self._now_ms()), token
        except BadToken:
            self._strangers.take(peer_address(call.peer))
            raise

    def _require_signed(self, call: Call, principal: Principal, token: str) -> None:
        signed = signed_parts(call.metadata)
        require_signature(call, signed, principal, token)
        now_ms = self._now_ms()
        require_clock(signed.time_ms, now_ms)
        # Last, so that nobody can use up a nonce of somebody else's.
        self._directory.use_nonce(principal.name, signed.nonce, now_ms + NONCE_KEPT_MS, now_ms)


def require_deadline(method: Method, remaining_s: float | None) -> None:
    """Refuse calls that might never end, and methods whose file says nothing about it.

    Raises:
        NotAllowed: the method has no rule.
        NoDeadline: there is no deadline, or it is too far away.
    """
    if not method.scopes or method.max_deadline_s <= 0:
        raise NotAllowed(f"{method.path} has no rule, so nobody may call it")
    if remaining_s is None or remaining_s > method.max_deadline_s * DEADLINE_ROUNDING:
        got = "none" if remaining_s is None else f"one in {remaining_s:.0f} s"
        raise NoDeadline(
            f"{method.name} needs a deadline within {method.max_deadline_s} s, got {got}"
        )


def require_size(body: bytes) -> None:
    """Refuse messages that are larger than any of ours.

    Raises:
        BadInput: this one is.
    """
    if len(body) > MAX_MESSAGE:
        raise BadInput(f"a message has at most {MAX_MESSAGE} bytes, got {len(body)}")


def shown_token(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    """The token that the call shows.

    Raises:
        BadToken: it shows none, or several.
    """
    shown = _only(metadata, TOKEN_HEADER)
    if not isinstance(shown, str) or not shown.startswith("Bearer "):
        raise BadToken("this call needs a token, as 'authorization: Bearer TOKEN', and got none")
    return shown.removeprefix("Bearer ")


def require_scope(method: Method, principal: Principal) -> None:
    """Deny what the method's rule does not list.

    Raises:
        NotAllowed: the caller's kind of token is not among them.
    """
    if _SCOPES[principal.kind] not in method.scopes:
        raise NotAllowed(f"a {principal.kind}'s token does not reach {method.name}")


def signed_parts(metadata: Sequence[tuple[str, str | bytes]]) -> Signed:
    """Nonce, time and signature of a request.

    Raises:
        BadSignature: one of them is missing, there twice, or not what it should be.
    """
    nonce, signature = _only(metadata, NONCE_HEADER), _only(metadata, SIGNATURE_HEADER)
    time_ms = _only(metadata, TIME_HEADER)
    if not isinstance(nonce, bytes) or len(nonce) != NONCE_BYTES:
        raise BadSignature(f"this call carries {NONCE_BYTES} random bytes as {NONCE_HEADER}")
    if not isinstance(time_ms, str) or not (time_ms.isascii() and time_ms.isdigit()):
        raise BadSignature(f"this call carries its time in ms since 1970 as {TIME_HEADER}")
    if len(time_ms) > 19 or not isinstance(signature, bytes):
        raise BadSignature(f"this call carries a signature of its body as {SIGNATURE_HEADER}")
    return Signed(nonce, int(time_ms), signature)


def require_signature(call: Call, signed: Signed, principal: Principal, token: str) -> None:
    """Refuse a body that is not what the caller signed.

    Raises:
        NotAllowed: the caller has no key to sign with.
        BadSignature: the signature is another body's, call's, time's or caller's.
    """
    if principal.signing_key is None:
        raise NotAllowed(f"a {principal.kind} without a signing key cannot call {call.method.name}")
    expected = request_bytes(call.method.path, call.body, signed.time_ms, signed.nonce, token)
    try:
        Ed25519PublicKey.from_public_bytes(principal.signing_key).verify(signed.signature, expected)
    except (InvalidSignature, ValueError) as error:
        raise BadSignature(
            "the signature does not fit the request and the caller's key; sign the bytes that are "
            "sent, with the key that was enrolled"
        ) from error


def require_clock(time_ms: int, now_ms: int) -> None:
    """Refuse requests from long ago, or from the future.

    Raises:
        WrongClock: the times differ by more than a minute.
    """
    if abs(time_ms - now_ms) > CLOCK_WINDOW_MS:
        raise WrongClock(
            f"the request's time is {(time_ms - now_ms) / 1000:+.0f} s off the coordinator's, more "
            f"than {CLOCK_WINDOW_MS // 1000} s; take the coordinator's time from {TIME_HEADER}"
        )


def peer_address(peer: str) -> str:
    """Whom a rate counts: an IPv4 address, or the /64 network of an IPv6 one."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in {"ipv4", "ipv6"}:
        return peer
    try:
        address = ip_address(rest.rpartition(":")[0].strip("[]").partition("%")[0])
    except ValueError:
        return peer
    if isinstance(address, IPv6Address):
        return str(address.ipv4_mapped or IPv6Address(int(address) >> 64 << 64))
    return str(address)


def _only(metadata: Sequence[tuple[str, str | bytes]], name: str) -> str | bytes | None:
    """The header's value, None where it is missing or there twice."""
    values = [value for key, value in metadata if key == name]
    return values[0] if len(values) == 1 else None
