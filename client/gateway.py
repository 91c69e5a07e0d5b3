"""The device's way out to the Flower fleet: one relay, which looks at everything that passes.

``flower-supernode`` speaks to it on localhost; it speaks to the coordinator, whose authority was
pinned at enrolment. It counts bytes, refuses every app but the thin one, answers polls itself while
the coordinator need not be asked, and knows when the coordinator last answered.
"""

import logging
import re
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fab_pb2 import GetFabResponse
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.run_pb2 import GetRunResponse
from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import sign_message, verify_signature

from fedia3.client.thin_fab import VERSION, app_id, require_thin
from fedia3.clock import wall_ms
from fedia3.errors import BadInput
from fedia3.private_files import write_private
from fedia3.proto.fleet import Answer, Call, refusal
from fedia3.proto.relay import Relay, RelayServer, Upstream

HTTP_BYTES = 250  # request line, status line and what the HTTP library adds, both ways
NOBODY_THERE = {502, 503, 504}
UNAUTHORIZED = 401
SHUT_OUT = {UNAUTHORIZED, 403}
CLOCKS_AGREE = timedelta(seconds=60)
NO_CLOCK = timedelta(days=36525)  # a clock that was never set stands at 1970
PLAIN = re.compile(r"[\x20-\x7e]{1,200}")

logger = logging.getLogger(__name__)


class Gatekeeper:
    """Judges the calls of this device's node, and remembers how the coordinator answered.

    Args:
        count: told the bytes of each call, both ways.
        check_every_s: after an empty poll, how long the next ones are answered here; 0: never.
        withheld: why the network may not be used now; None: it may.
        on_message: told when the node has all of a message.
        clock: seconds, steady.
        now_ms: ms since 1970.
    """

    def __init__(
        self,
        count: Callable[[int], None],
        *,
        check_every_s: float = 0.0,
        withheld: Callable[[], str | None] = lambda: None,
        on_message: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], int] = wall_ms,
    ) -> None:
        self._count, self._withheld, self.on_message = count, withheld, on_message
        self._check_every_s, self._clock, self._now_ms = check_every_s, clock, now_ms
        self._app = app_id()
        self._ask_again = clock()
        self.silent_since_ms: int | None = None
        self.shut_out: str | None = None
        self.heard_ms: int | None = None  # the last answer

    async def greet(self, call: Call) -> Answer | None:  # noqa: ARG002  # the protocol's
        """The node is the only one who knows the way here; read what it sends."""
        return None

    async def before(self, call: Call) -> Answer | None:
        """An empty poll's answer where the coordinator need not be asked; else pass it on."""
        if (reason := self._withheld()) is not None:
            return refusal(503, reason)
        if call.operation.name == "pull-messages" and self._clock() < self._ask_again:
            return Answer(body=PullMessagesResponse().SerializeToString())
        return None

    async def after(self, call: Call, answer: Answer) -> Answer:
        """The coordinator's answer, if this device can take it.

        Raises:
            BadInput: it would have the device run something else than fedia3.
        """
        headers = sum(len(name) + len(value) + 4 for name, value in call.headers.items())
        self._count(HTTP_BYTES + headers + len(call.body) + len(answer.body))
        self._note(answer)
        if answer.status != 200:
            return answer
        match call.operation.name:
            case "pull-messages":
                self._rest_after(answer.message(call.operation))
            case "get-run":
                self._require_our_run(answer.message(call.operation))
            case "get-fab":
                _require_our_app(answer.message(call.operation))
            case "confirm-message-received":
                self.on_message()
        return answer

    def _note(self, answer: Answer) -> None:
        if answer.status in NOBODY_THERE:
            self.silent_since_ms = self.silent_since_ms or self._now_ms()
            return
        self.silent_since_ms, self.heard_ms = None, self._now_ms()
        self.shut_out = _reason(answer) if answer.status in SHUT_OUT else None

    def _rest_after(self, pulled: object) -> None:
        assert isinstance(pulled, PullMessagesResponse)
        if not pulled.messages_list:
            self._ask_again = self._clock() + self._check_every_s

    def _require_our_run(self, told: object) -> None:
        assert isinstance(told, GetRunResponse)
        run = told.run
        # both become a part of a path in Flower's home
        if run.fab_id != self._app or not VERSION.fullmatch(run.fab_version):
            raise BadInput(f"this device takes part in runs of {self._app} alone")


