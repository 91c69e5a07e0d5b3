"""``fedia3 coordinator serve``: every part of a coordinator under one supervisor.

The supervisor itself holds no state that matters and serves nobody: it keeps the parts running and
decides when rounds run. A kill of any part, of all of them or of the supervisor loses no round and
no version that somebody was told of; the next start goes on from the database.
"""

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial

from fedia3.adapters.base_store import BaseStore
from fedia3.clock import SetBack
from fedia3.coordinator.answers import proxy_answers, service_answers, superlink_answers
from fedia3.coordinator.campaign import noted_process
from fedia3.coordinator.certificates import ends_at
from fedia3.coordinator.config import CoordinatorConfig
from fedia3.coordinator.directory import Directory, open_directory
from fedia3.coordinator.parts import until_told
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.schedule import Scheduler
from fedia3.coordinator.setup import renew_certificate, serving_alone
from fedia3.coordinator.superlink import (
    ControlLink,
    flower_environment,
    forget_queue,
    superexec_command,
    superlink_command,
)
from fedia3.errors import Conflict, Fedia3Error
from fedia3.processes import Backoff, Part, Supervisor
from fedia3.proto.app import thin_app

DRAIN_S = 10.0  # for what is under way when the coordinator stops
READY_S = 60.0  # until something is said of a part that does not come up
RENEWED_EVERY_S = 12 * 3600.0
BACKOFF = Backoff(first_s=0.5, longest_s=15.0, healthy_s=30.0)
CLOCK_EVERY_S = 1.0
SET_BACK_S = 20.0  # a node's word holds for 60 s; what is less passes by itself
HUNG_S = 60.0  # a part that does not answer for so long is killed and started again
SHOWS_CERTIFICATE = ("superlink", "proxy", "service")

logger = logging.getLogger("fedia3.serve")


def serve(config: CoordinatorConfig) -> None:
    """Run the coordinator until SIGTERM or Ctrl-C.

    Raises:
        Conflict: a coordinator is being served from this folder, or a port is taken.
        NotFound: the base model or a key is not there.
    """
    os.umask(0o077)  # Flower's queue holds devices' replies
    os.environ.update(flower_environment(config))
    BaseStore().find(config.coordinator.base)
    with serving_alone(config.folder):
        asyncio.run(until_told(lambda until: _serve(config, until)))


def parts_of(config: CoordinatorConfig) -> tuple[Part, ...]:
    """The parts in the order in which they are started."""
    flower = flower_environment(config)

    def flower_part(name: str, command: tuple[str, ...], **options: object) -> Part:
        log = config.logs / f"{name}.log"
        return Part(name, command, log, flower, backoff=BACKOFF, **options)  # type: ignore[arg-type]

    # it waits long for open connections, and loses nothing when it is killed: it has a database
    watched = {"ready": partial(superlink_answers, config), "hung_s": HUNG_S, "grace_s": 2.0}
    return (
        flower_part("superlink", superlink_command(config), **watched),
        flower_part("superexec", superexec_command(config)),  # the scheduler sees whether it works
        _own_part(config, "proxy", partial(proxy_answers, config)),
        _own_part(config, "service", partial(service_answers, config)),
    )


def _own_part(config: CoordinatorConfig, name: str, ready: Callable[[], Awaitable[bool]]) -> Part:
    command = (sys.executable, "-m", "fedia3.coordinator.parts", name, "--config", str(config.file))
    log = config.logs / f"{name}.log"
    return Part(name, command, log, ready=ready, hung_s=HUNG_S, backoff=BACKOFF)


async def _serve(config: CoordinatorConfig, until: asyncio.Event) -> None:
    config.drain_file.unlink(missing_ok=True)
    # an older database is migrated once, not by each part
    Registry.open(config.registry, config.database).close()
    _renewed(config)
    supervisor = Supervisor(parts_of(config), config.parts_file, logger)
    supervisor.end_leftovers()
    _require_free_ports(config)
    logger.info("starting the coordinator in %s", config.folder)
    await supervisor.start()
    chores = [
        asyncio.create_task(_schedule(config, supervisor, until)),
        asyncio.create_task(_say_when_up(config, supervisor)),
        asyncio.create_task(_renew(config, supervisor)),
        asyncio.create_task(_watch_clock(config, supervisor)),
    ]
    stopped = asyncio.create_task(until.wait())
    await asyncio.wait([stopped, chores[0]], return_when=asyncio.FIRST_COMPLETED)
    for chore in chores[1:]:
        chore.cancel()
    await _stop(config, supervisor)
    until.set()
    await chores[0]


