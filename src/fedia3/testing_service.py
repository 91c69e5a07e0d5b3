"""A coordinator's services for tests, ours and yours: the real server, on loopback, with TLS."""

import asyncio
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.manifest import (
    MANIFEST_FILE,
    Manifest,
    Origin,
    manifest_of,
    read_manifest,
    write_manifest,
)
from fedia3.adapters.schema import Target
from fedia3.clock import wall_ms
from fedia3.coordinator.access import Limits
from fedia3.coordinator.certificates import Issued, make_authority, make_server_certificate
from fedia3.coordinator.directory import Device, Directory, Invite, Token, open_directory
from fedia3.coordinator.rates import Rate
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.services.admin import Supervision
from fedia3.coordinator.services.enrolment import device_id_of
from fedia3.coordinator.services.server import Service, ServiceSettings
from fedia3.coordinator.stores.memory_directory import MemoryDirectory
from fedia3.coordinator.tokens import DAY_MS, INVITE_MS, code_sha256, new_code, new_token
from fedia3.coordinator.tokens import token_sha256 as sha256_of
from fedia3.errors import BadToken, Unreachable

FLEET_ADDRESS = "localhost:8444"
LONG_MS = 365 * DAY_MS

_NEVER = Rate(per_s=1e6, burst=1_000_000)
NO_LIMITS = Limits(_NEVER, _NEVER, _NEVER, _NEVER, _NEVER, _NEVER)  # more calls than a test makes


class MemoryRegistrar:
    """Flower's list of nodes as a dictionary: the honest twin of what the SuperLink is told.

    While ``is_down`` it answers nobody, as a SuperLink that was killed does.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, bytes] = {}  # keys by device id
        self.is_down = False

    def register(self, device_id: str, node_key: bytes) -> None:
        """See :meth:`fedia3.coordinator.services.enrolment.NodeRegistrar.register`."""
        self._require_up()
        if node_key not in self.nodes.values():
            self.nodes[device_id] = node_key

    def unregister(self, device_id: str) -> None:
        """See :meth:`fedia3.coordinator.services.enrolment.NodeRegistrar.unregister`."""
        self._require_up()
        self.nodes.pop(device_id, None)

    def _require_up(self) -> None:
        if self.is_down:
            raise Unreachable("the SuperLink does not answer", 1.0)


@dataclass(frozen=True)
class EnrolledDevice:
    """A device once it has enrolled, with everything it calls with."""

    device_id: str
    user: str
    token: str
    signing_key: Ed25519PrivateKey


@dataclass(frozen=True)
class RunningService:
    """A server that listens, and what stands behind it."""

    port: int
    settings: ServiceSettings
    service: Service
    registry: Registry
    directory: Directory
    registrar: MemoryRegistrar
    operator_token: str
    operator_key: Ed25519PrivateKey
    manifest: Manifest  # of the base model that rounds train
    now_ms: Callable[[], int]

    @property
    def address(self) -> str:
        """host:port."""
        return f"localhost:{self.port}"

    @property
    def ca(self) -> bytes:
        """PEM of the authority that signed the server's certificate."""
        return self.settings.ca

    @property
    def coordinator_key(self) -> bytes:
        """What signs manifests and records, Ed25519, raw."""
        return self.settings.signing_key.public_key().public_bytes_raw()

    def invite(self, user: str) -> str:
        """A code with which a device of this user may enrol, made without a call."""
        code, expires_ms = new_code(), self.now_ms() + INVITE_MS
        self.directory.add_invite(Invite(code_sha256(code), user, expires_ms, os.urandom(32)))
        return code

    def enrol(self, user: str, name: str = "phone") -> EnrolledDevice:
        """A new device of this user, let in without a call."""
        key, node_key, text = Ed25519PrivateKey.generate(), node_pem(), new_token("device")
        public, now_ms = key.public_key().public_bytes_raw(), self.now_ms()
        device = Device(device_id_of(public, node_key), user, name, public, node_key, now_ms)
        invite = Invite(os.urandom(32), user, now_ms + INVITE_MS, os.urandom(32))
        token = Token(sha256_of(text), "device", device.device_id, now_ms + LONG_MS)
        self.directory.add_invite(invite)
        self.directory.enrol(invite, device, token, now_ms)
        self.registrar.register(device.device_id, node_key)
        return EnrolledDevice(device.device_id, user, text, key)

    def service_token(self, name: str = "web") -> str:
        """A token that reads everybody's adapters."""
        text, expires_ms = new_token("service"), self.now_ms() + LONG_MS
        self.directory.add_token(Token(sha256_of(text), "service", name, expires_ms))
        return text


