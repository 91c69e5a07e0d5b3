"""The database's schema: made by migrations alone, kept by triggers, moved without losing rows."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from itertools import count
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, insert, inspect
from sqlalchemy.exc import IntegrityError
from sqlalchemy.pool import NullPool

from fedia3.coordinator.migrations import VERSION_TABLE, alembic_config, current_revision, migrate
from fedia3.coordinator.records import AdapterDraft, AliasMove, Contribution, Owner, RoundCommit
from fedia3.coordinator.stores.engine import Table
from fedia3.coordinator.stores.sql import AdapterRow, SqlStore, VersionRow
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


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{path}"
    return str(request.getfixturevalue("postgres_url"))


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
    """A transaction on a file with none of the store's settings."""
    with connected_to(f"sqlite:///{path}") as connection:
        yield connection


@contextmanager
def connected_to(url: str) -> Iterator[Connection]:
    """A transaction with none of the store's settings."""
    with create_engine(url, poolclass=NullPool).begin() as connection:
        yield connection


def opened_with_a_round(path: Path) -> SqlStore:
    """A store that has committed round 0."""
    store = SqlStore.at(path)
    store.commit_round(round_zero(), NOON)
    return store


def test_the_migrations_build_what_the_models_say(url: str) -> None:
    """
    A database made by the migrations differs in nothing from the declared tables.
    """
    SqlStore(url).close()
    with connected_to(url) as connection:
        options = {"version_table": VERSION_TABLE, "compare_server_default": True}
        found = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(found, Table.metadata) == []


def test_names_are_ordered_by_code_point_on_every_server(postgres_url: str) -> None:
    """
    PostgreSQL's column of owners' names has the collation "C", and so has the model's.
    """
    SqlStore(postgres_url).close()
    with connected_to(postgres_url) as connection:
        (name,) = [
            c for c in inspect(connection).get_columns("adapter") if c["name"] == "owner_name"
        ]
        declared = AdapterRow.__table__.c.owner_name.type.dialect_impl(connection.dialect)
    assert name["type"].collation == declared.collation == "C"


def test_the_version_table_is_our_own(url: str) -> None:
    """
    Alembic's default table is left to others who share the database.
    """
    SqlStore(url).close()
    with connected_to(url) as connection:
        tables = inspect(connection).get_table_names()
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


def test_down_and_up_again_ends_at_the_same_schema_on_a_server(postgres_url: str) -> None:
    """
    Downgrading removes tables, triggers and their function, upgrading brings all of them back.
    """
    everything = """
        SELECT relname, relkind::text FROM pg_class
            WHERE relnamespace = current_schema()::regnamespace
        UNION SELECT proname, 'function' FROM pg_proc
            WHERE pronamespace = current_schema()::regnamespace
        UNION SELECT tgrelid::regclass || ' ' || tgname, 'trigger' FROM pg_trigger
            JOIN pg_class ON pg_class.oid = tgrelid
            WHERE NOT tgisinternal AND relnamespace = current_schema()::regnamespace
    """
    with connected_to(postgres_url) as connection:
        migrate(connection)
        before = {*connection.exec_driver_sql(everything)}
        command.downgrade(alembic_config(connection), "base")
        left = {name for name, _kind in connection.exec_driver_sql(everything)}
        migrate(connection)
        after = {*connection.exec_driver_sql(everything)}
    assert left == {VERSION_TABLE, f"{VERSION_TABLE}_pkc"}
    assert after == before
    assert {name for name, kind in before if kind == "trigger"} >= {
        "adapter_version adapter_version_immutable",
        "contribution contribution_immutable",
        "round round_immutable",
    }


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
    assert store.revision(Owner.everyone(), ZERO) == 1  # one version was published
    assert SqlDirectory.at(path).enrolled() == ()
    assert list(store.faults()) == []  # the migration sealed what was there


def test_going_back_to_the_first_schema_keeps_the_registry(url: str) -> None:
    """
    Downgrading one step drops the directory's tables and no row of the registry's.
    """
    with closing(SqlStore(url)) as store:
        store.commit_round(round_zero(), NOON)
    with connected_to(url) as connection:
        command.downgrade(alembic_config(connection), "0001")
        assert connection.exec_driver_sql("SELECT count(*) FROM round").scalar() == 1
        names = inspect(connection).get_table_names()
    assert not {"device", "token", "invite", "nonce", "round_control"} & set(names)