async def _stop(config: CoordinatorConfig, supervisor: Supervisor) -> None:
    """Take no new calls, let calls and the open round end, then stop the parts."""
    logger.info("stopping: what is under way may take %g s", DRAIN_S)
    config.drain_file.touch()
    await asyncio.gather(supervisor.stop_part("service", DRAIN_S + 2.0), _round_is_over(config))
    await supervisor.stop(DRAIN_S)
    config.drain_file.unlink(missing_ok=True)
    logger.info("stopped")


async def _round_is_over(config: CoordinatorConfig) -> None:
    """Back when no round is open, or after the time that one may take."""
    with contextlib.closing(open_directory(config.registry, config.database)) as directory:
        for _ in range(round(DRAIN_S / 0.2)):
            if not await asyncio.to_thread(_has_open_round, directory):
                return
            await asyncio.sleep(0.2)
    logger.warning("the round under way is given up; it will be run again")


def _has_open_round(directory: Directory) -> bool:
    opened = directory.round_control().open_round
    return opened is not None and opened.until_ms > datetime.now(UTC).timestamp() * 1000


async def _schedule(
    config: CoordinatorConfig, supervisor: Supervisor, until: asyncio.Event
) -> None:
    loop = asyncio.get_running_loop()

    def never_started() -> None:  # in the scheduler's thread
        loop.call_soon_threadsafe(supervisor.kill_part, "superexec", "it started no run in time")

    with (
        Registry.open(config.registry, config.database) as registry,
        contextlib.closing(open_directory(config.registry, config.database)) as directory,
        contextlib.closing(ControlLink(config)) as link,
    ):
        process = lambda: noted_process(config)  # noqa: E731  # read at every look
        app = await asyncio.to_thread(thin_app)
        scheduler = Scheduler(
            config, app, link, registry, directory, process, log=logger, never_started=never_started
        )
        await scheduler.run(until)


async def _say_when_up(config: CoordinatorConfig, supervisor: Supervisor) -> None:
    if await supervisor.wait_ready(READY_S):
        logger.info("all parts are up; devices reach %s", config.address)
        return
    missing = [s.name for s in supervisor.statuses() if s.state != "running"]
    logger.warning("not up after %g s: %s; see %s", READY_S, ", ".join(missing), config.logs)


async def _renew(config: CoordinatorConfig, supervisor: Supervisor) -> None:
    """Renew the certificate when it is due, and have the parts that show it read it again."""
    while True:
        await asyncio.sleep(RENEWED_EVERY_S)
        if _renewed(config):
            for name in SHOWS_CERTIFICATE:
                await supervisor.stop_part(name)
                supervisor.start_part(name)


async def _watch_clock(config: CoordinatorConfig, supervisor: Supervisor) -> None:
    """Give the SuperLink an empty queue when this machine's clock was set back.

    It notes until when each device is online. With that far in the future, it would take no device
    for a new start until then.
    """
    clock = SetBack()
    while True:
        await asyncio.sleep(CLOCK_EVERY_S)
        if (back_s := clock.by_s()) > SET_BACK_S:
            logger.warning(
                "this machine's clock was set back by %.0f s: the SuperLink begins anew", back_s
            )
            await supervisor.stop_part("superlink", 2.0)
            forget_queue(config)
            supervisor.start_part("superlink")


def _renewed(config: CoordinatorConfig) -> bool:
    """Whether the certificate was due and could be renewed; one that still holds goes on."""
    try:
        is_new = renew_certificate(config, datetime.now(UTC))
    except Fedia3Error as error:
        logger.warning("%s; it still holds until %s", error, _ends(config))
        return False
    if is_new:
        logger.info("the servers' certificate was due: the new one ends %s", _ends(config))
    return is_new


def _ends(config: CoordinatorConfig) -> str:
    return f"{ends_at(config.certificate.read_bytes()):%Y-%m-%d}"


def _require_free_ports(config: CoordinatorConfig) -> None:
    """Say at once which port is taken: a part would only die of it again and again.

    Raises:
        Conflict: one of the ports is.
    """
    wanted = {
        "grpc_port": (config.coordinator.bind, config.coordinator.grpc_port),
        "fleet_port": (config.coordinator.bind, config.coordinator.fleet_port),
        "superlink_port": ("127.0.0.1", config.coordinator.superlink_port),
    }
    for name, (host, port) in wanted.items():
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            raise Conflict(
                f"cannot listen on {host}:{port} ({error.strerror}); stop what does, or choose "
                f"another {name} in {config.file}"
            ) from error
