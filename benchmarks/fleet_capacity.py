"""How many idle devices one coordinator holds: Flower's SuperLink as it is, and behind our door.

A real coordinator (`fedia3 coordinator serve`) runs on this machine. N enrolled devices are played
by asyncio connections that do what an idle flower-supernode does: poll for messages, sleep 3 s,
poll again, and send a heartbeat every 30 s, each call signed with the node's P-384 key, over TLS.
First they call the SuperLink itself, then the fleet proxy, which holds an idle device's poll. N
grows until a stage no longer keeps up: a call failed, or the 95th percentile of a heartbeat's time
passed the limit (a poll's time says nothing where it is held on purpose). Both doors are measured
in one run on one machine; the load generator shares its processors, so the figures are lower
bounds.

    python benchmarks/fleet_capacity.py --repeats 3
"""

import argparse
import asyncio
import base64
import contextlib
import os
import random
import secrets
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "deployment"))
from harness import cpu_s

from fedia3.coordinator.config import CoordinatorConfig
from fedia3.coordinator.directory import Device, Invite, Token, open_directory
from fedia3.coordinator.setup import Setting, set_up
from fedia3.coordinator.superlink import ControlLink
from fedia3.processes import free_ports, read_statuses

POLL_S, HEARTBEAT_S = 3.0, 30.0  # literals of flwr 1.41.0
SIGNED_FOR_S = 200.0  # a signature over the time holds for 300 s


@dataclass(frozen=True)
class Player:
    """One device: its key, and what it needs to call."""

    device_id: str
    key: ec.EllipticCurvePrivateKey
    pem: bytes

    def headers(self) -> str:
        """Signed for now, as flower-supernode does for every call."""
        stamp = datetime.now(UTC).isoformat()
        signature = self.key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
        return (
            f"flwr-public-key: {base64.b64encode(self.pem).decode()}\r\n"
            f"flwr-timestamp: {stamp}\r\n"
            f"flwr-signature: {base64.b64encode(signature).decode()}\r\n"
        )


@dataclass
class Stage:
    """What N devices met in one stage."""

    beats_s: list[float] = field(default_factory=list)  # heartbeats' times
    polls: int = 0
    failures: int = 0

    def p(self, share: float) -> float:
        """A percentile of the heartbeats' times, s."""
        ordered = sorted(self.beats_s) or [float("inf")]
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Connection:
    """A kept-alive HTTP/1.1 connection over TLS: small on purpose, the machine is shared."""

    def __init__(self, port: int, tls: ssl.SSLContext, player: Player) -> None:
        self._port, self._tls, self._player = port, tls, player
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._headers, self._signed = "", float("-inf")

    async def post(self, operation: str, body: bytes) -> bytes:
        """The answer's body; anything but 200 is an error."""
        if self._writer is None or self._writer.is_closing():
            self._reader, self._writer = await asyncio.open_connection(
                "127.0.0.1", self._port, ssl=self._tls, server_hostname="127.0.0.1"
            )
        if time.monotonic() - self._signed > SIGNED_FOR_S:
            self._headers, self._signed = self._player.headers(), time.monotonic()
        head = (
            f"POST /v1/fleet/{operation} HTTP/1.1\r\nhost: 127.0.0.1\r\n"
            f"content-type: application/protobuf\r\naccept: application/protobuf\r\n"
            f"{self._headers}content-length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        assert self._reader is not None
        answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        size = int(answer.split(b"content-length:")[1].split(b"\r\n")[0])
        data = await self._reader.readexactly(size)
        if b" 200 " not in answer.split(b"\r\n")[0]:
            raise ConnectionError(f"{operation}: {answer.splitlines()[0]!r} {data[:80]!r}")
        return data

    def close(self) -> None:
        """Hang up."""
        if self._writer is not None:
            self._writer.close()


async def idle_device(
    port: int, tls: ssl.SSLContext, player: Player, stage: Stage, begins: float, ends: float
) -> None:
    """One device from its joining to its leaving; what it meets after ``begins`` counts."""
    connection = Connection(port, tls, player)
    try:
        await asyncio.sleep(random.random() * (begins - time.monotonic()))
        activate = ActivateNodeRequest(public_key=player.pem, heartbeat_interval=HEARTBEAT_S)
        data = await connection.post("activate-node", activate.SerializeToString())
        node = Node(node_id=ActivateNodeResponse.FromString(data).node_id)
        beating = asyncio.create_task(beat(port, tls, player, node, stage, begins))
        poll = PullMessagesRequest(node=node).SerializeToString()
        while time.monotonic() < ends and not beating.done():
            await connection.post("pull-messages", poll)
            stage.polls += time.monotonic() >= begins
            await asyncio.sleep(POLL_S)
        beating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await beating
        leave = DeactivateNodeRequest(node_id=node.node_id)
        await connection.post("deactivate-node", leave.SerializeToString())
    except (OSError, asyncio.IncompleteReadError, ssl.SSLError) as error:
        stage.failures += 1
        if stage.failures == 1:
            print(f"    first failure: {error!r}", file=sys.stderr)
    finally:
        connection.close()


async def beat(
    port: int, tls: ssl.SSLContext, player: Player, node: Node, stage: Stage, begins: float
) -> None:
    """Heartbeats, each over a connection of its own: httpx keeps an idle one for 5 s."""
    body = SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_S).SerializeToString()
    await asyncio.sleep(random.random() * HEARTBEAT_S)
    while True:
        connection, began = Connection(port, tls, player), time.monotonic()
        try:
            await connection.post("send-node-heartbeat", body)
        finally:
            connection.close()
        if began >= begins:
            stage.beats_s.append(time.monotonic() - began)
        await asyncio.sleep(HEARTBEAT_S)


