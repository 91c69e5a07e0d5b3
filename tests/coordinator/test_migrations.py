"""The database's schema: made by migrations alone, kept by triggers, moved without losing rows."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import NullPool

from fedia3.coordinator.migrations import VERSION_TABLE, alembic_config, current_revision, migrate
from fedia3.coordinator.records import AdapterDraft, Contribution, Owner, RoundCommit
from fedia3.coordinator.stores.engine import Table
from fedia3.coordinator.stores.sql import SqlStore
from fedia3.coordinator.stores.sql_directory import SqlDirectory
from fedia3.errors import BadInput, BadSetting, Conflict, Corrupt

NOON = datetime(2030, 1, 2, 12, 0, tzinfo=UTC)
ZERO = "0" * 64
FIRST_SCHEMAS_ROWS = (
    f"INSERT INTO adapter VALUES (1, 'global', '', '{ZERO}', 2)",
    "INSERT INTO adapter_version VALUES "
    f"(1, 1, 'adapter', '{ZERO}', '{ZERO}', 0, 0, '{{}}', NULL, NULL, 0, NULL)",
    "INSERT INTO round VALUES (0, 1, 1, '{}', 0)",
    "INSERT INTO contribution VALUES (0, 0, 'anna', 'accepted', '', 0, NULL, '{}')",
    "INSERT INTO server_state VALUES (0, x'7374617465')",  # state
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the database will be."""
    return tmp_path / "registry.db"


def round_zero() -> RoundCommit:
    """A round with one contribution: a row for every table."""
    draft = AdapterDraft(
        owner=Owner.everyone(),
        form="adapter",
        digest=ZERO,
        schema_digest=ZERO,
        base=ZERO,
        round_num=0,
        num_examples=0,
    )
    return RoundCommit(0, b"state", draft, (Contribution("anna", "accepted"),))


@contextmanager
def connected(path: Path) -> Iterator[Connection]:
    """A transaction with none of the store's settings."""
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    with engine.begin() as connection:
        yield connection


def opened_with_a_round(path: Path) -> SqlStore:
    """A store that has committed round 0."""
    store = SqlStore.at(path)
    store.commit_round(round_zero(), NOON)
    return store


def test_the_migrations_build_what_the_models_say(path: Path) -> None:
    """
    A database made by the migrations differs in nothing from the declared tables.
    """
    SqlStore.at(path).close()
    with connected(path) as connection:
        options = {"version_table": VERSION_TABLE, "compare_server_default": True}
        found = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(found, Table.metadata) == []


