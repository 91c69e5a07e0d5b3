"""PostgreSQL under the stores: who waits for whom, what its errors become, what is never told."""

import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import URL, Connection, create_engine, make_url
from sqlalchemy.pool import NullPool

from fedia3.coordinator.records import AdapterDraft, Owner
from fedia3.coordinator.stores.engine import Database, retried
from fedia3.coordinator.stores.postgres import GaveWay, Postgres
from fedia3.coordinator.stores.sql import SqlStore
from fedia3.errors import BadInput, BadSetting, Conflict, StorageFailed

pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")

NOON = datetime(2030, 1, 2, 12, 0, tzinfo=UTC)
BASE = "b" * 64
ANNA, BOB = Owner.user("anna"), Owner.user("bob")


def draft(owner: Owner, number: int = 1) -> AdapterDraft:
    """A personal version with the bytes of its number."""
    return AdapterDraft(
        owner=owner,
        form="personal",
        digest=f"{number:064x}",
        schema_digest="a" * 64,
        base=BASE,
        round_num=0,
        num_examples=7,
        global_digest="c" * 64,
    )


@pytest.fixture
def store(postgres_url: str) -> Iterator[SqlStore]:
    """An empty store."""
    with closing(SqlStore(postgres_url)) as store:
        yield store


def execute(url: URL, statement: str) -> None:
    """Run a statement that no transaction may hold."""
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)


@contextmanager
def outside(url: str) -> Iterator[Connection]:
    """A transaction of somebody who knows nothing of our locks."""
    with create_engine(url, poolclass=NullPool).begin() as connection:
        yield connection


def changed(url: str, **parts: object) -> str:
    """The URL with other parts."""
    return make_url(url).set(**parts).render_as_string(hide_password=False)  # type: ignore[arg-type]


def with_options(url: str, options: str) -> str:
    """The URL with one more setting for its sessions."""
    before = make_url(url).query["options"]
    return changed(url, query={"options": f"{before} {options}"})


def test_two_users_publish_at_the_same_time(store: SqlStore, postgres_url: str) -> None:
    """
    While one of anna's publishes is not through, bob's is, and a second of anna's is not.
    """
    with ThreadPoolExecutor(1) as pool, store._database.writing(str(ANNA)):
        assert store.publish(draft(BOB), NOON).version == 1
        waiting = pool.submit(store.publish, draft(ANNA), NOON)
        wait_until_somebody_waits(postgres_url)
        assert store.publish(draft(BOB), NOON).version == 2
        assert not waiting.done()
        assert store.versions(ANNA, BASE) == ()
    assert waiting.result().version == 1


def test_who_says_nothing_writes_alone(store: SqlStore) -> None:
    """
    A transaction that is about everything keeps everybody's publishes waiting.
    """
    with ThreadPoolExecutor(1) as pool, store._database.writing():
        waiting = pool.submit(store.publish, draft(BOB), NOON)
        assert store.versions(BOB, BASE) == ()
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
    assert waiting.result().version == 1


def test_a_lock_that_is_kept_is_a_conflict(postgres_url: str) -> None:
    """
    Waiting ends; the message says that somebody kept a lock, and the next try succeeds.
    """
    impatient = SqlStore(with_options(postgres_url, "-c lock_timeout=50ms"))
    with closing(impatient), closing(Database(postgres_url)) as database:
        with database.writing(), pytest.raises(Conflict, match="kept a lock for too long"):
            impatient.publish(draft(ANNA), NOON)
        assert impatient.publish(draft(ANNA), NOON).version == 1


def test_a_call_that_gave_way_is_run_again(store: SqlStore, postgres_url: str) -> None:
    """
    Somebody holds anna's line and asks for her lock, which publish holds while it waits for the
    line: the server gives publish up, and its second run succeeds.
    """
    store.publish(draft(ANNA), NOON)
    asked = threading.Event()

    def publish() -> int:
        asked.wait()
        return store.publish(draft(ANNA, 2), NOON).version

    patient = with_options(postgres_url, "-c deadlock_timeout=1h")  # the server finds publish first
    with ThreadPoolExecutor(1) as pool:
        with outside(patient) as stranger:
            stranger.exec_driver_sql("UPDATE adapter SET next_version = next_version")
            publishing = pool.submit(publish)
            asked.set()
            wait_until_somebody_waits(postgres_url)
            server = Postgres(make_url(postgres_url))
            server.take_turn(stranger, str(ANNA))
        assert publishing.result() == 2


def wait_until_somebody_waits(url: str) -> None:
    """Back once a session of this database waits for a row or a lock."""
    waits = (
        "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) "
        "WHERE NOT granted AND datname = current_database()"
    )
    for _ in range(1000):
        with outside(url) as connection:
            if connection.exec_driver_sql(waits).scalar():
                return
        threading.Event().wait(0.01)
    raise AssertionError("nobody waits")


