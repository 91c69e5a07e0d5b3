"""The relay against an upstream in this process, over real TLS."""

import asyncio
import gzip
import socket
import ssl
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.node_pb2 import Node
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fedia3.errors import Conflict
from fedia3.proto.fleet import (
    SMALL_CALL,
    Answer,
    Call,
    Judge,
    LetThrough,
    refusal,
)
from fedia3.proto.relay import CALLS_OF_ONE, Relay, RelayServer, Upstream

PULL = "/v1/fleet/pull-messages"
POLL = PullMessagesRequest(node=Node(node_id=7)).SerializeToString()
NOTHING = PullMessagesResponse().SerializeToString()


@dataclass(frozen=True)
class Certificate:
    """A server's certificate for this machine, which is its own authority."""

    chain: Path
    key: Path

    @property
    def pem(self) -> str:
        return self.chain.read_text()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Made once: signed by itself, for 127.0.0.1 and localhost."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "chain.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return Certificate(folder / "chain.pem", folder / "key.pem")


@dataclass
class SuperLinkTwin:
    """Remembers what it is asked and gives one answer."""

    status: int = 200
    body: bytes = NOTHING
    seen: list[tuple[str, bytes, dict[str, str]]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self.seen.append((request.url.path, await request.body(), dict(request.headers)))
        await Response(self.body, self.status, media_type="application/protobuf")(
            scope, receive, send
        )


@asynccontextmanager
async def served(app: object, certificate: Certificate) -> AsyncIterator[int]:
    """The application's port while the block runs."""
    server = RelayServer(
        app,
        host="127.0.0.1",
        port=0,
        certificate=certificate.chain,
        private_key=certificate.key,
    )
    await server.start()
    try:
        yield server.port
    finally:
        await server.stop()


def relayed(
    certificate: Certificate,
    twin: SuperLinkTwin,
    ask: Callable[[httpx.AsyncClient], object],
    judge: Judge | None = None,
    max_body: int = 1000,
) -> httpx.Response:
    """What a node gets through a relay in front of the twin."""

    async def scenario() -> httpx.Response:
        async with served(twin, certificate) as behind:
            upstream = Upstream(f"127.0.0.1:{behind}", certificate.pem)
            relay = Relay(upstream, judge or LetThrough(), max_body)
            async with served(relay, certificate) as port, node(certificate, port) as client:
                response: httpx.Response = await ask(client)  # type: ignore[misc]
            await upstream.close()
            return response

    return asyncio.run(scenario())


def node(certificate: Certificate, port: int) -> httpx.AsyncClient:
    """A node's HTTP client."""
    verify = ssl.create_default_context(cadata=certificate.pem)
    return httpx.AsyncClient(base_url=f"https://localhost:{port}", verify=verify)


def test_a_fleet_call_is_passed_on_with_flowers_headers_only(certificate: Certificate) -> None:
    """
    Path, body and Flower's headers arrive upstream; a caller's other headers do not.
    """
    twin = SuperLinkTwin()
    headers = {"flwr-public-key": "a2V5", "flwr-timestamp": "now", "cookie": "x=1"}
    response = relayed(certificate, twin, lambda c: c.post(PULL, content=POLL, headers=headers))
    assert (response.status_code, response.content) == (200, NOTHING)
    ((path, body, got),) = twin.seen
    assert (path, body) == (PULL, POLL)
    assert got["flwr-public-key"] == "a2V5"
    assert "cookie" not in got


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/list-nodes",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "//v1/fleet/pull-messages",
        "/openapi.json",
        "/docs",
        "/health",
        "/",
    ],
)
def test_nothing_but_fleet_calls_gets_through(certificate: Certificate, path: str) -> None:
    """
    Flower's control and runtime APIs, its documentation and self-registration do not exist here.
    """
    twin = SuperLinkTwin()
    response = relayed(certificate, twin, lambda c: c.post(path, content=b""))
    assert response.status_code == 404
    assert twin.seen == []


