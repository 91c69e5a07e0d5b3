"""Whatever is wrong with a registry is named; one that is whole has no fault."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator import inspection
from fedia3.coordinator.inspection import Inspected, inspect
from fedia3.coordinator.records import AdapterDraft, Contribution, Owner
from fedia3.coordinator.registry import Registry
from fedia3.coordinator.stores.engine import Database

BASE = "b" * 64
SCHEMA = Schema(BASE, (Target("layers.0.k", "k", 2),))
EVERYONE, ANNA = Owner.everyone(), Owner.user("anna")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look comes at once."""
    monkeypatch.setattr(inspection, "SECOND_LOOK_S", 0.0)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """One of everything, in a file."""
    with Registry.open(tmp_path) as registry:
        fill(registry)
        yield registry


def fill(registry: Registry) -> None:
    """Three rounds and two versions of anna's."""
    for number in range(1, 4):
        scales = Adapter(SCHEMA, np.array([1, number], np.float32))
        registry.commit_round(number, b"state", scales, [Contribution("c", "accepted", norm=0.5)])
    anchor = registry.versions(EVERYONE, BASE)[0].digest
    for number in range(2):
        part = PersonalAdapter(SCHEMA, np.full(2, number, np.float32), anchor)
        registry.publish_personal("anna", part, num_examples=1)


def looked_at(registry: Registry) -> Inspected:
    """With the schema known."""
    return inspect(registry, {BASE: SCHEMA}.get)


def file_of(folder: Path, digest: str) -> Path:
    """Where a blob lies."""
    return folder / "blobs" / digest[:2] / digest[2:4] / digest