def test_who_gives_way_every_time_is_told() -> None:
    """
    A call that the server gives up four times is a conflict.
    """
    calls = []

    @retried
    def contended() -> None:
        calls.append(1)
        raise GaveWay("in the way")

    with pytest.raises(Conflict, match="in the way"):
        contended()
    assert len(calls) == 4


def test_readers_cannot_write(store: SqlStore) -> None:
    """
    A reading transaction is refused every change by the server.
    """
    with (
        pytest.raises(BadSetting, match="read-only transaction"),
        store._database.reading() as connection,
    ):
        connection.exec_driver_sql("DELETE FROM adapter")


def test_a_reader_sees_one_state(store: SqlStore) -> None:
    """
    What is published while a reader looks, it does not see; the next reader does.
    """
    count = "SELECT count(*) FROM adapter_version"
    with store._database.reading() as connection:
        before = connection.exec_driver_sql(count).scalar()
        store.publish(draft(ANNA), NOON)
        assert (before, connection.exec_driver_sql(count).scalar()) == (0, 0)
    with store._database.reading() as connection:
        assert connection.exec_driver_sql(count).scalar() == 1


def test_a_commit_is_flushed_before_it_is_acknowledged(postgres_url: str) -> None:
    """
    Whatever the server's default, our sessions wait for the disk and let go of what they hold.
    """
    settings = (
        "synchronous_commit", "statement_timeout", "lock_timeout",
        "idle_in_transaction_session_timeout", "transaction_isolation",
    )  # fmt: skip
    with closing(Database(postgres_url)) as database, database.writing() as connection:
        found = [connection.exec_driver_sql(f"SHOW {s}").scalar() for s in settings]
    assert found == ["on", "1min", "5s", "1min", "read committed"]


def test_a_database_that_keeps_no_utf8_is_a_bad_setting(postgres_database: URL) -> None:
    """
    Names in any script need it; the message says how to make a database that has it.
    """
    name = f"fedia3_test_{secrets.token_hex(8)}"
    options = "TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'"
    execute(postgres_database, f"CREATE DATABASE {name} {options}")
    try:
        with pytest.raises(BadSetting, match=r"LATIN1.*createdb --encoding UTF8"):
            SqlStore(postgres_database.set(database=name))
    finally:
        execute(postgres_database, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"database": "fedia3_nowhere"}, "does not exist"),
        ({"username": "fedia3_nobody"}, "does not exist"),
        ({"host": "nowhere.invalid"}, "resolve host"),
        ({"query": {"sslmodes": "off"}}, "sslmodes"),
    ],
)
def test_a_wrong_url_is_a_bad_setting(
    postgres_url: str, parts: dict[str, object], said: str
) -> None:
    """
    A database, role, host or option that is not there is told, without the password.
    """
    with pytest.raises(BadSetting, match=said) as refused:
        SqlStore(changed(postgres_url, **{"password": "secret", **parts}))
    assert_no_secret(refused.value)


def test_a_role_that_may_not_log_in_is_a_bad_setting(postgres_url: str) -> None:
    """
    The server's refusal is told.
    """
    role = f"fedia3_{make_url(postgres_url).query['options'][-16:]}"
    with outside(postgres_url) as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} NOLOGIN")
    try:
        with pytest.raises(BadSetting, match="not permitted to log in"):
            SqlStore(changed(postgres_url, username=role))
    finally:
        with outside(postgres_url) as connection:
            connection.exec_driver_sql(f"DROP ROLE {role}")


@contextmanager
def a_server_that_says(state: str, message: str) -> Iterator[int]:
    """The port of a server that answers everybody with one fatal error, as PostgreSQL puts it."""
    fields = f"SFATAL\0VFATAL\0C{state}\0M{message}\0\0".encode()
    answer = b"E" + (len(fields) + 4).to_bytes(4) + fields

    def serve() -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                connection, _ = listener.accept()
                with connection:
                    while len(connection.recv(8, socket.MSG_PEEK)) == 8:
                        length, code = struct.unpack("!II", connection.recv(8))
                        if code in (80877103, 80877104):  # "may we encrypt?"
                            connection.sendall(b"N")
                            continue
                        connection.recv(length - 8)
                        connection.sendall(answer)
                        break

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve)
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        serving.result()


def test_a_wrong_password_is_a_bad_setting() -> None:
    """
    The server's refusal is told, the password is not.
    """
    words = 'password authentication failed for user "role"'
    with (
        a_server_that_says("28P01", words) as port,
        pytest.raises(BadSetting, match=words) as refused,
    ):
        SqlStore(f"postgresql://role:secret@127.0.0.1:{port}/db")
    assert_no_secret(refused.value)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("57P03", "the database system is starting up"),
        ("53300", "sorry, too many clients already"),
    ],
)
def test_a_server_that_is_not_ready_is_away(state: str, words: str) -> None:
    """
    What passes by itself is no wrong setting.
    """
    with a_server_that_says(state, words) as port, pytest.raises(StorageFailed, match=words):
        SqlStore(f"postgresql://role@127.0.0.1:{port}/db")


