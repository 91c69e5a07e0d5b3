"""New coordinators for tests, each on ports of its own; empty databases on a PostgreSQL server."""

import os
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.pool import NullPool

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


def execute(url: URL, *statements: str) -> None:
    """Run statements one by one, each in a transaction of its own."""
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


@pytest.fixture(scope="session")
def postgres_database() -> Iterator[URL]:
    """A database that orders text as a language does, unless a column says otherwise."""
    given = os.environ.get("FEDIA3_TEST_POSTGRES_URL")
    if not given:
        pytest.skip("FEDIA3_TEST_POSTGRES_URL names no PostgreSQL server to test on")
    server, name = make_url(given), f"fedia3_test_{secrets.token_hex(8)}"
    execute(
        server,
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' "
        "LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C.UTF-8'",
    )
    yield server.set(database=name)
    execute(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_url(postgres_database: URL) -> Iterator[str]:
    """A schema of that database with nothing in it."""
    name = f"test_{secrets.token_hex(8)}"
    execute(postgres_database, f"CREATE SCHEMA {name}")
    url = postgres_database.update_query_dict({"options": f"-c search_path={name}"})
    yield url.render_as_string(hide_password=False)
    execute(postgres_database, f"DROP SCHEMA {name} CASCADE")
