"""The device's way out: what it lets in, what it answers itself, what it remembers."""

import asyncio
import ssl
import zipfile
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_disk
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import Message
from flwr.proto.run_pb2 import GetRunResponse, Run
from flwr.supercore.primitives.asymmetric import sign_message, verify_signature
from starlette.requests import Request
from starlette.responses import Response

from fedia3.client.gateway import ClockedUpstream, Gatekeeper, Gateway
from fedia3.client.thin_fab import require_thin, thin_app
from fedia3.coordinator.certificates import Issued, make_authority, make_server_certificate
from fedia3.errors import BadInput
from fedia3.proto.fleet import OPERATIONS, PREFIX, Answer, Call
from fedia3.proto.relay import RelayServer, Upstream

APP = "fedia3/fedia3-rounds"
FAB = build_fab_from_disk(thin_app())
KEY = ec.generate_private_key(ec.SECP384R1())


def zipped(**files: bytes) -> bytes:
    """A zip file of these; names are written with __ for a slash."""
    data = BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return data.getvalue()


def fab_with(pyproject: bytes, **more: bytes) -> bytes:
    """The thin app with another description, or more in it."""
    files = {"pyproject.toml": pyproject, "LICENSE": b"", ".info__CONTENT": b"", **more}
    return zipped(**files)


DESCRIBED = (thin_app() / "pyproject.toml").read_bytes()


def test_the_installed_app_is_taken():
    """
    As Flower builds it; a newer version of the same description as well.
    """
    require_thin(FAB, sha256(FAB).hexdigest())
    newer = fab_with(DESCRIBED.replace(b'version = "1.0.0"', b'version = "2.7"'))
    require_thin(newer, sha256(newer).hexdigest())


@pytest.mark.parametrize(
    "fab",
    [
        fab_with(DESCRIBED, code__client__py=b"import os"),
        fab_with(DESCRIBED, fedia3__client__flower_py=b""),
        fab_with(DESCRIBED.replace(b"fedia3.client.flower:deployed", b"os:system")),
        fab_with(DESCRIBED.replace(b'publisher = "fedia3"', b'publisher = "../.."')),
        fab_with(DESCRIBED.replace(b'name = "fedia3-rounds"', b'name = "other"')),
        fab_with(DESCRIBED.replace(b'version = "1.0.0"', b'version = "../../x"')),
        fab_with(b"[project]"),
        fab_with(b"\xff"),
        fab_with(DESCRIBED + b"#" * (2 << 20)),
        zipped(**{"pyproject.toml": DESCRIBED}),
        b"no zip",
        FAB[:-30],
        b"x" * (2 << 20),
    ],
)
def test_any_other_app_is_refused(fab: bytes):
    """
    Code, other components, names that would leave Flower's folder, bombs and broken files.
    """
    with pytest.raises(BadInput):
        require_thin(fab, sha256(fab).hexdigest())


def test_an_app_under_another_digest_is_refused():
    """
    Flower keeps apps by the digest that the coordinator says.
    """
    with pytest.raises(BadInput, match="digest"):
        require_thin(FAB, "0" * 64)


def call(name: str) -> Call:
    """A call of a node."""
    return Call(OPERATIONS[PREFIX + name], {"flwr-public-key": "a2V5"}, b"")


def judged(keeper: Gatekeeper, name: str, answer: Answer) -> Answer:
    """What the node gets where the coordinator answers ``answer``."""
    return asyncio.run(keeper.after(call(name), answer))


def answered(message: GetFabResponse | GetRunResponse | PullMessagesResponse) -> Answer:
    """A message of the coordinator."""
    return Answer(body=message.SerializeToString())


def test_only_our_app_and_our_runs_reach_the_node():
    """
    Whatever the coordinator hands out.
    """
    keeper = Gatekeeper(lambda _: None)
    ours = answered(GetFabResponse(fab=Fab(hash_str=sha256(FAB).hexdigest(), content=FAB)))
    assert judged(keeper, "get-fab", ours) is ours
    run = answered(GetRunResponse(run=Run(fab_id=APP, fab_version="1.0.0")))
    assert judged(keeper, "get-run", run) is run
    evil = fab_with(DESCRIBED, x=b"")
    for name, message in (
        ("get-fab", GetFabResponse(fab=Fab(hash_str=sha256(evil).hexdigest(), content=evil))),
        ("get-fab", GetFabResponse()),
        ("get-run", GetRunResponse(run=Run(fab_id="evil/app", fab_version="1.0.0"))),
        ("get-run", GetRunResponse(run=Run(fab_id=APP, fab_version="../../x"))),
    ):
        with pytest.raises(BadInput):
            judged(keeper, name, answered(message))


