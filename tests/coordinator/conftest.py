"""New coordinators for tests, each on ports of its own."""

import socket
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedia3.coordinator.config import CoordinatorConfig
from fedia3.coordinator.setup import Setting, set_up

NewCoordinator = Callable[[Path], CoordinatorConfig]


@pytest.fixture(scope="session")
def new_coordinator() -> NewCoordinator:
    """Sets a coordinator up in a folder, on this machine and free ports."""

    def make(folder: Path) -> CoordinatorConfig:
        setting = Setting(["localhost"], "tiny", "127.0.0.1", *free_ports(3))
        return set_up(folder, setting, datetime.now(UTC))

    return make


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in taken]
