"""A base model's way to a device: how fast, and what cut connections cost.

    python benchmarks/base_download.py [--megabytes 100] [--repeats 7] [--cuts 100] [--json FILE]

Speed: each repeat sends the same random bytes over loopback once by every contender, in turn, so
that a noisy machine slows all alike. The rival is plain TCP, 1 MiB at a time from memory, with and
without TLS; once its receiver drops what comes, once it does a download's work: sha256 of every
MiB, written to a file, fsync. Senders run in a process of their own.

Cuts: as many downloads as ``--cuts``, each over a connection that is reset once at a random byte.
Sent again is what crossed the proxy beyond a download that nobody cut.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import platform
import random
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import grpc

from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.manifest import Manifest, read_manifest, verify
from fedia3.client.base_download import BaseDownload
from fedia3.proto import caller as calling
from fedia3.proto.base_models_pb2 import FilePiece, ReadFileRequest
from fedia3.proto.caller import Caller

MIB = 1 << 20
MODEL = "model.safetensors"


@dataclass(frozen=True)
class Sender:
    """The other process: where its servers listen, and its ear for commands."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]
    folder: Path

    @property
    def manifest(self) -> Manifest:
        """Of the base that it hands out."""
        return read_manifest(self.folder / "base")

    def ask(self, *words: object) -> str:
        """A command's answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def caller(self, where: str) -> Caller:
        """To the service: ``tls``, ``plain`` or through the ``proxy``."""
        address, ca = self.facts[where], (self.folder / "ca.pem").read_bytes()
        made = Caller(address, ca=ca, token=self.facts["token"])
        if where == "plain":
            made._channel.close()
            made._channel = grpc.insecure_channel(address, options=calling._OPTIONS)
        return made


@contextlib.contextmanager
def sender(folder: Path, size: int) -> Iterator[Sender]:
    """The other process, ended behind the block."""
    command = [sys.executable, __file__, "--serve", str(folder), "--bytes", str(size)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Sender(process, json.loads(process.stdout.readline()), folder)
    finally:
        process.terminate()
        process.wait()


def download(via: Caller, home: Path, manifest: Manifest) -> Path:
    """All that a device does; the base's folder."""
    store = BaseStore(home, shipped=home / "none")
    return BaseDownload(via, store, jitter=lambda: 0.1).fetch(manifest).path


def stream_only(via: Caller, manifest: Manifest) -> None:
    """The bytes over gRPC, dropped."""
    request = ReadFileRequest(digest=manifest.digest, path=MODEL)
    for _ in via.stream("BaseModels/ReadFile", request, FilePiece):
        pass


def raw(there: Sender, where: str, to: Path | None) -> None:
    """The bytes over plain TCP: dropped, or checked and written as a download does."""
    connection = socket.create_connection(("127.0.0.1", there.facts[where]))
    if where == "raw_tls":
        context = ssl.create_default_context(cafile=str(there.folder / "ca.pem"))
        connection = context.wrap_socket(connection, server_hostname="localhost")
    with connection, contextlib.ExitStack() as stack:
        file = stack.enter_context(to.open("wb", buffering=0)) if to else None
        for piece in _pieces(connection):
            if file is not None:
                hashlib.sha256(piece).hexdigest()
                file.write(piece)
        if file is not None:
            os.fsync(file.fileno())


def _pieces(connection: socket.socket) -> Iterator[memoryview]:
    """What comes, a MiB at a time."""
    buffer = bytearray(MIB)
    whole, filled = memoryview(buffer), 0
    while count := connection.recv_into(whole[filled:]):
        filled += count
        if filled == MIB:
            yield whole
            filled = 0
    yield whole[:filled]


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def speeds(there: Sender, work: Path, size: int, repeats: int) -> dict[str, list[float]]:
    """MB/s of every contender, repeat by repeat; a first one warms up and does not count."""
    found: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        for name, run in _contenders(there, work / f"{repeat}").items():
            seconds = timed(run)
            if repeat:
                found.setdefault(name, []).append(size / 1e6 / seconds)
        shutil.rmtree(work / f"{repeat}")
    return found