def test_the_version_table_is_our_own(path: Path) -> None:
    """
    Alembic's default table is left to others who share the database.
    """
    SqlStore.at(path).close()
    with closing(sqlite3.connect(path)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    assert VERSION_TABLE in tables
    assert "alembic_version" not in tables


def test_the_migrations_have_one_head(path: Path) -> None:
    """
    Two heads would leave it open which schema is the newest.
    """
    with connected(path) as connection:
        assert ScriptDirectory.from_config(alembic_config(connection)).get_heads() == ["0004"]


def test_down_and_up_again_ends_at_the_same_schema(path: Path) -> None:
    """
    Downgrading removes every table and trigger, upgrading brings all of them back.
    """
    everything = "SELECT type, name, sql FROM sqlite_master ORDER BY type, name"
    with connected(path) as connection:
        migrate(connection)
        before = connection.exec_driver_sql(everything).all()
        command.downgrade(alembic_config(connection), "base")
        left = {row.tbl_name for row in connection.exec_driver_sql("SELECT * FROM sqlite_master")}
        migrate(connection)
        after = connection.exec_driver_sql(everything).all()
    assert left == {VERSION_TABLE}
    assert after == before


def test_a_registry_of_the_first_schema_keeps_its_rows(path: Path) -> None:
    """
    A database that the first fedia3 filled is opened by this one: its round is there, and devices
    may enrol.
    """
    with connected(path) as connection:
        command.upgrade(alembic_config(connection), "0001")
        for statement in FIRST_SCHEMAS_ROWS:
            connection.exec_driver_sql(statement)
    store = SqlStore.at(path)
    assert store.server_state() == b"state"
    assert [c.client for c in store.rounds()[0].contributions] == ["anna"]
    assert SqlDirectory.at(path).enrolled() == ()
    assert list(store.faults()) == []  # the migration sealed what was there


def test_going_back_to_the_first_schema_keeps_the_registry(path: Path) -> None:
    """
    Downgrading one step drops the directory's tables and no row of the registry's.
    """
    opened_with_a_round(path).close()
    with connected(path) as connection:
        command.downgrade(alembic_config(connection), "0001")
        assert connection.exec_driver_sql("SELECT count(*) FROM round").scalar() == 1
        names = connection.exec_driver_sql("SELECT name FROM sqlite_master").scalars().all()
    assert not {"device", "token", "invite", "nonce", "round_control"} & set(names)


def test_opening_again_keeps_the_rows(path: Path) -> None:
    """
    A database at the newest schema is opened as it is.
    """
    opened_with_a_round(path).close()
    assert SqlStore.at(path).server_state() == b"state"


def test_a_newer_schema_is_refused(path: Path) -> None:
    """
    A database from a later fedia3 is left alone, and the error says to update.
    """
    opened_with_a_round(path).close()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(BadInput, match=r"schema 9999.*update fedia3"):
        SqlStore.at(path)
    with connected(path) as connection:
        assert current_revision(connection) == "9999"


def test_rows_that_refer_to_nothing_stop_the_opening(path: Path) -> None:
    """
    With foreign keys off a row can lose what it refers to; opening finds it.
    """
    opened_with_a_round(path).close()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM round")
    with pytest.raises(Corrupt, match="refer to nothing"):
        SqlStore.at(path)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE adapter_version SET digest = 'other'",
        "UPDATE round SET version = 2",
        "UPDATE contribution SET verdict = 'rejected'",
    ],
)
def test_what_is_recorded_never_changes(path: Path, statement: str) -> None:
    """
    Versions, rounds and contributions refuse every update, whoever asks.
    """
    opened_with_a_round(path).close()
    with (
        closing(sqlite3.connect(path)) as database,
        pytest.raises(sqlite3.IntegrityError, match="rows never change"),
    ):
        database.execute(statement)


def test_a_commit_that_fails_at_its_last_step_leaves_nothing(path: Path) -> None:
    """
    When writing the server state fails, version, round and contributions are gone as well.
    """
    store = SqlStore.at(path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "CREATE TRIGGER stop BEFORE INSERT ON server_state "
            "BEGIN SELECT RAISE(ABORT, 'stop'); END"
        )
    with pytest.raises(Conflict, match="stop"):
        store.commit_round(round_zero(), NOON)
    with closing(sqlite3.connect(path)) as database:
        tables = ("adapter", "adapter_version", "round", "contribution", "server_state")
        counts = [database.execute(f"SELECT count(*) FROM {t}").fetchone() for t in tables]
    assert counts == [(0,)] * 5


def test_a_commit_is_flushed_before_it_is_acknowledged(path: Path) -> None:
    """
    Writers run with a write-ahead log, full flushes and foreign keys; readers cannot write.
    """
    store = SqlStore.at(path)
    settings = ("journal_mode", "synchronous", "foreign_keys", "query_only")
    database = store._database
    with database.writing() as writer, database.reading() as reader:
        written = [writer.exec_driver_sql(f"PRAGMA {s}").scalar() for s in settings]
        assert written == ["wal", 2, 1, 0]  # 2 = FULL
        assert reader.exec_driver_sql("PRAGMA query_only").scalar() == 1


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    """
    Somebody's notes under the registry's name are not touched.
    """
    path.write_text("dear diary, " * 100)
    with pytest.raises(BadInput, match="expected a registry"):
        SqlStore.at(path)
    assert path.read_text().startswith("dear diary")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """
    The database is not created in a folder that does not exist.
    """
    with pytest.raises(BadSetting, match="choose a folder"):
        SqlStore.at(tmp_path / "nowhere" / "registry.db")


@pytest.mark.parametrize("url", ["postgresql://host/name", "sqlite://"])
def test_a_database_that_is_not_an_sqlite_file_is_refused(url: str) -> None:
    """
    Neither a server nor a database in memory is taken by this store.
    """
    with pytest.raises(BadSetting, match="SQLite file"):
        SqlStore(url)
