"""The services on the wire: one grpc.aio server with TLS, health and reflection."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from fedia3.adapters.base_store import BaseStore
from fedia3.clock import wall_ms
from fedia3.coordinator.access import Access, Limits
from fedia3.coordinator.directory import Directory
from fedia3.coordinator.last_seen import LastSeen
from fedia3.coordinator.manifests import Manifests
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.services.adapters import AdaptersService
from fedia3.coordinator.services.admin import AdminService, Supervision
from fedia3.coordinator.services.base_models import BaseModelsService
from fedia3.coordinator.services.calls import Clock, Handlers, Signer
from fedia3.coordinator.services.enrolment import (
    EnrolmentService,
    Federation,
    NodeRegistrar,
    register_everyone,
)
from fedia3.coordinator.services.places import Places
from fedia3.coordinator.services.rpcs import Rpcs
from fedia3.errors import BadSetting, Fedia3Error
from fedia3.proto.contract import SERVER_OPTIONS

log = logging.getLogger(__name__)

GRACE_S = 10.0  # how long calls under way may take once the service stops
MAX_CALLS = 512  # under way at once
FLUSH_S = 10.0  # between two notes of who was heard of
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # before Flower is told of the devices again


@dataclass(frozen=True)
class ServiceSettings:
    """Where the services listen, what they show, and what they vouch for."""

    base: Path  # the folder of the base model that rounds train
    fleet_address: str  # host:port of the Flower fleet
    certificate: bytes  # PEM, the chain of this server
    private_key: bytes  # PEM
    ca: bytes  # PEM, handed to new devices
    signing_key: Ed25519PrivateKey  # of manifests and records
    host: str = "127.0.0.1"
    port: int = 0  # 0 takes a free one
    limits: Limits = field(default_factory=Limits)


class Service:
    """The four services, health and reflection on one port.

    Args:
        settings: where and as whom.
        registry: adapters and rounds.
        directory: devices, tokens, the operator's word.
        registrar: tells Flower of devices.
        bases: base models beside the trained one.
        supervision: reads what supervisor and scheduler last wrote down.
        now_ms: this machine's clock.

    Raises:
        NotFound: ``settings.base`` holds no base model.
        BadInput: its manifest is malformed.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        registry: Registry,
        directory: Directory,
        registrar: NodeRegistrar,
        bases: BaseStore | None = None,
        supervision: Callable[[], Supervision] = Supervision,
        now_ms: Clock = wall_ms,
    ) -> None:
        self._settings, self._directory, self._registrar = settings, directory, registrar
        self._last_seen = LastSeen(directory, now_ms)
        self.handlers = _handlers(
            settings, registry, directory, registrar, bases or BaseStore(), supervision, now_ms
        )
        access = Access(directory, settings.limits, now_ms, time.monotonic)
        self._rpcs = Rpcs(self.handlers, access, self._last_seen, now_ms)
        self.places = Places()
        self._health = HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._chores: list[asyncio.Task[None]] = []

    async def start(self) -> int:
        """Listen; the port.

        Raises:
            BadSetting: the address is taken, or the certificate and its key do not fit.
        """
        self._server = grpc.aio.server(
            interceptors=[self.places], options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS
        )
        by_service = self._rpcs.by_service()
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(name, rpcs) for name, rpcs in by_service.items()]
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflected = [*by_service, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(reflected, self._server)
        port = self._bind(self._server)
        for name in by_service:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        self._chores = [
            asyncio.create_task(self._note_last_seen()),
            asyncio.create_task(self._tell_flower()),
        ]
        return port

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Say NOT_SERVING, take no new calls, let those under way end for ``grace_s``."""
        await self._health.enter_graceful_shutdown()
        for chore in self._chores:
            chore.cancel()
        if self._server is not None:
            await self._server.stop(grace_s)
        await asyncio.to_thread(self._last_seen.flush)
        self._rpcs.close()

    def _bind(self, server: grpc.aio.Server) -> int:
        settings = self._settings
        address = f"{settings.host}:{settings.port}"
        pair = (settings.private_key, settings.certificate)
        try:
            return server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except RuntimeError as error:
            raise BadSetting(
                f"cannot listen on {address}; choose a free port, and a certificate with its key"
            ) from error

    async def _note_last_seen(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await asyncio.to_thread(self._last_seen.flush)
            except Fedia3Error as error:
                log.warning("who was heard of is not written down: %s", error)

    async def _tell_flower(self) -> None:
        """Flower's database may be new, or have missed who was let in; telling again is free."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                told = await asyncio.to_thread(register_everyone, self._directory, self._registrar)
            except Fedia3Error as error:
                log.warning("Flower is told of the devices in %.0f s: %s", pause_s, error)
                await asyncio.sleep(pause_s)
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
            else:
                log.info("Flower knows the %d enrolled devices", told)
                return


def _handlers(
    settings: ServiceSettings,
    registry: Registry,
    directory: Directory,
    registrar: NodeRegistrar,
    bases: BaseStore,
    supervision: Callable[[], Supervision],
    now_ms: Clock,
) -> Handlers:
    manifests, signer = Manifests(settings.base, bases), Signer(settings.signing_key)
    digest = manifests.trained.manifest.digest
    federation = Federation(settings.ca, (signer.public_key,), settings.fleet_address, digest)
    return {
        **EnrolmentService(
            directory, registrar, federation, settings.limits, now_ms, time.monotonic
        ).handlers,
        **BaseModelsService(manifests, signer).handlers,
        **AdaptersService(registry, manifests, signer).handlers,
        **AdminService(registry, directory, registrar, supervision, digest, now_ms).handlers,
    }
