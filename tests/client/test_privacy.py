"""Private text never leaves a device: every byte it sends is looked at, and the search can fail.

The device is the real one, by its command line, against a real coordinator. Between them stand two
wiretaps: relays that end TLS with a certificate of the coordinator's own authority, whose key a
test has, and keep what the device sent in clear. Nothing in the device knows that they are there.
Not looked into are HTTP/2 headers, which are compressed letter by letter; that they are few is
checked instead.
"""

import asyncio
import base64
import contextlib
import gzip
import json
import os
import random
import signal
import socket
import ssl
import string
import subprocess
import sys
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
import pytest

from fedia3.adapters.adapter import PersonalAdapter
from fedia3.adapters.manifest import read_manifest, schema
from fedia3.client.coordinator import Coordinator
from fedia3.client.personal_store import ones_digest
from fedia3.coordinator.certificates import Issued, make_authority, make_server_certificate
from fedia3.errors import Fedia3Error
from fedia3.processes import free_ports

CHUNK = 10  # characters; 20 in a row, wherever they begin, hold a whole chunk
PATIENCE_S = 180.0
MAIN = (sys.executable, "-c", "from fedia3.cli import main; main()")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


# --- the search -----------------------------------------------------------------------------


def leaks(sent: Iterable[bytes], secrets: Iterable[str]) -> list[str]:
    """What of the secrets the connections' bytes hold, in clear or in a usual disguise."""
    seen = [view for connection in sent for view in views(connection)]
    pieces = {piece for secret in secrets for piece in pieces_of(secret)}
    return sorted(p for p in pieces if any(is_in(p, view) for view in seen))


def pieces_of(secret: str) -> set[str]:
    """The secret in chunks, its rest left out; what is shorter, whole."""
    if len(secret) < CHUNK:
        return {secret}
    return {secret[i : i + CHUNK] for i in range(0, len(secret) - CHUNK + 1, CHUNK)}


def is_in(piece: str, view: bytes) -> bool:
    """Whether a view holds the piece as text, UTF-16, hex, base64 or percent-encoded."""
    return any(form in view for form in disguises(piece))


def disguises(piece: str) -> Iterator[bytes]:
    """The piece as somebody might send it."""
    data = piece.encode()
    yield data
    yield piece.encode("utf-16-le")
    yield data.hex().encode()
    yield urllib.parse.quote(piece).encode()
    yield json.dumps(piece)[1:-1].encode()
    if len(data) < CHUNK:
        return  # of a short one's base64 too little is its own
    for shift in range(3):  # it may begin in the middle of something: the edges are others'
        coded = base64.b64encode(b"\0" * shift + data)
        yield coded[4 if shift else 0 : -4]


def views(sent: bytes) -> Iterator[bytes]:
    """The bytes; without HTTP/2's frame headers; and whatever can be unpacked in them."""
    plain = [sent, h2_data(sent)]
    yield from plain
    for data in plain:
        yield from unpacked(data)


def h2_data(sent: bytes) -> bytes:
    """The DATA frames of an HTTP/2 connection, one behind the other; empty for another."""
    return b"".join(payload for kind, payload in h2_frames(sent) if kind == 0)