def test_after_an_empty_poll_the_next_ones_are_answered_here():
    """
    Until the interval is over; a poll that brought a message is followed by another at once.
    """
    now = 0.0
    keeper = Gatekeeper(lambda _: None, check_every_s=60, clock=lambda: now)
    poll = call("pull-messages")
    assert asyncio.run(keeper.before(poll)) is None
    judged(keeper, "pull-messages", answered(PullMessagesResponse()))
    here = asyncio.run(keeper.before(poll))
    assert here is not None
    assert not PullMessagesResponse.FromString(here.body).messages_list
    assert asyncio.run(keeper.before(call("send-node-heartbeat"))) is None
    now = 60.0
    assert asyncio.run(keeper.before(poll)) is None
    judged(keeper, "pull-messages", answered(PullMessagesResponse(messages_list=[Message()])))
    assert asyncio.run(keeper.before(poll)) is None


def test_a_coordinator_that_does_not_answer_is_noticed_and_so_is_its_return():
    """
    The time is that of the first call without an answer.
    """
    now_ms = 1000
    keeper = Gatekeeper(lambda _: None, now_ms=lambda: now_ms)
    judged(keeper, "pull-messages", Answer(502))
    now_ms = 2000
    judged(keeper, "pull-messages", Answer(504))
    assert keeper.silent_since_ms == 1000
    judged(keeper, "pull-messages", answered(PullMessagesResponse()))
    assert (keeper.silent_since_ms, keeper.heard_ms) == (None, 2000)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(401, b"the device is revoked", "text/plain"), "the device is revoked"),
        (Answer(403, b"\x1b[31mred", "text/plain"), "status 403"),
        (Answer(401, b'{"code": 1}', "application/json"), "status 401"),
    ],
)
def test_a_device_that_is_shut_out_knows_why(answer: Answer, reason: str):
    """
    In the coordinator's words, as long as a terminal can show them.
    """
    keeper = Gatekeeper(lambda _: None)
    judged(keeper, "send-node-heartbeat", answer)
    assert keeper.shut_out == reason


def test_bytes_are_counted_both_ways():
    """
    Bodies, headers, and a round figure for the rest.
    """
    counted: list[int] = []
    keeper = Gatekeeper(counted.append)
    judged(keeper, "pull-messages", Answer(body=PullMessagesResponse().SerializeToString()))
    judged(keeper, "push-object", Answer(502, b"x" * 1000))
    assert counted[1] - counted[0] == 1000
    assert counted[0] > 250


def test_a_device_beyond_its_bytes_sends_nothing():
    """
    The node is told to come again.
    """
    keeper = Gatekeeper(lambda _: None, withheld=lambda: "50 MB went over the network today")
    answer = asyncio.run(keeper.before(call("pull-messages")))
    assert answer is not None
    assert answer.status == 503


@pytest.fixture(scope="module")
def authority() -> Issued:
    """Whom the device trusts."""
    return make_authority(datetime.now(UTC))


async def empty_message(scope, receive, send) -> None:
    """Any call's answer."""
    assert (await Request(scope, receive).body()) == b""
    await Response(b"")(scope, receive, send)


@asynccontextmanager
async def fleet(
    folder: Path, authority: Issued, answer: Callable[..., Awaitable[None]] = empty_message
) -> AsyncIterator[RelayServer]:
    """A coordinator's door, behind which somebody answers."""
    issued = make_server_certificate(authority, ["localhost"], datetime.now(UTC))
    (folder / "fleet.pem").write_bytes(issued.certificate)
    (folder / "fleet.key").write_bytes(issued.key)
    server = RelayServer(
        answer, host="127.0.0.1", port=0, certificate=folder / "fleet.pem",
        private_key=folder / "fleet.key",
    )  # fmt: skip
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def posted(gateway: Gateway, name: str) -> httpx.Response:
    """A call of the node to its gateway, whose certificate alone it trusts."""
    trusted = ssl.create_default_context(cafile=str(gateway.certificate))
    async with httpx.AsyncClient(verify=trusted, trust_env=False) as client:
        return await client.post(f"https://{gateway.address}{PREFIX}{name}", content=b"")


def test_calls_go_through_to_the_coordinator_of_the_pinned_authority(
    tmp_path: Path, authority: Issued
):
    """
    Over TLS on both sides; what is no call of the fleet goes nowhere.
    """

    async def relayed() -> tuple[int, int, int | None]:
        async with fleet(tmp_path, authority) as server:
            keeper = Gatekeeper(lambda _: None)
            address = f"localhost:{server.port}"
            gateway = Gateway(tmp_path / "state", address, authority.certificate, keeper, KEY)
            await gateway.start()
            try:
                poll = await posted(gateway, "pull-messages")
                other = await posted(gateway, "register-node")
            finally:
                await gateway.stop()
            return poll.status_code, other.status_code, keeper.heard_ms

    poll, other, heard = asyncio.run(relayed())
    assert (poll, other) == (200, 404)
    assert heard is not None