@pytest.mark.parametrize(
    "url",
    ["postgresql://role:secret@host:secret/db", "postgresql://role:secret@host", "secret"],
)
def test_a_url_that_is_none_is_a_bad_setting(url: str) -> None:
    """
    What a URL looks like is told; what was given may be a password.
    """
    with pytest.raises(BadSetting, match="postgresql://role@host/database") as refused:
        SqlStore(url)
    assert_no_secret(refused.value)


def assert_no_secret(error: BaseException | None) -> None:
    """Neither the error nor what it came from says the password."""
    while error is not None:
        assert "secret" not in f"{error} {error!r}"
        error = error.__cause__


def test_a_missing_driver_is_a_bad_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The message says what to install.
    """
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(BadSetting, match=r"pip install fedia3\[postgres\]"):
        SqlStore("postgresql://role@host/db")


def test_a_server_that_is_away_is_told(postgres_url: str) -> None:
    """
    Where nobody listens, opening fails as a disk that is away does.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(StorageFailed, match="look at the server"):
        SqlStore(changed(postgres_url, host="127.0.0.1", port=port))


def test_a_connection_that_breaks_costs_its_call_alone(store: SqlStore, postgres_url: str) -> None:
    """
    Sessions that the server ends fail the transaction under way, which leaves nothing; what is
    asked after that finds a new connection by itself.
    """
    end = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'fedia3' "
        "AND datname = current_database() AND pid <> pg_backend_pid()"
    )
    with (
        pytest.raises(StorageFailed, match="look before you repeat it"),
        store._database.writing() as connection,
    ):
        connection.exec_driver_sql(
            "INSERT INTO adapter (owner_kind, owner_name, base, next_version) "
            "VALUES ('user', 'zoe', '', 1)"
        )
        with outside(postgres_url) as stranger:
            stranger.exec_driver_sql(end)
        connection.exec_driver_sql("SELECT 1")
    with store._database.reading() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM adapter").scalar() == 0
    with outside(postgres_url) as stranger:
        stranger.exec_driver_sql(end)
    assert store.publish(draft(ANNA), NOON).version == 1


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("40001", GaveWay),
        ("40P01", GaveWay),
        ("55P03", Conflict),
        ("23505", Conflict),
        ("22001", BadInput),
        ("53100", StorageFailed),
        ("57P01", StorageFailed),
        ("57014", StorageFailed),
        ("42501", BadSetting),
    ],
)
def test_what_the_server_says_in_our_words(store: SqlStore, state: str, kind: type) -> None:
    """
    Every state that a server may end a transaction with becomes one of our errors, in its words.
    """
    raising = f"DO $$ BEGIN RAISE EXCEPTION 'its words' USING ERRCODE = '{state}'; END $$"
    with pytest.raises(kind, match="its words") as told, store._database.writing() as connection:
        connection.exec_driver_sql(raising)
    assert type(told.value) is kind


def test_a_conflict_does_not_quote_rows(store: SqlStore) -> None:
    """
    The server's details hold what is stored; they are not told.
    """
    insert = (
        "INSERT INTO adapter (owner_kind, owner_name, base, next_version) "
        "VALUES ('user', 'anna', '', 1)"
    )
    with pytest.raises(Conflict, match="duplicate key") as told, store._database.writing() as c:
        c.exec_driver_sql(insert)
        c.exec_driver_sql(insert)
    assert "anna" not in str(told.value)


PUBLISH_FOR_EVER = f"""
import sys
from contextlib import closing
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_postgres import ANNA, NOON, draft
from fedia3.coordinator.stores.sql import SqlStore

store = SqlStore(sys.argv[1])
number = len(store.versions(ANNA, draft(ANNA).base))
while True:
    number += 1
    print(store.publish(draft(ANNA, number), NOON, idem_key=str(number)).version, flush=True)
"""


@pytest.mark.slow
def test_no_acknowledged_publish_is_lost_to_a_kill(store: SqlStore, postgres_url: str) -> None:
    """
    A publisher is killed six times, each time after one more acknowledgement than the time before:
    what it was told is there, without a gap, at most one more than that.
    """
    for count in range(1, 7):
        with subprocess.Popen(
            [sys.executable, "-c", PUBLISH_FOR_EVER, postgres_url],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            told = [process.stdout.readline() for _ in range(count)]
            process.send_signal(signal.SIGKILL)
            told += [line for line in process.stdout if line.endswith("\n")]
        with store._database.writing(str(ANNA)):  # once the server has noticed
            pass
        there = [record.version for record in store.versions(ANNA, BASE)]
        assert there == list(range(len(there), 0, -1))
        assert len(there) - int(told[-1]) in (0, 1)
