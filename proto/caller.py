"""The calling end of a coordinator's services: a channel, a token, signatures, deadlines, repeats.

A caller signs and sends the same bytes. It repeats what may be repeated until its time is up, with
full jitter (Brooker, 2015, "Exponential backoff and jitter"), and learns the coordinator's clock
from a refusal, so that a device whose clock is wrong is still heard.
"""

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError, Message

from fedia3.clock import wall_ms
from fedia3.errors import (
    BadInput,
    BadSetting,
    Fedia3Error,
    NotAllowed,
    TooManyCalls,
    Unreachable,
    WrongClock,
)
from fedia3.proto.contract import CLIENT_OPTIONS, MAX_MESSAGE, METHODS, Method
from fedia3.proto.signing import (
    NONCE_BYTES,
    NONCE_HEADER,
    SIGNATURE_HEADER,
    TIME_HEADER,
    TOKEN_HEADER,
    request_bytes,
)
from fedia3.proto.status import from_rpc_error

Answer = TypeVar("Answer", bound=Message)
Metadata = Sequence[tuple[str, str | bytes]]

TIMEOUT_S = 20.0  # of a call, its repeats included
STALL_S = 60.0  # a stream that brings nothing for so long is given up
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
RULE_SHARE = 0.9  # of a rule's longest deadline: the way there takes some of it

# A second call would do a second thing.
_ONCE = {"RunNow", "Invite", "IssueServiceToken"}

_OPTIONS: tuple[tuple[str, int], ...] = (
    *CLIENT_OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, closed with its caller
    ("grpc.dns_enable_srv_queries", 0),
    ("grpc.http2.max_frame_size", 1 << 18),  # fewer frames: a third faster under TLS
    # What is in hand when a connection is cut is lost: no more than this, and never growing.
    ("grpc.http2.lookahead_bytes", 1 << 20),
    ("grpc.http2.bdp_probe", 0),
)