def test_only_post_is_a_call(certificate: Certificate) -> None:
    """
    GET of a fleet path finds nothing.
    """
    twin = SuperLinkTwin()
    assert relayed(certificate, twin, lambda c: c.get(PULL)).status_code == 404


def test_only_objects_may_be_large(certificate: Certificate) -> None:
    """
    Everything else is small, so a large one is an attack.
    """
    twin, large = SuperLinkTwin(), b"x" * (SMALL_CALL + 1)
    for name, status in (("push-object", 200), ("pull-messages", 413), ("push-messages", 413)):
        path = f"/v1/fleet/{name}"
        response = relayed(
            certificate, twin, lambda c, to=path: c.post(to, content=large), max_body=1 << 20
        )
        assert response.status_code == status
    assert [path for path, _, _ in twin.seen] == ["/v1/fleet/push-object"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_long_body_is_refused_while_it_is_read(certificate: Certificate, chunked: bool) -> None:
    """
    Whether its length is announced or not, a body over the cap never reaches the SuperLink.
    """

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    twin = SuperLinkTwin()
    content = pieces() if chunked else b"x" * 1001
    response = relayed(certificate, twin, lambda c: c.post(PULL, content=content))
    assert response.status_code == 413
    assert twin.seen == []


def test_the_superlinks_errors_come_through(certificate: Certificate) -> None:
    """
    A node reads Flower's own error body.
    """
    twin = SuperLinkTwin(status=409, body=b'{"code": 1}')
    response = relayed(certificate, twin, lambda c: c.post(PULL, content=POLL))
    assert (response.status_code, response.content) == (409, b'{"code": 1}')


def test_a_superlink_that_is_down_is_a_bad_gateway(certificate: Certificate) -> None:
    """
    502: the node tries again, as it does for every 502, 503 and 504.
    """

    async def scenario() -> int:
        upstream = Upstream(f"127.0.0.1:{closed_port()}", certificate.pem)
        relay = Relay(upstream, LetThrough())
        async with served(relay, certificate) as port, node(certificate, port) as client:
            return (await client.post(PULL, content=POLL)).status_code

    assert asyncio.run(scenario()) == 502


def closed_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_stranger_in_the_superlinks_place_is_not_talked_to(
    certificate: Certificate, tmp_path: Path
) -> None:
    """
    An upstream whose certificate another authority signed gets no call.
    """
    twin = SuperLinkTwin()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "other")])
    now = datetime.now(UTC)
    other = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )

    async def scenario() -> int:
        async with served(twin, certificate) as behind:
            upstream = Upstream(f"127.0.0.1:{behind}", other.decode())
            relay = Relay(upstream, LetThrough())
            async with served(relay, certificate) as port, node(certificate, port) as client:
                return (await client.post(PULL, content=POLL)).status_code

    assert asyncio.run(scenario()) == 502
    assert twin.seen == []


class AnswersItself(LetThrough):
    async def before(self, call: Call) -> Answer | None:
        return Answer(body=NOTHING) if call.key == b"key" else refusal(401, "who are you?")


def test_a_judge_may_answer_itself(certificate: Certificate) -> None:
    """
    What the judge answers does not reach the SuperLink.
    """
    twin = SuperLinkTwin()
    known = {"flwr-public-key": b64encode(b"key").decode()}
    answered = relayed(
        certificate,
        twin,
        lambda c: c.post(PULL, content=POLL, headers=known),
        AnswersItself(),
    )
    refused = relayed(certificate, twin, lambda c: c.post(PULL, content=POLL), AnswersItself())
    assert (answered.status_code, refused.status_code) == (200, 401)
    assert twin.seen == []


class KnowsOneKey(LetThrough):
    async def greet(self, call: Call) -> Answer | None:
        return None if call.key == b"key" else refusal(401, "who are you?")


def head(path: str, key: bytes, size: int) -> bytes:
    """A request's first bytes: its body is announced and does not come."""
    shown = b64encode(key).decode()
    lines = (
        f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {size}",
        f"flwr-public-key: {shown}",
    )  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode()


