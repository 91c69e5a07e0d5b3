"""The coordinator's own child processes: ``python -m fedia3.coordinator.parts service|proxy``.

Each runs until it is told to stop (SIGTERM) and then finishes what is under way. The supervisor in
``serve.py`` starts them and brings them back when they die.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.manifest import read_manifest
from fedia3.coordinator.config import CoordinatorConfig, read_config
from fedia3.coordinator.directory import open_directory
from fedia3.coordinator.operator import PartState
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.schedule import read_waiting
from fedia3.coordinator.services.admin import Supervision
from fedia3.coordinator.setup import read_signing_key
from fedia3.coordinator.superlink import ControlLink, flower_environment
from fedia3.errors import Fedia3Error
from fedia3.processes import read_statuses

logger = logging.getLogger(__name__)


async def run_service(config: CoordinatorConfig, until: asyncio.Event) -> None:
    """Serve ``fedia3.v1`` until the event is set; then drain.

    Raises:
        BadSetting: the port is taken, or the certificate cannot be used.
    """
    from fedia3.coordinator.services.server import (  # noqa: PLC0415  # the proxy needs no gRPC
        Service,
        ServiceSettings,
    )

    base = BaseStore().find(config.coordinator.base)
    settings = ServiceSettings(
        base=base,
        fleet_address=config.fleet_address,
        certificate=config.certificate.read_bytes(),
        private_key=config.certificate_key.read_bytes(),
        ca=config.ca.read_bytes(),
        signing_key=read_signing_key(config.signing_key),
        host=config.coordinator.bind,
        port=config.coordinator.grpc_port,
    )
    with (
        Registry.open(config.registry, config.database) as registry,
        contextlib.closing(open_directory(config.registry, config.database)) as directory,
        contextlib.closing(ControlLink(config)) as link,
    ):
        service = Service(
            settings, registry, directory, link, supervision=lambda: supervision(config)
        )
        port = await service.start()
        logger.info("serving %s on port %d", read_manifest(base).name, port)
        await until.wait()
        await service.stop()


async def run_proxy(config: CoordinatorConfig, until: asyncio.Event) -> None:
    """Keep the fleet's door until the event is set; then finish the calls under way.

    Raises:
        Conflict: the port is taken.
        BadSetting: the certificate cannot be used.
    """
    from fedia3.coordinator.fleet_proxy import Doorkeeper  # noqa: PLC0415  # nor the service HTTP
    from fedia3.proto.app import thin_app  # noqa: PLC0415  # as above
    from fedia3.proto.relay import Relay, RelayServer, Upstream  # noqa: PLC0415  # as above

    with contextlib.closing(open_directory(config.registry, config.database)) as directory:
        keeper = Doorkeeper(directory, thin_app().digest)
        upstream = Upstream(config.superlink_address, config.ca.read_text())
        server = RelayServer(
            Relay(upstream, keeper),
            host=config.coordinator.bind,
            port=config.coordinator.fleet_port,
            certificate=config.certificate,
            private_key=config.certificate_key,
        )
        await server.start()
        logger.info("the fleet's door is open on port %d", server.port)
        chores = [asyncio.create_task(keeper.note_seen())]
        chores.append(asyncio.create_task(keeper.watch_rounds()))
        await until.wait()
        for chore in chores:
            chore.cancel()
        keeper.let_everybody_go()
        await server.stop()
        await upstream.close()


PARTS: dict[str, Callable[[CoordinatorConfig, asyncio.Event], Coroutine[Any, Any, None]]] = {
    "service": run_service,
    "proxy": run_proxy,
}


def supervision(config: CoordinatorConfig) -> Supervision:
    """What the supervisor and the scheduler last wrote down."""
    parts = tuple(
        PartState(s.name, s.state, s.pid, s.restarts, s.last_exit)
        for s in read_statuses(config.parts_file)
    )
    return Supervision(parts, read_waiting(config.schedule_file))


async def until_told(work: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run ``work`` with an event that SIGTERM and SIGINT set."""
    until = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, until.set)
    await work(until)


def log_to_stderr(name: str) -> None:
    """Lines of time, part and message; libraries speak only when something is wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainLines(name))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "uvicorn", "alembic", "flwr", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class PlainLines(logging.Formatter):
    """``2026-11-25 10:00:00 serve: superlink is up after 1.9 s``."""

    def __init__(self, name: str) -> None:
        super().__init__("%(asctime)s %(part)s: %(message)s", "%Y-%m-%d %H:%M:%S")
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        """With the part's name, and the level where something is wrong."""
        is_bad = record.levelno >= logging.WARNING
        record.part = f"{self._name} {record.levelname.lower()}" if is_bad else self._name
        return super().format(record)


def main(argv: list[str] | None = None) -> int:
    """Run one part; its exit status."""
    parser = argparse.ArgumentParser(prog="fedia3.coordinator.parts")
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--config", type=Path, required=True)
    options = parser.parse_args(argv)
    log_to_stderr(options.part)
    try:
        config = read_config(options.config)
        os.environ.update(flower_environment(config))
        _allow_many_connections()
        _run(until_told(lambda until: PARTS[options.part](config, until)))
    except Fedia3Error as error:
        logger.error("%s", error)
        return error.exit_code
    return 0


def _allow_many_connections() -> None:
    """Every device online keeps one or two open; the usual soft limit is 1024 files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _run(work: Coroutine[Any, Any, None]) -> None:
    """On uvloop where it is installed, else on asyncio's own loop."""
    try:
        import uvloop  # noqa: PLC0415  # where it is installed
    except ImportError:
        asyncio.run(work)
    else:
        uvloop.run(work)


if __name__ == "__main__":
    sys.exit(main())