def test_opening_again_keeps_the_rows(path: Path) -> None:
    """
    A database at the newest schema is opened as it is.
    """
    opened_with_a_round(path).close()
    assert SqlStore.at(path).server_state() == b"state"


def test_a_newer_schema_is_refused(url: str) -> None:
    """
    A database from a later fedia3 is left alone, and the error says to update.
    """
    SqlStore(url).close()
    with connected_to(url) as connection:
        connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(BadInput, match=r"schema 9999.*update fedia3"):
        SqlStore(url)
    with connected_to(url) as connection:
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
        "UPDATE alias_event SET version = NULL",
    ],
)
def test_what_is_recorded_never_changes(url: str, statement: str) -> None:
    """
    Versions, rounds, contributions and aliases' moves refuse every update, whoever asks.
    """
    move = AliasMove(owner=Owner.everyone(), base=ZERO, name="stable", version=1)
    with closing(SqlStore(url)) as store:
        store.commit_round(round_zero(), NOON)
        store.move_alias(move, NOON)
    with (
        pytest.raises(IntegrityError, match="rows never change"),
        connected_to(url) as connection,
    ):
        connection.exec_driver_sql(statement)


STOP = {
    "sqlite": (
        "CREATE TRIGGER stop BEFORE INSERT ON server_state BEGIN SELECT RAISE(ABORT, 'stop'); END",
    ),
    "postgresql": (
        "CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION 'stop' USING ERRCODE = 'integrity_constraint_violation'; END $$",
        "CREATE TRIGGER stop BEFORE INSERT ON server_state FOR EACH ROW EXECUTE FUNCTION stop()",
    ),
}


def test_a_commit_that_fails_at_its_last_step_leaves_nothing(url: str) -> None:
    """
    When writing the server state fails, version, round and contributions are gone as well.
    """
    with closing(SqlStore(url)) as store:
        with connected_to(url) as connection:
            for statement in STOP[connection.dialect.name]:
                connection.exec_driver_sql(statement)
        with pytest.raises(Conflict, match="stop"):
            store.commit_round(round_zero(), NOON)
    tables = ("adapter", "adapter_version", "round", "contribution", "server_state")
    with connected_to(url) as connection:
        counts = [connection.exec_driver_sql(f"SELECT count(*) FROM {t}").scalar() for t in tables]
    assert counts == [0] * 5


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


@pytest.mark.parametrize("url", ["mysql://host/name", "sqlite://", "postgresql://host"])
def test_a_database_that_is_neither_file_nor_server_is_refused(url: str) -> None:
    """
    Another kind of server, a database in memory and a server without a database are not taken.
    """
    with pytest.raises(BadSetting, match="SQLite file or in PostgreSQL"):
        SqlStore(url)


def test_a_database_that_is_opened_by_many_is_made_once(url: str) -> None:
    """
    Eight parts open a new database at once: one makes the tables, all of them find them.
    """
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _part: SqlStore(url), range(8)))
    for store in stores:
        assert store.rounds() == ()
        store.close()


MIGRATE_AND_STOP = """
import sys
from sqlalchemy import Engine, event
from fedia3.coordinator.stores.sql import AdapterRow, SqlStore, VersionRow

changes = 0

@event.listens_for(Engine, "after_cursor_execute")
def stop(connection, cursor, statement, *rest):
    global changes
    changes += statement.split()[0] in ("CREATE", "ALTER", "INSERT", "UPDATE", "DROP")
    if changes == int(sys.argv[2]):
        print("stopped", flush=True)
        sys.stdin.read()  # until the kill

SqlStore(sys.argv[1])
print("through", flush=True)
sys.stdin.read()
"""


