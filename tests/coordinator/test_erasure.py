"""After an erasure nothing on the disk tells who was erased or what was theirs."""

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator.directory import Device, Directory, Invite, Token, open_directory
from fedia3.coordinator.erasure import erase_user
from fedia3.coordinator.records import AliasMove, Contribution, Owner
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.stores.engine import Database, Table
from fedia3.errors import Erased

BASE = "b" * 64
SCHEMA = Schema(BASE, (Target("layers.0.k", "k", 64),))
ONES = Adapter(SCHEMA, np.ones(64, np.float32))
NOW = 1_900_000_000_000
NAME, ALIAS = "Zoë Unverwechselbar", "zoes-favourite"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """Two rounds, in which the devices 0 and 1 took part, device 1 in the first alone."""
    with Registry.open(tmp_path) as registry:
        people = [Contribution(f"{n:032x}", "accepted", num_examples=1) for n in range(2)]
        registry.commit_round(1, b"state", ONES, people)
        registry.commit_round(2, b"state", Adapter(SCHEMA, np.full(64, 2, np.float32)), people[:1])
        yield registry


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    """The directory in the same database."""
    with closing(open_directory(tmp_path)) as directory:
        yield directory


def enrol(directory: Directory, number: int, user: str) -> None:
    """A device whose name tells whose it is."""
    key = number.to_bytes(32)
    device = Device(f"{number:032x}", user, f"{user}'s phone", key, b"node" + key, NOW)
    invite = Invite(b"code" + key, user, NOW + 1, b"challenge")
    directory.add_invite(invite)
    directory.enrol(invite, device, Token(b"token" + key, "device", "", NOW + 1), NOW)


def publish(registry: Registry, user: str, seed: int) -> PersonalAdapter:
    """A part like no other, under a key that tells whose it is."""
    delta = np.random.default_rng(seed).normal(size=64).astype(np.float32)
    part = PersonalAdapter(SCHEMA, delta, encoding.digest(encoding.encode(ONES)))
    registry.publish_personal(user, part, num_examples=1, idem_key=f"{user} {seed}")
    return part


def promote(registry: Registry, user: str) -> None:
    """An alias that tells whose it is, moved by somebody who does, too; a yank beside it."""
    owner = Owner.user(user)
    move = AliasMove(
        owner=owner, base=BASE, name=ALIAS, version=1, actor=f"{user}'s phone", reason=f"{user}: ok"
    )
    registry.promote(move)
    registry.store.yank(owner, BASE, 2)


def found_in(folder: Path, pattern: bytes) -> list[str]:
    """The files below a folder that hold these bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if pattern in path.read_bytes()]


def test_nothing_on_the_disk_tells_of_an_erased_user(
    registry: Registry, directory: Directory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Among 200 users with three versions each, over many pages: before the erasure their name, bytes,
    digests and alias are found in the database, its log or a blob; after it nowhere, with
    everything still open, and not in what was logged.
    """
    caplog.set_level(logging.DEBUG)
    parts = []
    for number in range(200):
        user = NAME if number == 100 else f"user {number}"
        published = [publish(registry, user, 3 * number + n) for n in range(3)]
        enrol(directory, number, user)
        parts += published if user == NAME else []
    promote(registry, NAME)
    files = [encoding.encode_personal(part) for part in parts]
    told = [NAME.encode(), f"{NAME} 301".encode(), f"{NAME}'s phone".encode()]
    told += [ALIAS.encode(), f"{NAME}: ok".encode()]
    told += [encoding.digest(data).encode() for data in files]
    told += [encoding.digest(data).encode()[4:] for data in files]
    told += [part.delta.tobytes() for part in parts]
    assert all(found_in(tmp_path, pattern) for pattern in told)
    receipt = erase_user(registry, directory, NAME)
    assert receipt.traceless
    assert [found_in(tmp_path, pattern) for pattern in told] == [[]] * len(told)
    assert not any(pattern.decode(errors="replace") in caplog.text for pattern in told[:5])
    assert len(registry.owners("user", limit=300)) == 199


def test_no_row_in_postgresql_tells_of_an_erased_user(postgres_url: str, tmp_path: Path) -> None:
    """
    Of all rows of all tables, and of the blobs. What lies in the server's files is the server's
    affair, and the receipt does not promise it.
    """

    def rows() -> str:
        with database.reading() as reader:
            tables = [reader.execute(select(table)).all() for table in Table.metadata.sorted_tables]
        return repr(tables)

    with (
        Registry.open(tmp_path, postgres_url) as registry,
        closing(open_directory(tmp_path, postgres_url)) as directory,
        closing(Database(postgres_url)) as database,
    ):
        registry.publish_global(ONES)
        parts = [publish(registry, NAME, seed) for seed in range(2)]
        enrol(directory, 0, NAME)
        promote(registry, NAME)
        digests = [encoding.digest(encoding.encode_personal(part)) for part in parts]
        told = [NAME, f"{NAME} 1", f"{NAME}'s phone", f"{NAME}: ok", ALIAS, *digests]
        assert all(pattern in rows() for pattern in told)
        receipt = erase_user(registry, directory, NAME)
        assert (receipt.versions, receipt.traceless) == (2, False)
        assert not any(pattern in rows() for pattern in told)
        assert not any(registry.blobs.has(digest) for digest in digests)


def test_the_receipt_says_what_was_deleted_and_what_stays(
    registry: Registry, directory: Directory
) -> None:
    """
    Two versions; a device whose updates went into versions 1 and 2 of everyone's.
    """
    for seed in range(2):
        publish(registry, NAME, seed)
    enrol(directory, 0, NAME)
    enrol(directory, 1, "bob")
    receipt = erase_user(registry, directory, NAME)
    assert (receipt.versions, receipt.devices) == (2, (f"{0:032x}",))
    assert receipt.global_versions == (1, 2)
    assert [d.user for d in directory.enrolled()] == ["bob"]
    assert erase_user(registry, directory, "bob").global_versions == (1,)


def test_a_log_that_a_reader_holds_is_said(registry: Registry) -> None:
    """
    While somebody reads an older state the log cannot be cut; erasing again without them can.
    """
    publish(registry, NAME, 0)
    database = registry.store._database  # type: ignore[attr-defined]  # a SqlStore
    with closing(database._writer.raw_connection()) as connection:
        connection.cursor().execute("PRAGMA busy_timeout = 50")  # not five seconds
    with database.reading() as reader:
        reader.exec_driver_sql("SELECT count(*) FROM adapter").scalar()
        assert not registry.erase_user(NAME).tombstone.traceless
    assert registry.erase_user(NAME).tombstone.traceless


def test_a_publish_of_another_process_does_not_outlive_the_erasure(
    registry: Registry, directory: Directory, tmp_path: Path
) -> None:
    """
    It has put its bytes and waits for the database while another process erases: neither version
    nor bytes are there in the end.
    """
    with Registry.open(tmp_path) as other:
        put = registry.blobs.put

        def put_and_lose(data: bytes) -> str:
            digest = put(data)
            erase_user(other, directory, NAME)
            return digest

        registry.blobs.put = put_and_lose  # type: ignore[method-assign]
        with pytest.raises(Erased):
            publish(registry, NAME, 1)
    assert registry.versions(Owner.user(NAME), BASE) == ()
    assert len(list(registry.blobs.digests())) == 2  # everyone's