def _contenders(there: Sender, work: Path) -> dict[str, Callable[[], object]]:
    work.mkdir()
    manifest = there.manifest
    contenders: dict[str, Callable[[], object]] = {}
    for tls, wire in (("TLS", "tls"), ("no TLS", "plain")):
        socket_name = f"raw_{wire}"
        contenders |= {
            f"raw TCP, {tls}, dropped": lambda name=socket_name: raw(there, name, None),
            f"raw TCP, {tls}, checked and kept": lambda name=socket_name: raw(
                there, name, work / name
            ),
            f"fedia3's stream, {tls}, dropped": lambda wire=wire: _with_caller(
                there, wire, lambda via: stream_only(via, manifest)
            ),
            f"fedia3's download, {tls}": lambda wire=wire: _with_caller(
                there, wire, lambda via: download(via, work / wire, manifest)
            ),
        }
    return contenders


def _with_caller(there: Sender, where: str, work: Callable[[Caller], object]) -> None:
    with there.caller(where) as via:
        work(via)


def cut_downloads(there: Sender, work: Path, size: int, cuts: int, seed: int) -> dict[str, Any]:
    """So many downloads, each cut once: how many are right, what was sent again."""
    whole, draw = _crossed(there, work, None), random.Random(seed)
    right, again, connections = 0, [], int(there.ask("connections"))
    for _ in range(cuts):
        try:
            crossed = _crossed(there, work, draw.randrange(size))
            right += 1
        except Exception as error:
            logging.warning("a download failed: %s", error)
            continue
        again.append((crossed - whole) / size)
    return {
        "downloads": cuts,
        "right": right,
        "connections": int(there.ask("connections")) - connections,
        "sent_again_mean": statistics.mean(again),
        "sent_again_most": max(again),
    }


def _crossed(there: Sender, work: Path, cut_at: int | None) -> int:
    """Bytes that went to the device for one whole download, checked in the end."""
    before = int(there.ask("count"))
    there.ask("cut", *(() if cut_at is None else (cut_at,)))
    with there.caller("proxy") as via:
        verify(download(via, work / "cut", there.manifest), there.manifest)
    shutil.rmtree(work / "cut")
    return int(there.ask("count")) - before


def two_at_once(there: Sender, work: Path) -> dict[str, Any]:
    """Two processes that want the same base in the same home."""
    before, home = int(there.ask("count")), work / "shared"
    command = [
        sys.executable, __file__, "--fetch", str(home), "--folder", str(there.folder),
        "--address", there.facts["proxy"], "--token", there.facts["token"],
    ]  # fmt: skip
    processes = [subprocess.Popen(command) for _ in range(2)]
    succeeded = [process.wait() == 0 for process in processes]
    verify(home / "bases" / there.manifest.digest, there.manifest)
    crossed = int(there.ask("count")) - before
    shutil.rmtree(home)
    return {"right": sum(succeeded), "crossed": crossed / there.manifest.size}