class Caller:
    """One coordinator as its callers see it; may be used by several threads at once.

    Args:
        address: ``host:port``.
        ca: PEM of the authority that signs the coordinator's certificates; no other is trusted.
        token: what the caller shows; None where a method asks for nothing.
        signing_key: signs the calls that change something.
        timeout_s: how long a call may take, its repeats included.
        now_ms: this machine's clock, ms since 1970.
        jitter: a number in [0, 1) for each pause.

    Raises:
        BadSetting: the address is not ``host:port``.
        BadInput: ``ca`` holds no certificate.
    """

    def __init__(
        self,
        address: str,
        *,
        ca: bytes,
        token: str | None = None,
        signing_key: Ed25519PrivateKey | None = None,
        timeout_s: float = TIMEOUT_S,
        now_ms: Callable[[], int] = wall_ms,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.address = checked_address(address)
        self._token, self._signing_key = token, signing_key
        self._timeout_s, self._now_ms, self._jitter = timeout_s, now_ms, jitter
        self._offset_ms = 0  # the coordinator's clock less ours, once it told us
        self._lock, self._closed = Lock(), Event()
        credentials = grpc.ssl_channel_credentials(checked_ca(ca))
        self._channel = grpc.secure_channel(self.address, credentials, options=_OPTIONS)

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
        self._closed.set()
        self._channel.close()

    def wait(self, pause_s: float) -> bool:
        """Rest so long, at most until the caller is closed; whether it is."""
        return self._closed.wait(pause_s)

    def show(self, token: str) -> None:
        """Use another token from now on."""
        with self._lock:
            self._token = token

    def call(
        self,
        name: str,
        request: Message,
        answer: type[Answer],
        *,
        timeout_s: float | None = None,
    ) -> Answer:
        """One answer of a method, by its name such as ``Adapters/Fetch``.

        Raises:
            Unreachable: no answer in time, or by nobody whom ``ca`` vouches for; or, as
                ``TooManyCalls``, the coordinator asks to wait longer than that.
            Fedia3Error: what the coordinator says is wrong, as :mod:`fedia3.proto.status` reads it.
        """
        method, body = METHODS[f"/fedia3.v1.{name}"], _checked_body(name, request)
        end = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        data = self._repeated(method, body, end)
        return _parsed(name, answer, data)

    def stream(
        self,
        name: str,
        request: Message,
        answer: type[Answer],
        *,
        timeout_s: float | None = None,
        stall_s: float = STALL_S,
    ) -> Iterator[Answer]:
        """A method's answers one by one; leaving the loop ends the call. Nothing is repeated.

        Raises:
            Unreachable: the stream broke, or brought nothing for ``stall_s``.
            Fedia3Error: as :meth:`call`.
        """
        method, body = METHODS[f"/fedia3.v1.{name}"], _checked_body(name, request)
        call = self._opened_stream(method, body, timeout_s or self._longest_s(method))
        with _Watch(call, stall_s) as watch:
            try:
                for data in call:
                    with watch.resting():
                        yield _parsed(name, answer, data)
            except grpc.RpcError as error:
                if watch.has_cut:
                    raise Unreachable(f"{self.address} sent nothing for {stall_s:g} s") from error
                raise self._translated(error) from error

    def _repeated(self, method: Method, body: bytes, end: float) -> bytes:
        """The answer's bytes, by the first try that brings them."""
        tries, clock_told = 0, False
        while True:
            try:
                return self._tried(method, body, end - time.monotonic())
            except _ClockRefused as error:
                if clock_told or error.offset_ms is None:
                    raise error.plain from error
                self._offset_ms, clock_told = error.offset_ms, True
            except Unreachable as error:
                pause_s = self._pause_s(tries, error)
                if not _may_repeat(method, error) or time.monotonic() + pause_s >= end:
                    raise
                tries += 1
                if self.wait(pause_s):
                    raise

    def _tried(self, method: Method, body: bytes, left_s: float) -> bytes:
        deadline_s = max(0.001, min(left_s, self._longest_s(method)))
        try:
            data: bytes = self._sent(self._channel.unary_unary, method, body, deadline_s)
        except grpc.RpcError as error:
            raise self._translated(error) from error
        return data

    def _opened_stream(self, method: Method, body: bytes, timeout_s: float) -> Any:
        deadline_s = min(timeout_s, self._longest_s(method))
        return self._sent(self._channel.unary_stream, method, body, deadline_s)

    def _sent(self, kind: Any, method: Method, body: bytes, deadline_s: float) -> Any:
        """The bytes as they are, without a serializer: what is signed is what is sent."""
        metadata = self._metadata(method, body)
        try:
            return kind(method.path)(body, timeout=deadline_s, metadata=metadata)
        except ValueError as error:
            if not self._closed.is_set():
                raise
            raise Unreachable(f"the connection to {self.address} was closed") from error

    def _longest_s(self, method: Method) -> float:
        return RULE_SHARE * float(method.max_deadline_s)

    def _metadata(self, method: Method, body: bytes) -> Metadata:
        with self._lock:
            token = self._token
        shown: Metadata = [(TOKEN_HEADER, f"Bearer {token}")] if token else []
        return [*shown, *self._signature(method, body, token or "")] if method.is_signed else shown

    def _signature(self, method: Method, body: bytes, token: str) -> Metadata:
        if self._signing_key is None:
            raise NotAllowed(
                f"{method.name} is signed by an enrolled device or the operator; this caller has "
                "no signing key"
            )
        nonce, time_ms = os.urandom(NONCE_BYTES), self._now_ms() + self._offset_ms
        signature = self._signing_key.sign(request_bytes(method.path, body, time_ms, nonce, token))
        return [
            (NONCE_HEADER, nonce), (TIME_HEADER, str(time_ms)), (SIGNATURE_HEADER, signature),
        ]  # fmt: skip

    def _translated(self, error: grpc.RpcError) -> Fedia3Error:
        ours = from_rpc_error(error)
        if isinstance(ours, WrongClock):
            return _ClockRefused(ours, self._told_offset(error))
        if type(ours) is Unreachable and isinstance(error, grpc.Call):
            return _explained(self.address, ours, error.details() or "")
        return ours

    def _told_offset(self, error: grpc.RpcError) -> int | None:
        told = _told_ms(error)
        return None if told is None else told - self._now_ms()

    def _pause_s(self, tries: int, error: Unreachable) -> float:
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**tries)
        return (error.retry_after_s or 0.0) + self._jitter() * longest


