"""How a caller signs, repeats, learns the clock and explains what went wrong."""

import datetime as dt
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from grpc_status import rpc_status

from fedia3.errors import (
    BadInput,
    BadSetting,
    Fedia3Error,
    NotAllowed,
    NotFound,
    TooManyCalls,
    Unreachable,
    WrongClock,
)
from fedia3.proto.adapters_pb2 import EraseRequest, EraseResponse, FetchRequest, FetchResponse
from fedia3.proto.admin_pb2 import (
    InviteRequest,
    InviteResponse,
    RunNowRequest,
    RunNowResponse,
    StatusRequest,
    StatusResponse,
)
from fedia3.proto.base_models_pb2 import FilePiece, ReadFileRequest
from fedia3.proto.caller import Caller
from fedia3.proto.signing import (
    NONCE_HEADER,
    SIGNATURE_HEADER,
    TIME_HEADER,
    TOKEN_HEADER,
    request_bytes,
)
from fedia3.proto.status import to_status

CERTIFICATE_DAY = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)


@dataclass(frozen=True)
class Seen:
    """One call as the server saw it."""

    path: str
    body: bytes
    metadata: dict[str, Any]
    left_s: float


@dataclass
class Script:
    """What the server answers, call by call; the last answer stays."""

    answers: list[bytes | Exception]
    seen: list[Seen] = field(default_factory=list)
    time_ms: int | str = 0

    def answer(self, path: str, body: bytes, context: grpc.ServicerContext) -> bytes:
        self.seen.append(
            Seen(path, body, dict(context.invocation_metadata()), context.time_remaining())
        )
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            status = rpc_status.to_status(to_status(answer))
            told = (TIME_HEADER, str(self.time_ms))
            context.set_trailing_metadata((*status.trailing_metadata, told))
            context.abort(status.code, status.details)
        return answer


class Handler(grpc.GenericRpcHandler):
    def __init__(self, script: Script, stream: Callable[[], Iterator[bytes]]) -> None:
        self._script, self._stream = script, stream

    def service(self, details: Any) -> grpc.RpcMethodHandler:
        if details.method.endswith("/ReadFile"):
            return grpc.unary_stream_rpc_method_handler(lambda body, context: self._stream())
        return grpc.unary_unary_rpc_method_handler(
            lambda body, context: self._script.answer(details.method, body, context)
        )


@dataclass(frozen=True)
class Certificates:
    ca: bytes
    chain: bytes
    key: bytes


def certificates(host: str = "127.0.0.1") -> Certificates:
    """A CA and a server's certificate for ``host``."""
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca = _certificate("ca", ca_key, "ca", ca_key, None)
    leaf = _certificate("leaf", key, "ca", ca_key, host)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Certificates(ca, leaf, pem)


def _certificate(name: str, key: Any, issuer: str, issuer_key: Any, host: str | None) -> bytes:
    draft = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(CERTIFICATE_DAY)
        .not_valid_after(CERTIFICATE_DAY + dt.timedelta(days=36500))
        .add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
    )
    if host is not None:
        alternative = (
            x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
        )
        draft = draft.add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
    return draft.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.fixture(scope="module")
def certificate() -> Certificates:
    """A CA and a server's certificate for 127.0.0.1."""
    return certificates()