def h2_frames(sent: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and payload of each frame."""
    place = len(PREFACE) if sent.startswith(PREFACE) else len(sent)
    while place + 9 <= len(sent):
        size = int.from_bytes(sent[place : place + 3])
        yield sent[place + 3], sent[place + 9 : place + 9 + size]
        place += 9 + size


def unpacked(data: bytes) -> Iterator[bytes]:
    """What zlib, gzip and zip members hold, wherever one begins."""
    for place in range(len(data) - 2):
        head = data[place : place + 4]
        if head[:2] == b"\x1f\x8b" or (head[0] == 0x78 and head[1] in (0x01, 0x5E, 0x9C, 0xDA)):
            yield from _inflated(data[place:], 47)
        elif head == b"PK\x03\x04":
            names = data[place + 26 : place + 30]
            begin = 30 + int.from_bytes(names[:2], "little") + int.from_bytes(names[2:], "little")
            yield from _inflated(data[place + begin :], -15)


def _inflated(data: bytes, bits: int) -> Iterator[bytes]:
    with contextlib.suppress(zlib.error):
        yield zlib.decompressobj(bits).decompress(data, 1 << 24)


SECRET = "my doctor says that it is nothing to worry about"


@pytest.mark.parametrize(
    "sent",
    [
        SECRET.encode(),
        b"xx" + SECRET[7:27].encode() + b"xx",
        SECRET.encode().hex().encode(),
        base64.b64encode(SECRET.encode()),
        base64.b64encode(b"a" + SECRET.encode()),
        base64.b64encode(b"ab" + SECRET.encode()),
        b"head" + zlib.compress(SECRET.encode()) + b"tail",
        gzip.compress(SECRET.encode()),
        SECRET.encode("utf-16-le"),
        urllib.parse.quote(SECRET).encode(),
        PREFACE + b"\0\0\x0a\0\0\0\0\0\1" + SECRET[:10].encode()
        + b"\0\0\x26\0\0\0\0\0\1" + SECRET[10:].encode(),
    ],
)  # fmt: skip
def test_the_search_finds_a_secret_however_it_is_sent(sent: bytes):
    """
    In clear, in part, encoded, compressed, and cut by HTTP/2's frames.
    """
    assert leaks([sent], [SECRET])


def test_the_search_finds_nothing_where_nothing_is():
    """
    Random bytes, and text of others.
    """
    lot = random.Random(0)
    others = b"a doctor said nothing about worries"
    assert leaks([lot.randbytes(20_000), others, zlib.compress(others)], [SECRET]) == []


# --- the wiretap ----------------------------------------------------------------------------


class Wiretap:
    """Ends TLS on 127.0.0.1 and speaks TLS to ``target``; keeps what callers send, in clear."""

    def __init__(self, folder: Path, authority: Issued, target: str) -> None:
        issued = make_server_certificate(authority, ["127.0.0.1"], datetime.now(UTC))
        (folder / "tap.pem").write_bytes(issued.certificate)
        (folder / "tap.key").write_bytes(issued.key)
        self._shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._shown.load_cert_chain(folder / "tap.pem", folder / "tap.key")
        self._trusted = ssl.create_default_context(cadata=authority.certificate.decode())
        for context in (self._shown, self._trusted):
            context.set_alpn_protocols(["h2", "http/1.1"])
        self._target = target.rpartition(":")
        self.sent: list[bytearray] = []  # by connection
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"

    async def serve(self) -> None:
        """Until the loop ends."""
        server = await asyncio.start_server(self._relay, sock=self._socket, ssl=self._shown)
        async with server:
            await server.serve_forever()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            host, _, port = self._target
            there = await asyncio.open_connection(host, int(port), ssl=self._context_for(writer))
            kept = bytearray()
            self.sent.append(kept)
            await asyncio.gather(
                self._pump(reader, there[1], kept), self._pump(there[0], writer, None)
            )
        writer.close()

    def _context_for(self, writer: asyncio.StreamWriter) -> ssl.SSLContext:
        chosen = writer.get_extra_info("ssl_object").selected_alpn_protocol()
        self._trusted.set_alpn_protocols([chosen or "http/1.1"])
        return self._trusted

    @staticmethod
    async def _pump(
        source: asyncio.StreamReader, sink: asyncio.StreamWriter, kept: bytearray | None
    ) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := await source.read(1 << 16):
                if kept is not None:
                    kept += data
                sink.write(data)
                await sink.drain()
        sink.close()


@contextmanager
def serving(*taps: Wiretap) -> Iterator[None]:
    """The taps, in a thread of their own."""
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        await asyncio.gather(*(tap.serve() for tap in taps), return_exceptions=True)

    task = loop.create_task(serve())
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


# --- a device and its coordinator -----------------------------------------------------------


class Bugged:
    """A coordinator, a device that is enrolled with it, and taps on the two lines between them."""

    def __init__(self, root: Path, base: Path) -> None:
        self.root, self.fed, self.state = root, root / "fed", root / "state"
        self.data = root / "private texts" / "chat.jsonl"
        self.data.parent.mkdir(parents=True)
        self.texts = made_up_texts(30)
        self.data.write_text("".join(json.dumps({"text": text}) + "\n" for text in self.texts))
        self.ports = free_ports(3)
        self.base, self._running = base, []

    def cli(self, *words: str) -> str:
        done = subprocess.run(
            [*MAIN, *words], capture_output=True, text=True, timeout=PATIENCE_S, check=True
        )
        return done.stdout

    def start(self, name: str, *words: str, **env: str) -> subprocess.Popen[bytes]:
        with (self.root / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*MAIN, *words], stdout=log, stderr=log, env={**os.environ, **env}
            )
        self._running.append(process)
        return process

    def begin(self) -> None:
        """A coordinator that runs rounds with one device, which is enrolled."""
        grpc, fleet, superlink = map(str, self.ports)
        self.cli(
            "coordinator", "init", str(self.fed), "--host", "127.0.0.1", "--base", str(self.base),
            "--grpc-port", grpc, "--fleet-port", fleet, "--superlink-port", superlink,
        )  # fmt: skip
        settings = self.fed / "coordinator.toml"
        ours = "[rounds]\nmin_clients = 1\nquorum = 1\n"
        settings.write_text(settings.read_text().replace("[rounds]\n", ours))
        self.start("serve", "coordinator", "serve", "--config", str(self.fed))
        code = eventually(self._invite, "an invite")
        self.cli(
            "client", "enroll", f"127.0.0.1:{grpc}", code, "--ca", str(self.fed / "ca.pem"),
            "--state", str(self.state),
        )  # fmt: skip

    def _invite(self) -> str | None:
        with contextlib.suppress(subprocess.CalledProcessError):
            told = self.cli("coordinator", "invite", "--user", "ann", "--config", str(self.fed),
                            "--json")  # fmt: skip
            return str(json.loads(told)["code"])
        return None

    @contextmanager
    def tapped(self) -> Iterator[tuple[Wiretap, Wiretap]]:
        """Taps on the services' line and on the fleet's; the device is told their addresses."""
        authority = Issued((self.fed / "ca.pem").read_bytes(), (self.fed / "ca.key").read_bytes())
        taps = [Wiretap(self.root, authority, f"127.0.0.1:{port}") for port in self.ports[:2]]
        file = self.state / "device.json"
        known = json.loads(file.read_text())
        known["address"], known["fleet_address"] = taps[0].address, taps[1].address
        file.write_text(json.dumps(known))
        with serving(*taps):
            yield taps[0], taps[1]

    def run(self, **env: str) -> subprocess.Popen[bytes]:
        return self.start(
            "run", "client", "run", "--data", str(self.data), "--state", str(self.state),
            "--share-personal", "--personal-every", "1", **env,
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.state / "status.json").read_text())
            return found
        return {}

    @property
    def secrets(self) -> list[str]:
        """What nobody else may learn: the texts, and where they and everything else lie."""
        places = [str(self.data), str(self.state), str(self.root), str(Path.home() / "x")[:-2]]
        return [*self.texts, "private texts", *(p for p in places if len(p) > 4)]

    def logs(self) -> str:
        logs = [*self.root.glob("*.log"), *self.state.glob("logs/*"), *self.fed.glob("logs/*")]
        return "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in logs)

    def end(self) -> None:
        for process in reversed(self._running):
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait(10)


def made_up_texts(count: int) -> list[str]:
    """Texts that nobody else has written: 60 characters and more."""
    lot = random.Random(26)
    words = ["".join(lot.choices(string.ascii_lowercase, k=lot.randint(3, 8))) for _ in range(400)]
    return [" ".join(lot.choices(words, k=12)) for _ in range(count)]


def eventually(condition: Callable[[], Any], what: str, logs: Callable[[], str] = str) -> Any:
    """The condition's first true value."""
    ends = time.monotonic() + PATIENCE_S
    while time.monotonic() < ends:
        if value := condition():
            return value
        time.sleep(0.2)
    pytest.fail(f"not within {PATIENCE_S:g} s: {what}\n{logs()}")


def peers(root: psutil.Process) -> set[str]:
    """Whom a process and all below it are connected to."""
    found: set[str] = set()
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            found |= {c.raddr.ip for c in process.net_connections("inet") if c.raddr}
    return found


@pytest.fixture(scope="module")
def bugged(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bugged]:
    """A coordinator and an enrolled device that does not run yet."""
    made = Bugged(tmp_path_factory.mktemp("bugged"), toy_folder)
    try:
        made.begin()
        yield made
    finally:
        made.end()


def text_of(tap: Wiretap) -> bytes:
    """Everything that went through, in one."""
    return b"\n".join(bytes(sent) for sent in tap.sent)


@pytest.mark.slow
def test_a_full_round_sends_nothing_of_the_text_and_no_path(bugged: Bugged):
    """
    Rounds trained, the global fetched, the own part shared; and a planted leak on either line is
    found by the same search.
    """
    with bugged.tapped() as (services, fleet):
        device = psutil.Process(bugged.run().pid)
        met: set[str] = set()

        def has_done_everything() -> bool:
            met.update(peers(device))
            status = bugged.status()
            return bool(status.get("last_round") and status.get("shared_version"))

        eventually(has_done_everything, "a round and a shared part", bugged.logs)
        eventually(lambda: b"num_examples" in text_of(fleet), "an update is sent", bugged.logs)
        device.terminate()
        device.wait(30)
        sent = [bytes(s) for tap in (services, fleet) for s in tap.sent]
        assert b"fedia3.adapter.v1" in text_of(services)  # the part went through the tap
        assert b"/v1/fleet/push-object" in text_of(fleet)
        assert leaks(sent, bugged.secrets) == []
        assert met <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        assert sum(len(p) for s in sent for kind, p in h2_frames(s) if kind in (1, 9)) < 20_000

        _plant_in_services(bugged)
        _plant_in_fleet(bugged, fleet)
        for tap in (services, fleet):
            assert leaks([bytes(s) for s in tap.sent], bugged.secrets)


def _plant_in_services(bugged: Bugged) -> None:
    """A text as the key of a publish."""
    shape = schema(read_manifest(bugged.base))
    part = PersonalAdapter(shape, shape_zeros(shape.n_params), ones_digest(shape))
    with Coordinator.from_state(bugged.state) as home, contextlib.suppress(Fedia3Error):
        home.publish(part, num_examples=1, idem_key=bugged.texts[0][:100])


def shape_zeros(count: int) -> Any:
    """A delta that changes nothing."""
    import numpy as np  # noqa: PLC0415  # only here

    return np.zeros(count, dtype=np.float32)


def _plant_in_fleet(bugged: Bugged, fleet: Wiretap) -> None:
    """A compressed text as a message."""
    trusted = ssl.create_default_context(cafile=str(bugged.fed / "ca.pem"))
    with httpx.Client(verify=trusted, trust_env=False) as client:
        client.post(
            f"https://{fleet.address}/v1/fleet/push-messages",
            content=zlib.compress(bugged.texts[1].encode()),
        )


FAILS = """
import sys
if "fedia3.client.trainer_process" in sys.orig_argv:
    from fedia3.client import trainer

    def train_rows(model, bank, task, jobs, plan):
        raise RuntimeError(f"cannot train on {open(DATA).read()} of {DATA}")

    trainer.train_rows = train_rows
"""


@pytest.mark.slow
def test_a_training_that_fails_quoting_the_text_sends_the_failures_class_alone(bugged: Bugged):
    """
    The exception holds every text and the path; what goes out says RuntimeError.
    """
    planted = bugged.root / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(f"DATA = {str(bugged.data)!r}\n{FAILS}")
    with bugged.tapped() as (services, fleet):
        device = bugged.run(PYTHONPATH=str(planted))
        eventually(lambda: b"RuntimeError" in text_of(fleet), "a failed round", bugged.logs)
        device.terminate()
        assert device.wait(30) == 0
        logged = "".join(p.read_text() for p in bugged.state.glob("logs/*"))
        assert bugged.texts[0] in logged  # it stays in the device's own log
        sent = [bytes(s) for tap in (services, fleet) for s in tap.sent]
        assert leaks(sent, bugged.secrets) == []


def test_a_tap_keeps_what_is_sent_in_clear(tmp_path: Path):
    """
    Its caller sees the server's answer and trusts one authority for both.
    """
    authority = make_authority(datetime.now(UTC))
    with serving_http(tmp_path, authority) as target:
        tap = Wiretap(tmp_path, authority, target)
        trusted = ssl.create_default_context(cadata=authority.certificate.decode())
        with serving(tap), httpx.Client(verify=trusted, trust_env=False) as client:
            assert client.post(f"https://{tap.address}/", content=SECRET).text == "thanks"
        assert leaks([bytes(s) for s in tap.sent], [SECRET])


@contextmanager
def serving_http(folder: Path, authority: Issued) -> Iterator[str]:
    """A server that thanks for whatever it gets."""
    from http.server import BaseHTTPRequestHandler, HTTPServer  # noqa: PLC0415  # only here

    class Thanks(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", "6")
            self.end_headers()
            self.wfile.write(b"thanks")

        def log_message(self, *_: object) -> None:
            pass

    issued = make_server_certificate(authority, ["127.0.0.1"], datetime.now(UTC))
    (folder / "http.pem").write_bytes(issued.certificate + issued.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "http.pem")
    with HTTPServer(("127.0.0.1", 0), Thanks) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