def test_a_coordinator_of_another_authority_is_nobody(tmp_path: Path, authority: Issued):
    """
    Whoever listens at the address: without the pinned authority there is no answer.
    """

    async def relayed() -> tuple[int, int | None]:
        async with fleet(tmp_path, make_authority(datetime.now(UTC))) as server:
            keeper = Gatekeeper(lambda _: None)
            address = f"localhost:{server.port}"
            gateway = Gateway(tmp_path / "state", address, authority.certificate, keeper, KEY)
            await gateway.start()
            try:
                poll = await posted(gateway, "pull-messages")
            finally:
                await gateway.stop()
            return poll.status_code, keeper.silent_since_ms

    status, silent = asyncio.run(relayed())
    assert status == 502
    assert silent is not None


def test_the_gateways_key_is_its_owners_alone(tmp_path: Path, authority: Issued):
    """
    0600, as every key in the state folder.
    """
    keeper = Gatekeeper(lambda _: None)

    async def opened() -> None:
        await Gateway(tmp_path, "localhost:1", authority.certificate, keeper, KEY).stop()

    asyncio.run(opened())
    assert (tmp_path / "gateway.key").stat().st_mode & 0o777 == 0o600


async def strict_about_time(scope, receive, send) -> None:
    """A SuperLink's answer: 401 unless the time is its own to 300 s and the key has signed it."""
    headers = Request(scope, receive).headers
    stamp, signature = headers["flwr-timestamp"], b64decode(headers["flwr-signature"])
    is_now = abs(datetime.now(UTC) - datetime.fromisoformat(stamp)) < timedelta(seconds=300)
    holds = verify_signature(KEY.public_key(), stamp.encode(), signature)
    await Response(status_code=200 if is_now and holds else 401)(scope, receive, send)


@pytest.mark.parametrize("off", [timedelta(hours=1), -timedelta(days=400)])
def test_a_wrong_clock_is_told_right_by_the_coordinators(
    tmp_path: Path, authority: Issued, off: timedelta
):
    """A refused call is signed anew for the coordinator's time, the next ones from the start."""

    def signed_by_node() -> Call:
        stamp = (datetime.now(UTC) + off).isoformat()
        signature = b64encode(sign_message(KEY, stamp.encode())).decode()
        headers = {"flwr-timestamp": stamp, "flwr-signature": signature}
        return Call(OPERATIONS[PREFIX + "pull-messages"], headers, b"")

    async def sent() -> list[int]:
        async with fleet(tmp_path, authority, strict_about_time) as server:
            way = ClockedUpstream(
                f"localhost:{server.port}",
                authority.certificate,
                KEY,
                now=lambda: datetime.now(UTC) + off,
            )
            try:
                return [(await way.send(signed_by_node())).status for _ in range(2)]
            finally:
                await way.close()

    assert asyncio.run(sent()) == [200, 200]


def test_the_clock_is_told_right_for_the_nodes_own_calls_alone(tmp_path: Path, authority: Issued):
    """
    Whoever else on this machine finds the gateway: it lends nobody the node's signature.
    """
    off, other = timedelta(hours=1), ec.generate_private_key(ec.SECP384R1())

    def forged(signer: ec.EllipticCurvePrivateKey, signed: str, shown: str) -> Call:
        signature = b64encode(sign_message(signer, signed.encode())).decode()
        headers = {"flwr-timestamp": shown, "flwr-signature": signature}
        return Call(OPERATIONS[PREFIX + "pull-messages"], headers, b"")

    async def sent() -> list[int]:
        async with fleet(tmp_path, authority, strict_about_time) as server:
            way = ClockedUpstream(
                f"localhost:{server.port}",
                authority.certificate,
                KEY,
                now=lambda: datetime.now(UTC) + off,
            )
            now = (datetime.now(UTC) + off).isoformat()
            calls = [forged(KEY, now, now), forged(other, now, now), forged(KEY, "then", now)]
            try:
                return [(await way.send(call)).status for call in calls]
            finally:
                await way.close()

    assert asyncio.run(sent()) == [200, 401, 401]


@pytest.mark.parametrize(
    "date",
    [
        "",
        "yesterday",
        "Mon, 01 Jan 2024 00:00:00 -0000",
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "Mon, 01 Jan 0001 00:00:00 GMT",
    ],
)
def test_a_time_that_cannot_be_is_not_learned(
    monkeypatch: pytest.MonkeyPatch, authority: Issued, date: str
):
    """
    Whatever a coordinator says the time is, the node gets its answer.
    """

    async def says(_: Upstream, call: Call) -> Answer:
        return Answer(401, date=date)

    monkeypatch.setattr(Upstream, "send", says)
    now = datetime.now(UTC).isoformat()
    signature = b64encode(sign_message(KEY, now.encode())).decode()
    headers = {"flwr-timestamp": now, "flwr-signature": signature}
    call = Call(OPERATIONS[PREFIX + "pull-messages"], headers, b"")

    async def sent() -> list[int]:
        way = ClockedUpstream("localhost:1", authority.certificate, KEY)
        try:
            return [(await way.send(call)).status for _ in range(2)]
        finally:
            await way.close()

    assert asyncio.run(sent()) == [401, 401]