def serve(folder: Path, size: int) -> None:
    """The other process: the service, the raw rivals and the proxy, until its ear closes."""
    from fedia3 import testing_service  # noqa: PLC0415  # the receiving side needs none of it
    from fedia3.coordinator.services.server import Service  # noqa: PLC0415  # as above
    from fedia3.testing import CuttingProxy  # noqa: PLC0415  # as above

    logging.disable(logging.CRITICAL)  # a connection that is cut is no news here

    class Plain(Service):
        def _bind(self, server: Any) -> int:
            return int(server.add_insecure_port("127.0.0.1:0"))

    base = testing_service.paper_base(folder / "base", size=size)
    with contextlib.ExitStack() as stack:
        run = testing_service.running_service
        secure = stack.enter_context(run(folder, base=base))
        testing_service.Service = Plain  # type: ignore[misc]
        plain = stack.enter_context(run(folder, base=base))
        proxy = stack.enter_context(CuttingProxy(secure.address))
        (folder / "ca.pem").write_bytes(secure.ca)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*_pair(secure.settings, folder))
        data = (base / MODEL).read_bytes()
        facts = {
            "tls": secure.address,
            "plain": f"127.0.0.1:{plain.port}",
            "proxy": proxy.address.replace("127.0.0.1", "localhost"),
            "raw_plain": _raw_sender(data, None),
            "raw_tls": _raw_sender(data, context),
            "token": secure.service_token(),
        }
        print(json.dumps(facts), flush=True)
        for line in sys.stdin:
            word, *numbers = line.split()
            if word == "cut":
                proxy.cut_after(*map(int, numbers))
            print(proxy.connections if word == "connections" else proxy.to_client.count, flush=True)


def _pair(settings: Any, folder: Path) -> tuple[Path, Path]:
    chain, key = folder / "chain.pem", folder / "chain.key"
    chain.write_bytes(settings.certificate)
    key.write_bytes(settings.private_key)
    return chain, key


def _raw_sender(data: bytes, context: ssl.SSLContext | None) -> int:
    """Sends the bytes to whoever connects, a MiB at a time; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            peer, _ = listener.accept()
            with context.wrap_socket(peer, server_side=True) if context else peer as end:
                for start in range(0, len(data), MIB):
                    end.sendall(memoryview(data)[start : start + MIB])
                if isinstance(end, ssl.SSLSocket):
                    with contextlib.suppress(OSError):
                        end.unwrap()

    Thread(target=run, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def told(found: dict[str, list[float]]) -> str:
    """A table; ratios are taken repeat by repeat."""
    rows = ["| contender | MB/s, median (least to most) | of raw TCP dropped | of raw TCP kept |"]
    rows.append("|---|---|---|---|")
    for name, values in found.items():
        wire = "no TLS" if "no TLS" in name else "TLS"
        shares = [
            _share(values, found[f"raw TCP, {wire}, {end}"])
            for end in ("dropped", "checked and kept")
        ]
        spread = f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"
        rows.append(f"| {name} | {spread} | {shares[0]:.0%} | {shares[1]:.0%} |")
    return "\n".join(rows)


def _share(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    """Time, cut, tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    for hidden in ("--serve", "--fetch", "--folder", "--address", "--token", "--bytes"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(Path(given.serve), int(given.bytes))
    elif given.fetch:
        folder = Path(given.folder)
        with Caller(given.address, ca=(folder / "ca.pem").read_bytes(), token=given.token) as via:
            download(via, Path(given.fetch), read_manifest(folder / "base"))
    else:
        measure(given)


def measure(given: argparse.Namespace) -> None:
    """All of it, printed and, with ``--json``, written."""
    size = given.megabytes * 10**6
    with tempfile.TemporaryDirectory() as work, sender(Path(work) / "there", size) as there:
        found = speeds(there, Path(work), size, given.repeats) if given.repeats else {}
        cut = cut_downloads(there, Path(work), size, given.cuts, given.seed)
        both = two_at_once(there, Path(work))
    print(f"{given.megabytes} MB, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"grpcio {grpc.__version__}, {given.repeats} repeats\n")  # fmt: skip
    print(told(found) if found else "")
    print(f"\n{cut['downloads']} downloads, each cut once: {cut['right']} right, "
          f"{cut['connections']} connections; sent again {cut['sent_again_mean']:.2%} of the base "
          f"on average, {cut['sent_again_most']:.2%} at most")  # fmt: skip
    print(f"two at once: {both['right']} right; the base crossed {both['crossed']:.3f} times")
    if given.json:
        given.json.write_text(json.dumps({"speeds": found, "cut": cut, "both": both}, indent=1))


if __name__ == "__main__":
    main()
