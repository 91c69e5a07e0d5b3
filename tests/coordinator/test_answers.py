"""What the supervisor asks each part, and what it makes of silence."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedia3.coordinator.answers import proxy_answers, service_answers, superlink_answers
from fedia3.coordinator.certificates import make_authority, make_server_certificate
from fedia3.coordinator.config import CoordinatorConfig, ServiceConfig
from fedia3.proto.fleet import LetThrough
from fedia3.proto.relay import Relay, RelayServer, Upstream
from fedia3.testing_service import running_service

Asked = Callable[[CoordinatorConfig], Awaitable[bool]]


def config_of(folder: Path, ca: bytes, **ports: int) -> CoordinatorConfig:
    """A coordinator on this machine alone, whose parts listen on these ports."""
    folder.mkdir(exist_ok=True)
    (folder / "ca.pem").write_bytes(ca)
    return CoordinatorConfig(
        folder, replace(ServiceConfig(("example.org",), "tiny", bind="127.0.0.1"), **ports)
    )


def test_the_service_answers_by_its_health(tmp_path: Path) -> None:
    """
    Also where its certificate is for other names than the address it listens on.
    """
    with running_service(tmp_path / "service", in_memory=True) as running:
        config = config_of(tmp_path / "config", running.ca, grpc_port=running.port)
        assert asyncio.run(service_answers(config))
    assert not asyncio.run(service_answers(config))


def test_the_door_answers_that_there_is_nothing(tmp_path: Path) -> None:
    """
    404 for what is no fleet call, from the relay's own code.
    """
    authority = make_authority(datetime.now(UTC))
    issued = make_server_certificate(authority, ["example.org"], datetime.now(UTC))
    chain, key = tmp_path / "chain.pem", tmp_path / "chain.key"
    chain.write_bytes(issued.certificate)
    key.write_bytes(issued.key)

    async def asked() -> bool:
        relay = Relay(Upstream("127.0.0.1:1", authority.certificate.decode()), LetThrough())
        server = RelayServer(relay, host="127.0.0.1", port=0, certificate=chain, private_key=key)
        await server.start()
        config = config_of(tmp_path / "config", authority.certificate, fleet_port=server.port)
        try:
            return await proxy_answers(config)
        finally:
            await server.stop()

    assert asyncio.run(asked())


@pytest.mark.parametrize(
    ("ask", "port"),
    [
        (superlink_answers, "superlink_port"),
        (proxy_answers, "fleet_port"),
        (service_answers, "grpc_port"),
    ],
)
def test_an_open_port_is_no_answer(
    tmp_path: Path, ask: Asked, port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A process that hangs has connections still, and nothing comes over them.
    """
    monkeypatch.setattr("fedia3.coordinator.answers.WITHIN_S", 0.2)
    authority = make_authority(datetime.now(UTC))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = {port: silent.getsockname()[1]}
        assert not asyncio.run(ask(config_of(tmp_path, authority.certificate, **ports)))


@pytest.mark.parametrize("ask", [superlink_answers, proxy_answers, service_answers])
def test_without_the_authoritys_certificate_nobody_is_asked(tmp_path: Path, ask: Asked) -> None:
    """
    The supervisor takes it for silence.
    """
    config = CoordinatorConfig(tmp_path, ServiceConfig(("example.org",), "tiny"))
    with pytest.raises(OSError, match="No such file"):
        asyncio.run(ask(config))