def test_a_whole_registry_has_no_fault(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Five versions, all decoded, in pages of two; an orphan is counted and no fault.
    """
    monkeypatch.setattr(inspection, "PAGE", 2)
    registry.blobs.put(b"orphan")
    size = sum(file_of(tmp_path, r.digest).stat().st_size for r in registry.store.every_version())
    assert looked_at(registry) == Inspected(versions=5, decoded=5, blob_bytes=size, orphans=1)
    assert inspect(registry).decoded == 0  # no base model is here


def test_bytes_that_are_gone_or_changed_are_named(registry: Registry, tmp_path: Path) -> None:
    """
    One of anna's is gone, one of everyone's has another bit; the others are looked at all the same.
    """
    file_of(tmp_path, registry.versions(ANNA, BASE, limit=1)[0].digest).unlink()
    damaged = file_of(tmp_path, registry.versions(EVERYONE, BASE)[1].digest)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    found = looked_at(registry)
    assert (found.versions, found.decoded, found.faults) == (5, 3, 2)
    assert any("version 2 of user 'anna'" in fault and "gone" in fault for fault in found.named)
    assert any("version 2 of everyone" in fault for fault in found.named)


def test_bytes_that_are_not_what_the_database_says_are_named(registry: Registry) -> None:
    """
    A version whose whole, sound bytes are somebody's part, and one whose bytes are no adapter.
    """
    part = registry.versions(ANNA, BASE)[0]
    for digest in (part.digest, registry.blobs.put(b"garbage")):
        draft = {k: v for k, v in vars(part).items() if k in AdapterDraft.__annotations__}
        draft |= {"digest": digest, "global_digest": "0" * 64, "parent": None}
        registry.store.publish(AdapterDraft(**draft), part.created_at)
    named = inspect(registry).named
    assert len(named) == 2
    assert any("its file says global" in fault for fault in named)
    assert any("safetensors" in fault for fault in named)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("UPDATE adapter SET next_version = 2 WHERE owner_kind = 'user'", "the next version of"),
        ("DELETE FROM round WHERE round_num = 2", "1 of the rounds 1 … 3 are missing"),
        ("DELETE FROM server_state", "the server state is of rounds"),
        ("UPDATE server_state SET round_num = 1", "the server state is of rounds [1]"),
        ("DELETE FROM adapter WHERE owner_kind = 'user'", "refers to nothing in adapter"),
        ("INSERT INTO round VALUES (4, 1, 1, '{}', 0)", "says it is of round 1"),
    ],
)
def test_a_database_that_contradicts_itself_is_named(
    registry: Registry, tmp_path: Path, damage: str, said: str
) -> None:
    """
    What no call of ours could do, done to the file by hand while it is open.
    """
    with closing(sqlite3.connect(tmp_path / "registry.db")) as database, database:
        database.execute(damage)
    assert any(said in fault for fault in looked_at(registry).named)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE adapter_version SET num_examples = 9 WHERE version = 3", "version 3 of 'every"),
        ("UPDATE contribution SET norm = 0.25 WHERE round_num = 2", "round 2 was changed"),
        ("UPDATE round SET committed_ms = committed_ms + 1 WHERE round_num = 1", "round 1 was"),
        ("UPDATE server_state SET state = x'00'", "the server state was changed"),
        ("DELETE FROM adapter_version WHERE version = 2 AND form = 'personal'", "1 sealed rows"),
        ("UPDATE seal SET sha256 = x'00' WHERE rowid = 1", "was changed where it lies"),
    ],
)
def test_a_changed_value_in_a_sound_database_is_named(
    registry: Registry, tmp_path: Path, change: str, said: str
) -> None:
    """
    A number as good as any other: only its seal tells.
    """
    with closing(sqlite3.connect(tmp_path / "registry.db")) as database, database:
        for table in ("adapter_version", "round", "contribution"):
            database.execute(f"DROP TRIGGER {table}_immutable")
        database.execute(change)
    assert any(said in fault for fault in looked_at(registry).named)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE adapter_version SET num_examples = 9 WHERE version = 3", "version 3 of 'every"),
        ("UPDATE contribution SET norm = 0.25 WHERE round_num = 2", "round 2 was changed"),
        ("UPDATE server_state SET state = '\\x00'", "the server state was changed"),
        ("DELETE FROM adapter_version WHERE version = 2 AND form = 'personal'", "1 sealed rows"),
        ("UPDATE adapter SET next_version = 2 WHERE owner_kind = 'user'", "the next version of"),
    ],
)
def test_what_is_changed_in_postgresql_is_named(
    postgres_url: str, tmp_path: Path, change: str, said: str
) -> None:
    """
    Whole before, one fault after.
    """
    with (
        Registry.open(tmp_path, postgres_url) as registry,
        closing(Database(postgres_url)) as database,
    ):
        fill(registry)
        assert (looked_at(registry).versions, looked_at(registry).named) == (5, [])
        with database.writing() as connection:
            for table in ("adapter_version", "contribution"):
                connection.exec_driver_sql(f"ALTER TABLE {table} DISABLE TRIGGER USER")
            connection.exec_driver_sql(change)
        assert [said in fault for fault in looked_at(registry).named] == [True]


def test_a_row_that_no_record_can_hold_is_named(registry: Registry, tmp_path: Path) -> None:
    """
    Damaged JSON ends the look at versions, and says so.
    """
    with closing(sqlite3.connect(tmp_path / "registry.db")) as database, database:
        database.execute("DROP TRIGGER adapter_version_immutable")
        database.execute("UPDATE adapter_version SET metrics = '{' WHERE version = 2")
    assert any("cannot be read" in fault for fault in looked_at(registry).named)


def test_what_is_erased_meanwhile_is_no_fault(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Anna is erased when the first version was looked at.
    """

    def erase(versions: int) -> None:
        if versions == 1:
            registry.erase_user("anna")

    found = inspect(registry, watch=erase)
    assert (found.faults, found.versions) == (0, 5)


def test_only_so_many_faults_are_kept(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    All are counted.
    """
    monkeypatch.setattr(inspection, "MAX_NAMED", 1)
    for record in registry.versions(ANNA, BASE):
        registry.blobs.delete(record.digest)
    found = looked_at(registry)
    assert (found.faults, len(found.named)) == (2, 1)