async def play(
    port: int, ca: Path, players: Sequence[Player], ramp_s: float, hold_s: float
) -> Stage:
    """All devices join within ``ramp_s`` and idle for ``hold_s``."""
    stage, tls = Stage(), ssl.create_default_context(cafile=ca)
    begins = time.monotonic() + ramp_s
    await asyncio.gather(
        *(idle_device(port, tls, p, stage, begins, begins + hold_s) for p in players)
    )
    return stage


def enrol(config: CoordinatorConfig, count: int) -> list[Player]:
    """Devices that coordinator and SuperLink know; no round asks them anything."""
    directory, link = open_directory(config.registry), ControlLink(config)
    directory.set_paused(True)  # idle is what is measured
    players = []
    now_ms = time.time_ns() // 10**6
    for number in range(count):
        key = ec.generate_private_key(ec.SECP384R1())
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        signing = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
        device = Device(secrets.token_hex(16), f"user{number}", "played", signing, pem, now_ms)
        code = secrets.token_bytes(32)
        invite = Invite(code, device.user, now_ms + 600_000, secrets.token_bytes(32))
        directory.add_invite(invite)
        token = Token(secrets.token_bytes(32), "device", device.device_id, now_ms + 10**9)
        directory.enrol(invite, device, token, now_ms)
        link.register(device.device_id, pem)
        players.append(Player(device.device_id, key, pem))
    directory.close()
    link.close()
    return players


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[CoordinatorConfig]:
    """A coordinator, all parts up."""
    ports = free_ports(3)
    setting = Setting(
        hosts=("127.0.0.1",), bind="127.0.0.1",
        grpc_port=ports[0], fleet_port=ports[1], superlink_port=ports[2],
    )  # fmt: skip
    config = set_up(folder, setting, datetime.now(UTC))
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from fedia3.cli import main; main()",
             "coordinator", "serve", "--config", str(config.file)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        while not (parts := read_statuses(config.parts_file)) or any(
            part.state != "running" for part in parts
        ):
            if process.poll() is not None:
                sys.exit((folder / "serve.log").read_text())
            time.sleep(0.2)
        yield config
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def measure(
    config: CoordinatorConfig, door: str, players: Sequence[Player], args: argparse.Namespace
) -> bool:
    """One stage's line; whether the door kept up."""
    ports = {
        "superlink": config.coordinator.superlink_port,
        "proxy": config.coordinator.fleet_port,
    }
    before, began = cpu_s(config.parts_file), time.monotonic()
    ramp_s = max(args.ramp, len(players) / 40)
    stage = asyncio.run(play(ports[door], config.ca, players, ramp_s, args.hold))
    took = time.monotonic() - began
    after = cpu_s(config.parts_file)
    busy = "  ".join(
        f"{name} {(after[name] - before.get(name, 0)) / took:4.0%}"
        for name in ("superlink", "proxy")
        if name in after
    )
    kept_up = stage.failures == 0 and stage.p(0.95) <= args.limit
    print(
        f"  {door:<10} {len(players):>6} devices  {stage.polls / args.hold:7.1f} polls/s  "
        f"heartbeat p50 {stage.p(0.5) * 1000:7.1f} ms  p95 {stage.p(0.95) * 1000:8.1f} ms  {busy}  "
        f"{stage.failures} failed  {'holds' if kept_up else 'does not hold'}",
        flush=True,
    )
    return kept_up


def main() -> None:
    """Print each stage, then each door's largest that held, over the repeats."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[100, 200, 400, 800, 1600, 3200])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ramp", type=float, default=10.0, help="s in which the devices join")
    parser.add_argument("--hold", type=float, default=30.0, help="s that count")
    parser.add_argument("--limit", type=float, default=1.0, help="s for 95 %% of heartbeats")
    args = parser.parse_args()
    os.environ.setdefault("FEDIA3_HOME", tempfile.mkdtemp())
    held: dict[str, list[int]] = {"superlink": [], "proxy": []}
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "coordinator") as config:
        players = enrol(config, max(args.devices))
        for repeat in range(args.repeats):
            print(f"repeat {repeat + 1}")
            for door, largest in held.items():
                best = 0
                for count in args.devices:
                    if not measure(config, door, players[:count], args):
                        break
                    best = count
                largest.append(best)
    for door, largest in held.items():
        print(f"{door}: {statistics.median(largest):.0f} devices held ({min(largest)} to "
              f"{max(largest)})")  # fmt: skip


if __name__ == "__main__":
    main()