def killed_while_migrating(url: str, changes: int) -> str:
    """Open the database in a process that is killed behind so many changes; how far it came."""
    with subprocess.Popen(
        [sys.executable, "-c", MIGRATE_AND_STOP, url, str(changes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        process.kill()
    return said


@pytest.mark.slow
def test_a_migration_that_is_killed_is_done_by_the_next_start(url: str) -> None:
    """
    A database of the schema before the newest is opened by processes that are killed behind one
    change, two, and so on until one comes through: each leaves rows and schema as they were, and
    the next start brings them up to date.
    """
    with closing(SqlStore(url)) as store:
        store.commit_round(round_zero(), NOON)
    with connected_to(url) as connection:
        newest = current_revision(connection)
        command.downgrade(alembic_config(connection), "-1")
        before = current_revision(connection), content(connection)
    for changes in count(1):
        if killed_while_migrating(url, changes) == "through":
            break
        with connected_to(url) as connection:
            assert (current_revision(connection), content(connection)) == before
    assert changes > 1
    with closing(SqlStore(url)) as store:
        assert store.server_state() == b"state"
    with connected_to(url) as connection:
        assert current_revision(connection) == newest
        assert (
            compare_metadata(
                MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}),
                Table.metadata,
            )
            == []
        )


@pytest.mark.slow
@pytest.mark.parametrize("changes", [1, 6, 12])
def test_a_first_start_that_is_killed_is_done_by_the_next(url: str, changes: int) -> None:
    """
    Killed behind the first table, in the middle, and where the directory's tables are made: the
    next start finds nothing, and makes all.
    """
    assert killed_while_migrating(url, changes) == "stopped"
    with connected_to(url) as connection:
        assert inspect(connection).get_table_names() == []
    with closing(SqlStore(url)) as store:
        assert store.rounds() == ()


@pytest.mark.slow
def test_a_large_registry_keeps_every_row_down_and_up(url: str) -> None:
    """
    100,000 versions of 1,000 users, half of them with keys, and a round: what the schema before
    the newest holds of them is the same, byte for byte, after a downgrade and the way back.
    """
    with closing(SqlStore(url)) as store:
        store.commit_round(round_zero(), NOON)
    with connected_to(url) as connection:
        connection.execute(insert(AdapterRow), [line(user) for user in range(1000)])
        for user in range(1000):
            connection.execute(insert(VersionRow), [version(user, n) for n in range(1, 101)])
    with connected_to(url) as connection:
        newest, columns = current_revision(connection), columns_of(connection)
        command.downgrade(alembic_config(connection), "-1")
        kept = columns_of(connection)
        down = content(connection, kept)
    SqlStore(url).close()
    with connected_to(url) as connection:
        assert current_revision(connection) == newest
        assert columns_of(connection) == columns
        assert content(connection, kept) == down
        assert (
            connection.exec_driver_sql("SELECT count(*) FROM adapter_version").scalar() == 100_001
        )
    with closing(SqlStore(url)) as store:
        assert store.find(Owner.user("user 7"), ZERO).digest == version(7, 100)["digest"]


def line(user: int) -> dict[str, object]:
    """A user's line of versions on one base."""
    return {
        "id": 1000 + user,
        "owner_kind": "user",
        "owner_name": f"user {user}",
        "base": ZERO,
        "next_version": 101,
    }


def version(user: int, number: int) -> dict[str, object]:
    """One of a user's versions; its bytes are nobody else's."""
    return {
        "adapter_id": 1000 + user,
        "version": number,
        "form": "personal",
        "digest": f"{1000 * user + number:064x}",
        "schema_digest": ZERO,
        "round_num": number,
        "num_examples": user,
        "metrics": '{"loss":0.5}',
        "parent": None,
        "global_digest": ZERO,
        "created_ms": 1_900_000_000_000 + number,
        "idem_key": f"key {number}" if number % 2 else None,
    }


Columns = dict[str, list[str]]


def columns_of(connection: Connection) -> Columns:
    """The tables' columns, but for Alembic's own."""
    found = inspect(connection)
    names = sorted(set(found.get_table_names()) - {VERSION_TABLE})
    return {name: sorted(c["name"] for c in found.get_columns(name)) for name in names}


def content(connection: Connection, columns: Columns | None = None) -> str:
    """A digest of every row, in these columns or in all there are."""
    digest = sha256()
    for table, names in (columns or columns_of(connection)).items():
        rows = connection.exec_driver_sql(f"SELECT {', '.join(names)} FROM {table}")
        for row in sorted(repr(tuple(row)) for row in rows):
            digest.update(f"{table} {row}\n".encode())
    return digest.hexdigest()