@contextmanager
def running_service(
    folder: Path,
    *,
    base: Path | None = None,
    port: int = 0,
    in_memory: bool = False,
    supervision: Callable[[], Supervision] = Supervision,
    now_ms: Callable[[], int] = wall_ms,
    grace_s: float = 1.0,
    **settings: Any,
) -> Iterator[RunningService]:
    """The services on 127.0.0.1 for as long as the block lasts, with an authority of their own.

    Run again on the same folder it is the same coordinator: registry, authority and keys lie there;
    with ``in_memory`` registry and directory are forgotten.

    Args:
        folder: where everything lies.
        base: the base model that rounds train; :func:`paper_base` where none is given.
        port: 0 takes a free one.
        in_memory: registry and directory without files, which is faster.
        supervision: what supervisor and scheduler wrote down.
        now_ms: the coordinator's clock.
        grace_s: how long calls under way have when the block ends.
        settings: fields of ``ServiceSettings``, such as ``limits``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = base or _paper_base_in(folder)
    given = replace(_settings(folder, base), port=port, **settings)
    operator_token, operator_key = _kept_operator(folder)
    with ExitStack() as stack:
        registry = Registry.in_memory() if in_memory else Registry.open(folder / "registry")
        directory = MemoryDirectory() if in_memory else open_directory(folder / "registry")
        stack.enter_context(registry)
        stack.enter_context(closing(directory))
        _let_operator_in(directory, operator_token, operator_key, now_ms())
        registrar = MemoryRegistrar()
        service = Service(
            given, registry, directory, registrar, BaseStore(folder), supervision, now_ms
        )
        yield RunningService(
            port=stack.enter_context(_listening(service, grace_s)),
            settings=given,
            service=service,
            registry=registry,
            directory=directory,
            registrar=registrar,
            operator_token=operator_token,
            operator_key=operator_key,
            manifest=read_manifest(base),
            now_ms=now_ms,
        )


def paper_base(folder: Path, *, size: int = 3_000_000, name: str = "paper", seed: int = 0) -> Path:
    """A base model on paper: it is handed out and adapters fit it, but it cannot be run.

    Its one large file has ``size`` random bytes, its adapters have five scales. Loads no torch.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "model.safetensors").write_bytes(random.Random(seed).randbytes(size))
    targets = (Target("layers.0.k_proj", "k", 2), Target("layers.0.down_proj", "ff", 3))
    origin = Origin(architecture="PaperForCausalLM")
    write_manifest(folder, manifest_of(folder, name=name, created_from=origin, targets=targets))
    return folder


def node_pem(key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    """A node's public key as Flower writes it; a new node's where no key is given."""
    public = (key or ec.generate_private_key(ec.SECP384R1())).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _paper_base_in(folder: Path) -> Path:
    base = folder / "paper"
    return base if (base / MANIFEST_FILE).exists() else paper_base(base)


def _settings(folder: Path, base: Path) -> ServiceSettings:
    authority = _kept_authority(folder)
    server = make_server_certificate(authority, ["localhost"], datetime.now(UTC))
    return ServiceSettings(
        base=base,
        fleet_address=FLEET_ADDRESS,
        certificate=server.certificate,
        private_key=server.key,
        ca=authority.certificate,
        signing_key=_kept_key(folder / "signing.key"),
    )


def _kept_authority(folder: Path) -> Issued:
    certificate, key = folder / "ca.pem", folder / "ca.key"
    if not certificate.exists():
        made = make_authority(datetime.now(UTC))
        key.write_bytes(made.key)
        certificate.write_bytes(made.certificate)
    return Issued(certificate.read_bytes(), key.read_bytes())


def _kept_key(path: Path) -> Ed25519PrivateKey:
    if not path.exists():
        path.write_bytes(Ed25519PrivateKey.generate().private_bytes_raw())
    return Ed25519PrivateKey.from_private_bytes(path.read_bytes())


def _kept_operator(folder: Path) -> tuple[str, Ed25519PrivateKey]:
    token = folder / "operator.token"
    if not token.exists():
        token.write_text(new_token("admin"))
    return token.read_text(), _kept_key(folder / "operator.key")


def _let_operator_in(directory: Directory, token: str, key: Ed25519PrivateKey, now_ms: int) -> None:
    sha256, public = sha256_of(token), key.public_key().public_bytes_raw()
    try:
        directory.principal(sha256, now_ms)
    except BadToken:
        directory.add_token(Token(sha256, "admin", "operator", now_ms + LONG_MS, public))


@contextmanager
def _listening(service: Service, grace_s: float) -> Iterator[int]:
    """The service on an event loop in a thread of its own; its port."""
    loop, port = asyncio.new_event_loop(), Future[int]()
    over = asyncio.Event()

    async def serve() -> None:
        try:
            port.set_result(await service.start())
        except BaseException as error:
            port.set_exception(error)
            return
        await over.wait()
        await service.stop(grace_s)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    try:
        yield port.result()
    finally:
        if not port.exception():
            loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()