@contextmanager
def served(
    certificate: Certificates,
    *answers: bytes | Exception,
    stream: Callable[[], Iterator[bytes]] = lambda: iter(()),
) -> Iterator[tuple[str, Script]]:
    """A server that answers so; its address and what it saw."""
    script = Script(list(answers or [b""]))
    server = grpc.server(ThreadPoolExecutor(4), handlers=[Handler(script, stream)])
    credentials = grpc.ssl_server_credentials([(certificate.key, certificate.chain)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}", script
    finally:
        server.stop(None).wait()


def caller(address: str, certificate: Certificates, **options: Any) -> Caller:
    """A caller whose pauses are short."""
    defaults: dict[str, Any] = {"ca": certificate.ca, "timeout_s": 5.0, "jitter": lambda: 0.1}
    return Caller(address, **defaults | options)


def fetch(to: Caller) -> FetchResponse:
    """Any call that may be repeated."""
    return to.call("Adapters/Fetch", FetchRequest(), FetchResponse)


def test_a_call_shows_its_token_and_says_when_it_gives_up(certificate: Certificates):
    """
    The token travels as a bearer's, and the deadline lies within the method's rule of 30 s.
    """
    with served(certificate, FetchResponse(unchanged=True).SerializeToString()) as (at, script):
        with caller(at, certificate, token="secret", timeout_s=100) as to:
            assert fetch(to).unchanged
        assert script.seen[0].metadata[TOKEN_HEADER] == "Bearer secret"
        assert 0 < script.seen[0].left_s <= 30


def test_what_is_signed_is_what_is_sent(certificate: Certificates):
    """
    The signature holds over path, body, time, nonce and token, as they arrived.
    """
    key = Ed25519PrivateKey.generate()
    with served(certificate) as (at, script):
        with caller(at, certificate, token="t", signing_key=key, now_ms=lambda: 77) as to:
            to.call("Adapters/Erase", EraseRequest(base_digest="ab"), EraseResponse)
        seen = script.seen[0]
    assert seen.metadata[TIME_HEADER] == "77"
    signed = request_bytes(seen.path, seen.body, 77, seen.metadata[NONCE_HEADER], "t")
    key.public_key().verify(seen.metadata[SIGNATURE_HEADER], signed)


def test_a_repeated_call_has_a_new_nonce(certificate: Certificates):
    """
    A repeat is no replay: it is signed anew.
    """
    key = Ed25519PrivateKey.generate()
    with (
        served(certificate, Unreachable("starting"), b"") as (at, script),
        caller(at, certificate, signing_key=key) as to,
    ):
        to.call("Adapters/Erase", EraseRequest(), EraseResponse)
    first, second = script.seen
    assert first.metadata[NONCE_HEADER] != second.metadata[NONCE_HEADER]


def test_a_call_to_sign_without_a_key_is_not_sent(certificate: Certificates):
    """
    Who cannot sign is told so before anything leaves.
    """
    with served(certificate) as (at, script), caller(at, certificate) as to:
        with pytest.raises(NotAllowed, match="no signing key"):
            to.call("Adapters/Erase", EraseRequest(), EraseResponse)
        assert script.seen == []


def test_a_wrong_clock_is_put_right_by_the_refusal(certificate: Certificates):
    """
    The refusal tells the coordinator's time; the second try and all later calls use it.
    """
    key = Ed25519PrivateKey.generate()
    with served(certificate, WrongClock("an hour off"), b"") as (at, script):
        script.time_ms = 5_000_000
        with caller(at, certificate, signing_key=key, now_ms=lambda: 1000) as to:
            for _ in range(2):
                to.call("Adapters/Erase", EraseRequest(), EraseResponse)
    times = [seen.metadata[TIME_HEADER] for seen in script.seen]
    assert times == ["1000", "5000000", "5000000"]


@pytest.mark.parametrize("told", ["9" * 5000, "-1", "noon", ""])
def test_a_time_that_is_none_is_not_learned(told: str, certificate: Certificates):
    """
    The refusal stands as it is, and is no fault of the caller's.
    """
    key = Ed25519PrivateKey.generate()
    with served(certificate, WrongClock("an hour off"), b"") as (at, script):
        script.time_ms = told
        with (
            caller(at, certificate, signing_key=key, now_ms=lambda: 1000) as to,
            pytest.raises(WrongClock),
        ):
            to.call("Adapters/Erase", EraseRequest(), EraseResponse)


def test_a_clock_refused_twice_is_an_error(certificate: Certificates):
    """
    One correction, not a loop.
    """
    key = Ed25519PrivateKey.generate()
    with (
        served(certificate, WrongClock("an hour off")) as (at, script),
        caller(at, certificate, signing_key=key) as to,
    ):
        with pytest.raises(WrongClock, match="an hour off"):
            to.call("Adapters/Erase", EraseRequest(), EraseResponse)
        assert len(script.seen) == 2


def test_an_unreachable_part_is_asked_again(certificate: Certificates):
    """
    Two refusals and an answer are one answer to the caller.
    """
    starting = [Unreachable("starting", retry_after_s=0.01) for _ in range(2)]
    with served(certificate, *starting, b"") as (at, script), caller(at, certificate) as to:
        fetch(to)
        assert len(script.seen) == 3


def test_who_has_to_wait_longer_than_it_may_is_told_at_once(certificate: Certificates):
    """
    A pause beyond the caller's time is not slept; the error says when to come again.
    """
    with (
        served(certificate, TooManyCalls("slow down", retry_after_s=60)) as (at, script),
        caller(at, certificate) as to,
    ):
        with pytest.raises(TooManyCalls, match="slow down") as caught:
            fetch(to)
        assert caught.value.retry_after_s == 60
        assert len(script.seen) == 1


def test_what_would_happen_twice_is_asked_once(certificate: Certificates):
    """
    A second invite is a second invite, and a second run-now a second round.
    """
    key = Ed25519PrivateKey.generate()
    with (
        served(certificate, Unreachable("starting")) as (at, script),
        caller(at, certificate, signing_key=key) as to,
    ):
        with pytest.raises(Unreachable, match="starting"):
            to.call("Admin/Invite", InviteRequest(user="ann"), InviteResponse)
        with pytest.raises(Unreachable, match="starting"):
            to.call("Admin/RunNow", RunNowRequest(), RunNowResponse)
        assert len(script.seen) == 2


def test_errors_come_back_as_they_left(certificate: Certificates):
    """
    A NotFound over there is a NotFound here, with its words.
    """
    with (
        served(certificate, NotFound("no version 7")) as (at, _),
        caller(at, certificate) as to,
        pytest.raises(NotFound, match="no version 7"),
    ):
        fetch(to)


def test_an_answer_that_means_nothing_is_an_error(certificate: Certificates):
    """
    Bytes that are no message do not pass for an empty one.
    """
    with (
        served(certificate, b"\xff\xff\xff") as (at, _),
        caller(at, certificate) as to,
        pytest.raises(Fedia3Error, match="mean nothing"),
    ):
        fetch(to)


def test_a_request_too_large_is_not_sent(certificate: Certificates):
    """
    Five megabytes are refused here, with the limit.
    """
    with served(certificate) as (at, script), caller(at, certificate) as to:
        with pytest.raises(BadInput, match="at most 4194304"):
            to.call("Adapters/Fetch", FetchRequest(base_digest="a" * 5_000_000), FetchResponse)
        assert script.seen == []


def test_another_authority_is_not_believed(certificate: Certificates):
    """
    A certificate that another CA signed ends the call at once, naming the address and ca.pem.
    """
    with (
        served(certificate) as (at, _),
        caller(at, certificates(), timeout_s=30) as to,
        pytest.raises(Unreachable, match=rf"{at}.*did not sign.*ca\.pem"),
    ):
        fetch(to)


def test_another_name_is_not_believed():
    """
    A certificate for another host ends the call at once, and says so.
    """
    other = certificates("elsewhere.example")
    with (
        served(other) as (at, _),
        caller(at, other, timeout_s=30) as to,
        pytest.raises(Unreachable, match=rf"{at}.*another name"),
    ):
        fetch(to)


def test_a_closed_port_is_named(certificate: Certificates):
    """
    Where nobody listens, the message says so and what to look at.
    """
    with (
        caller(f"127.0.0.1:{closed_port()}", certificate, timeout_s=0.5) as to,
        pytest.raises(Unreachable, match=r"nobody listens at 127\.0\.0\.1:\d+"),
    ):
        fetch(to)


def test_a_port_without_tls_is_named(certificate: Certificates):
    """
    A server that speaks something else is told apart from one that is down.
    """
    with (
        talking(b"HTTP/1.1 400 Bad Request\r\n\r\n") as at,
        caller(at, certificate, timeout_s=30) as to,
        pytest.raises(Unreachable, match="does not speak TLS"),
    ):
        fetch(to)


@pytest.mark.parametrize("address", ["home", "home:", ":8443", "https://home:8443", "home:x"])
def test_an_address_is_host_and_port(address: str, certificate: Certificates):
    """
    Anything else is refused with an example.
    """
    with pytest.raises(BadSetting, match="home:8443"):
        caller(address, certificate)


def test_a_ca_is_a_certificate(certificate: Certificates):
    """
    The key's file in place of the certificate's is noticed before a connection is tried.
    """
    with pytest.raises(BadInput, match=r"ca\.pem"):
        Caller("127.0.0.1:1", ca=certificate.key)


def test_a_stream_brings_its_pieces_in_order(certificate: Certificates):
    """
    Three pieces sent are three pieces read.
    """
    pieces = [FilePiece(offset=n, data=bytes([n])).SerializeToString() for n in range(3)]
    with served(certificate, stream=lambda: iter(pieces)) as (at, _), caller(at, certificate) as to:
        read = to.stream("BaseModels/ReadFile", ReadFileRequest(), FilePiece)
        assert [piece.offset for piece in read] == [0, 1, 2]


def test_a_stream_that_stalls_is_given_up(certificate: Certificates):
    """
    One piece and then silence: the piece is read, then the caller is told.
    """
    over = threading.Event()

    def stalling() -> Iterator[bytes]:
        yield FilePiece(offset=1).SerializeToString()
        over.wait(10)

    with served(certificate, stream=stalling) as (at, _), caller(at, certificate) as to:
        read = to.stream("BaseModels/ReadFile", ReadFileRequest(), FilePiece, stall_s=0.3)
        assert next(read).offset == 1
        with pytest.raises(Unreachable, match=r"nothing for 0\.3 s"):
            next(read)
        over.set()


def test_a_slow_reader_is_not_a_stalled_stream(certificate: Certificates):
    """
    The time that the caller itself spends on a piece does not count.
    """
    pieces = [FilePiece(offset=n).SerializeToString() for n in range(2)]
    with served(certificate, stream=lambda: iter(pieces)) as (at, _), caller(at, certificate) as to:
        read = to.stream("BaseModels/ReadFile", ReadFileRequest(), FilePiece, stall_s=0.2)
        next(read)
        time.sleep(0.5)
        assert next(read).offset == 1


def test_a_new_token_is_shown_from_then_on(certificate: Certificates):
    """
    A renewed token needs no new connection.
    """
    with served(certificate) as (at, script), caller(at, certificate, token="old") as to:
        fetch(to)
        to.show("new")
        fetch(to)
    assert [seen.metadata[TOKEN_HEADER] for seen in script.seen] == ["Bearer old", "Bearer new"]


def test_closing_ends_a_wait(certificate: Certificates):
    """
    A caller that waits for a coordinator to come back lets go at once when it is closed.
    """
    to = caller(f"127.0.0.1:{closed_port()}", certificate, timeout_s=60, jitter=lambda: 1.0)
    threading.Timer(0.3, to.close).start()
    with pytest.raises(Unreachable):
        to.call("Admin/Status", StatusRequest(), StatusResponse)
    with pytest.raises(Unreachable, match="was closed"):
        fetch(to)


def closed_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def talking(words: bytes) -> Iterator[str]:
    """A listener that says the same to everybody."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                peer.sendall(words)
                peer.recv(1000)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
