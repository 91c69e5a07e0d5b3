"""Whether a coordinator's parts do their work: each is asked what only its own code can answer.

An open port proves nothing: the system takes connections for a process that hangs. Any of these may
raise ``OSError`` where the authority's file cannot be read.
"""

import ssl

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedia3.coordinator.config import CoordinatorConfig

WITHIN_S = 5.0


async def superlink_answers(config: CoordinatorConfig) -> bool:
    """Flower's own word on its health."""
    return await _status_of(config, f"{config.superlink_address}/health") == httpx.codes.OK


async def proxy_answers(config: CoordinatorConfig) -> bool:
    """The fleet's door has nothing for who does not ask as a node does, and says so."""
    address = config.local_address(config.coordinator.fleet_port)
    return await _status_of(config, f"{address}/") == httpx.codes.NOT_FOUND


async def service_answers(config: CoordinatorConfig) -> bool:
    """The service's own word on its health, or that it has too much to do to give it."""
    credentials = grpc.ssl_channel_credentials(config.ca.read_bytes())
    address = config.local_address(config.coordinator.grpc_port)
    options = (("grpc.ssl_target_name_override", "localhost"),)  # whatever it listens on
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=WITHIN_S)
        except grpc.aio.AioRpcError as error:
            return bool(error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _status_of(config: CoordinatorConfig, place: str) -> int | None:
    trusted = ssl.create_default_context(cafile=config.ca)
    trusted.check_hostname = False  # whatever it listens on
    try:
        async with httpx.AsyncClient(verify=trusted, trust_env=False, timeout=WITHIN_S) as client:
            return (await client.get(f"https://{place}")).status_code
    except httpx.HTTPError:
        return None