async def dialled(
    certificate: Certificate, port: int, **versions: ssl.TLSVersion
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a relay."""
    trusted = ssl.create_default_context(cadata=certificate.pem)
    for name, version in versions.items():
        setattr(trusted, name, version)
    return await asyncio.open_connection("localhost", port, ssl=trusted)


def test_a_stranger_is_refused_before_its_body_is_read(certificate: Certificate) -> None:
    """
    Or a thousand strangers' bodies would fill the memory; then the relay hangs up.
    """

    async def scenario() -> bytes:
        relay = Relay(Upstream("127.0.0.1:1", certificate.pem), KnowsOneKey())
        async with served(relay, certificate) as port:
            reader, writer = await dialled(certificate, port)
            writer.write(head("/v1/fleet/push-object", b"nobody's", 5_000_000))
            answer = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            return answer

    answer = asyncio.run(scenario())
    assert answer.startswith(b"HTTP/1.1 401")
    assert answer.endswith(b"who are you?")


def test_one_key_has_only_so_many_calls_under_way(certificate: Certificate) -> None:
    """
    Bodies that never end come to few megabytes a key; who called less is let in.
    """

    async def scenario() -> list[bytes]:
        relay = Relay(Upstream("127.0.0.1:1", certificate.pem), LetThrough())
        async with served(relay, certificate) as port:
            open_calls = [await dialled(certificate, port) for _ in range(CALLS_OF_ONE + 1)]
            for _, writer in open_calls:
                writer.write(head("/v1/fleet/push-object", b"key", 1000))
            lines = [asyncio.create_task(reader.readline()) for reader, _ in open_calls]
            answered, _ = await asyncio.wait(lines, return_when=asyncio.FIRST_COMPLETED)
            reader, others = await dialled(certificate, port)
            others.write(head("/v1/fleet/push-object", b"other key", 4) + b"1234")
            other = await reader.readline()
            for end in (others, *(writer for _, writer in open_calls)):
                end.close()
            return [*(line.result() for line in answered), other]

    refused, other = asyncio.run(scenario())
    assert refused.startswith(b"HTTP/1.1 429")
    assert other.startswith(b"HTTP/1.1 502")  # behind the relay there is nobody


def test_a_body_that_does_not_come_is_given_up(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    408, and the connection is closed.
    """
    monkeypatch.setattr("fedia3.proto.relay.BODY_S", 0.05)

    async def scenario() -> bytes:
        relay = Relay(Upstream("127.0.0.1:1", certificate.pem), LetThrough())
        async with served(relay, certificate) as port:
            reader, writer = await dialled(certificate, port)
            writer.write(head(PULL, b"key", 1000) + b"some")
            answer = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            return answer

    assert asyncio.run(scenario()).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("sent", [b"", b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: loc"])
def test_a_connection_without_a_request_is_closed(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """
    Whoever opens thousands and says nothing, or never ends a line, does not keep them.
    """
    monkeypatch.setattr("fedia3.proto.relay.FIRST_REQUEST_S", 0.05)

    async def scenario() -> bytes:
        relay = Relay(Upstream("127.0.0.1:1", certificate.pem), LetThrough())
        async with served(relay, certificate) as port:
            reader, writer = await dialled(certificate, port)
            writer.write(sent)
            rest = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            return rest

    assert asyncio.run(scenario()) == b""


def test_headers_without_end_are_refused(certificate: Certificate) -> None:
    """
    They are not collected: the relay hangs up after a few kilobytes.
    """

    async def scenario() -> bytes:
        relay = Relay(Upstream("127.0.0.1:1", certificate.pem), LetThrough())
        async with served(relay, certificate) as port:
            reader, writer = await dialled(certificate, port)
            writer.write(head(PULL, b"key", 0)[:-2] + b"x: y\r\n" * 20_000)
            answer = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            return answer

    assert asyncio.run(scenario()).startswith(b"HTTP/1.1 400")


def test_the_door_speaks_tls_1_3_alone(certificate: Certificate) -> None:
    """
    Both ends are ours, so nothing older is needed.
    """

    async def scenario() -> None:
        async with served(SuperLinkTwin(), certificate) as port:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await dialled(certificate, port, maximum_version=ssl.TLSVersion.TLSv1_2)

    asyncio.run(scenario())


def test_an_answer_is_not_unpacked(certificate: Certificate) -> None:
    """
    A few packed kilobytes could become gigabytes: packed or not, they are passed on as they came.
    """

    class Packs(SuperLinkTwin):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            packed = {"content-encoding": "gzip"}
            await Response(self.body, headers=packed)(scope, receive, send)

    bomb = gzip.compress(b"\0" * (32 << 20))
    response = relayed(certificate, Packs(body=bomb), lambda c: c.post(PULL, content=POLL))
    assert (response.status_code, response.content) == (200, bomb)


class ReadsEverything(LetThrough):
    async def before(self, call: Call) -> Answer | None:
        assert call.message
        return None

    async def after(self, call: Call, answer: Answer) -> Answer:
        assert answer.message(call.operation) is not None
        return refusal(403, "not this one")


def test_a_judge_may_replace_the_answer(certificate: Certificate) -> None:
    """
    The judge sees the SuperLink's answer before the node does.
    """
    response = relayed(
        certificate, SuperLinkTwin(), lambda c: c.post(PULL, content=POLL), ReadsEverything()
    )
    assert response.status_code == 403


def test_bytes_that_are_no_message_are_a_bad_request(certificate: Certificate) -> None:
    """
    Garbage is answered with 400 as soon as the judge reads it.
    """
    twin = SuperLinkTwin()
    response = relayed(
        certificate, twin, lambda c: c.post(PULL, content=b"\xff\xff"), ReadsEverything()
    )
    assert response.status_code == 400
    assert twin.seen == []


class Holds(LetThrough):
    """Never answers, and knows when it was given up."""

    def __init__(self) -> None:
        self.began, self.given_up = asyncio.Event(), asyncio.Event()

    async def before(self, call: Call) -> Answer | None:
        self.began.set()
        try:
            await asyncio.sleep(600)
        finally:
            self.given_up.set()
        return None


def test_a_call_is_given_up_when_its_caller_goes(certificate: Certificate) -> None:
    """
    Through two relays: what would be fetched for a node that is gone stays at the SuperLink.
    """
    twin = SuperLinkTwin()

    async def scenario() -> None:
        holds = Holds()
        async with served(twin, certificate) as behind:
            link = Upstream(f"127.0.0.1:{behind}", certificate.pem)
            async with served(Relay(link, holds), certificate) as door:
                way = Upstream(f"localhost:{door}", certificate.pem)
                async with served(Relay(way, LetThrough()), certificate) as port:
                    async with node(certificate, port) as client:
                        poll = asyncio.create_task(client.post(PULL, content=POLL))
                        await holds.began.wait()
                        poll.cancel()
                    await asyncio.wait_for(holds.given_up.wait(), 20)
                await way.close()
            await link.close()

    asyncio.run(scenario())
    assert twin.seen == []


def test_a_taken_port_is_named(certificate: Certificate) -> None:
    """
    Two relays on one port: the second says which port and why.
    """

    async def scenario() -> None:
        async with served(SuperLinkTwin(), certificate) as port:
            with pytest.raises(Conflict, match=str(port)):
                RelayServer(
                    SuperLinkTwin(),
                    host="127.0.0.1",
                    port=port,
                    certificate=certificate.chain,
                    private_key=certificate.key,
                )

    asyncio.run(scenario())


def test_no_server_header_is_sent(certificate: Certificate) -> None:
    """
    Who serves stays unsaid.
    """
    response = relayed(certificate, SuperLinkTwin(), lambda c: c.post(PULL, content=POLL))
    assert "server" not in response.headers
