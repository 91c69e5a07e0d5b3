"""New coordinators for tests, each on ports of its own."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedia3.coordinator.config import CoordinatorConfig
from fedia3.coordinator.setup import Setting, set_up
from fedia3.processes import free_ports

NewCoordinator = Callable[[Path], CoordinatorConfig]


@pytest.fixture(scope="session")
def new_coordinator() -> NewCoordinator:
    """Sets a coordinator up in a folder, on this machine and free ports."""

    def make(folder: Path) -> CoordinatorConfig:
        setting = Setting(["localhost"], "tiny", "127.0.0.1", *free_ports(3))
        return set_up(folder, setting, datetime.now(UTC))

    return make