def _require_our_app(told: object) -> None:
    assert isinstance(told, GetFabResponse)
    require_thin(told.fab.content, told.fab.hash_str)


def _reason(answer: Answer) -> str:
    """What the coordinator says, fit for a terminal."""
    said = answer.body.decode("ascii", "replace") if answer.media_type.startswith("text") else ""
    return said if PLAIN.fullmatch(said) else f"status {answer.status}"


class ClockedUpstream(Upstream):
    """The way to the coordinator, whose clock counts: Flower takes no call that is 300 s off.

    Where the coordinator refuses the node and tells another time than this device has, calls are
    signed anew for its time, with the node's own key, until the clocks agree.
    """

    def __init__(
        self,
        fleet_address: str,
        ca: bytes,
        key: ec.EllipticCurvePrivateKey,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(fleet_address, ca.decode(), max_connections=8)
        self._key, self._now = key, now
        self._offset = timedelta()  # the coordinator's clock less ours

    async def send(self, call: Call) -> Answer:
        """The coordinator's answer."""
        answer = await super().send(self._timed(call))
        if answer.status == UNAUTHORIZED and self._has_learned(answer):
            answer = await super().send(self._timed(call))
        return answer

    def _timed(self, call: Call) -> Call:
        if not self._offset or not self._is_nodes(call):
            return call
        stamp = (self._now() + self._offset).isoformat()
        signature = b64encode(sign_message(self._key, stamp.encode())).decode()
        signed = {TIMESTAMP_HEADER: stamp, FLEET_HTTP_SIGNATURE_HEADER: signature}
        return replace(call, headers={**call.headers, **signed})

    def _is_nodes(self, call: Call) -> bool:
        """Whether the node has signed it: others on this machine may find the gateway too."""
        try:
            signature = b64decode(call.headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        except (KeyError, ValueError):
            return False
        stamp = call.headers.get(TIMESTAMP_HEADER, "").encode()
        return verify_signature(self._key.public_key(), stamp, signature)

    def _has_learned(self, answer: Answer) -> bool:
        """Whether the coordinator's time is another than was thought."""
        try:
            offset = parsedate_to_datetime(answer.date) - self._now()
        except (ValueError, TypeError):  # no time, or one of no zone
            return False
        if abs(offset) > NO_CLOCK:
            return False
        differs = abs(offset - self._offset) > CLOCKS_AGREE
        if differs:
            self._offset = offset if abs(offset) > CLOCKS_AGREE else timedelta()
            logger.warning("this device's clock is %.0f s off", -offset.total_seconds())
        return differs


class Gateway:
    """The relay of a state folder, serving on a free port of localhost.

    Args:
        folder: for its certificate, made anew, and the key.
        fleet_address: ``host:port`` of the coordinator's fleet.
        ca: PEM of who signs the coordinator's certificates.
        node_key: the node's.
    """

    def __init__(
        self,
        folder: Path,
        fleet_address: str,
        ca: bytes,
        keeper: Gatekeeper,
        node_key: ec.EllipticCurvePrivateKey,
    ) -> None:
        self.keeper = keeper
        self.certificate, key = folder / "gateway.pem", folder / "gateway.key"
        _make_certificate(self.certificate, key)
        self._upstream = ClockedUpstream(fleet_address, ca, node_key)
        self._server = RelayServer(
            Relay(self._upstream, keeper),
            host="127.0.0.1",
            port=0,
            certificate=self.certificate,
            private_key=key,
        )

    @property
    def address(self) -> str:
        """What ``flower-supernode --superlink`` is given."""
        return f"localhost:{self._server.port}"

    async def start(self) -> None:
        """Serve from now on."""
        await self._server.start()

    async def stop(self) -> None:
        """Serve no more."""
        await self._server.stop()
        await self._upstream.close()


def _make_certificate(certificate: Path, key_file: Path) -> None:
    """A certificate of localhost that signs itself; no wrong clock makes it invalid."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedia3 gateway of this device")])
    names = [x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime(2000, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2100, 1, 1, tzinfo=UTC))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_private(key_file, pem)
    write_private(certificate, made.public_bytes(Encoding.PEM))