class _ClockRefused(WrongClock):
    """The refusal with the offset that heals it."""

    def __init__(self, plain: WrongClock, offset_ms: int | None) -> None:
        super().__init__(str(plain))
        self.plain, self.offset_ms = plain, offset_ms


class _WrongPeer(Unreachable):
    """Somebody answers who is not the coordinator; asking again at once does not help."""


class _Watch:
    """Cancels a call that brings nothing for ``stall_s``: a deadline alone cannot tell."""

    def __init__(self, call: Any, stall_s: float) -> None:
        self._call, self._stall_s = call, stall_s
        self._seen, self._over = time.monotonic(), Event()
        self.has_cut = False
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._call.cancel()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Whoever reads is at work on what came; the time does not count."""
        self._seen = math.inf
        yield
        self._seen = time.monotonic()

    def _run(self) -> None:
        while (left := self._seen + self._stall_s - time.monotonic()) > 0:
            if self._over.wait(min(left, self._stall_s)):
                return
        self.has_cut = True
        self._call.cancel()


def _told_ms(error: grpc.RpcError) -> int | None:
    """The coordinator's clock, ms since 1970, by a failed call's trailing metadata."""
    trailing: Any = (error.trailing_metadata() if isinstance(error, grpc.Call) else None) or ()
    told = next((str(value) for key, value in trailing if key == TIME_HEADER), "")
    return int(told) if len(told) < 20 and told.isascii() and told.isdigit() else None


def checked_address(address: str) -> str:
    """The address itself, once it is ``host:port``.

    Raises:
        BadSetting: it is not.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isascii() or not port.isdigit():
        raise BadSetting(
            f"a coordinator's address is host:port, such as home:8443, got {address!r}"
        )
    return address


def checked_ca(ca: bytes) -> bytes:
    """An authority's PEM itself, once it holds a certificate.

    Raises:
        BadInput: it holds none.
    """
    try:
        x509.load_pem_x509_certificates(ca)
    except ValueError as error:
        raise BadInput(
            "the coordinator's CA is a PEM certificate, got none; take ca.pem from the "
            "coordinator's folder"
        ) from error
    return ca


def _checked_body(name: str, request: Message) -> bytes:
    body = request.SerializeToString(deterministic=True)
    if len(body) > MAX_MESSAGE:
        raise BadInput(f"{name} takes at most {MAX_MESSAGE} bytes, got {len(body)}; send less")
    return body


def _parsed(name: str, answer: type[Answer], data: bytes) -> Answer:
    try:
        return answer.FromString(data)
    except DecodeError as error:
        raise Fedia3Error(
            f"{name} was answered with {len(data)} bytes that mean nothing"
        ) from error


def _may_repeat(method: Method, error: Unreachable) -> bool:
    if isinstance(error, _WrongPeer):
        return False
    return method.name not in _ONCE or isinstance(error, TooManyCalls)  # refused before it ran


def _explained(address: str, error: Unreachable, details: str) -> Unreachable:
    """What stands between us and the coordinator, in words that help."""
    if "Hostname Verification" in details or "not in peer certificate" in details:
        return _WrongPeer(
            f"{address} shows a certificate for another name; use a host name that it was made "
            "for, or make one for this name on the coordinator"
        )
    if "WRONG_VERSION_NUMBER" in details:
        return _WrongPeer(f"{address} does not speak TLS; check the port")
    if "OPENSSL_internal" in details:
        return _WrongPeer(
            f"{address} shows a certificate that the given CA did not sign, or one that is over; "
            "take ca.pem from that coordinator's folder again, and check the address"
        )
    if "Connection refused" in details:
        return Unreachable(
            f"nobody listens at {address} (connection refused); is the coordinator running, and "
            "is the port right?"
        )
    if "DNS" in details or "resolution" in details:
        return Unreachable(f"the host of {address} is not known; check the name and the network")
    return Unreachable(f"{address}: {error}", error.retry_after_s)
