"""A backup is whole or known to be none, and a restore brings nobody back who was erased since."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator import inspection
from fedia3.coordinator.backup import back_up, restore
from fedia3.coordinator.directory import Device, Invite, Token, open_directory
from fedia3.coordinator.erasure import erase_user
from fedia3.coordinator.inspection import inspect
from fedia3.coordinator.records import Contribution, Owner
from fedia3.coordinator.registry import Registry
from fedia3.errors import BadInput, BadSetting, Corrupt, Erased, NotFound, StorageFailed

BASE = "b" * 64
SCHEMA = Schema(BASE, (Target("layers.0.k", "k", 2),))
ONES = Adapter(SCHEMA, np.ones(2, np.float32))
EVERYONE, ANNA, BOB = Owner.everyone(), Owner.user("anna"), Owner.user("bob")
NOW = 1_900_000_000_000


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look at a fault comes at once."""
    monkeypatch.setattr(inspection, "SECOND_LOOK_S", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the registry lies."""
    return tmp_path / "registry"


@pytest.fixture
def registry(folder: Path) -> Iterator[Registry]:
    """A round, a part of anna's and one of bob's, and a device of each."""
    with Registry.open(folder) as registry, closing(open_directory(folder)) as directory:
        registry.commit_round(1, b"state", ONES, [Contribution("c", "accepted")])
        for number, user in enumerate(("anna", "bob"), 1):
            publish(registry, user, number, "key")
            key = number.to_bytes(32)
            device = Device(f"{number:032x}", user, "phone", key, b"node" + key, NOW)
            invite = Invite(b"code" + key, user, NOW + 1, b"challenge")
            directory.add_invite(invite)
            directory.enrol(invite, device, Token(b"token" + key, "device", "", NOW + 1), NOW)
        yield registry


def publish(registry: Registry, user: str, value: float, key: str) -> int:
    """A part of these values; its version."""
    anchor = encoding.digest(encoding.encode(ONES))
    part = PersonalAdapter(SCHEMA, np.full(2, value, np.float32), anchor)
    return registry.publish_personal(user, part, num_examples=1, idem_key=key).version


def test_a_restored_registry_is_what_was_backed_up(
    registry: Registry, folder: Path, tmp_path: Path
) -> None:
    """
    Versions, bytes, rounds, devices; what came after the backup is not in it, orphans neither.
    """
    registry.blobs.put(b"orphan")
    manifest = back_up(folder, tmp_path / "backup")
    publish(registry, "anna", 9, "later")
    assert restore(tmp_path / "backup", tmp_path / "again") == manifest
    with Registry.open(tmp_path / "again") as again:
        assert again.fetch(BOB, BASE) == registry.fetch(BOB, BASE)
        assert [r.version for r in again.versions(ANNA, BASE)] == [1]
        assert again.rounds() == registry.rounds()
        assert again.server_state() == b"state"
        assert inspect(again).orphans == inspect(again).faults == 0
        assert publish(again, "anna", 9, "later") == 2
    with closing(open_directory(tmp_path / "again")) as directory:
        assert [device.user for device in directory.enrolled()] == ["anna", "bob"]
    assert oct((tmp_path / "again").stat().st_mode)[-3:] == "700"
    assert oct((tmp_path / "again" / "registry.db").stat().st_mode)[-3:] == "600"


@pytest.mark.parametrize("what", ["backup", "again"])
def test_nothing_is_written_over(
    registry: Registry, folder: Path, tmp_path: Path, what: str
) -> None:
    """
    Neither a backup nor a restore goes where something lies.
    """
    if what == "again":
        back_up(folder, tmp_path / "backup")
    (tmp_path / what).mkdir()
    (tmp_path / what / "diary").write_text("mine")
    with pytest.raises(BadSetting, match="new or empty"):
        if what == "again":
            restore(tmp_path / "backup", tmp_path / "again")
        else:
            back_up(folder, tmp_path / "backup")
    assert [path.name for path in (tmp_path / what).iterdir()] == ["diary"]


def test_who_was_erased_since_does_not_come_back(
    registry: Registry, folder: Path, tmp_path: Path
) -> None:
    """
    Anna was erased after the backup: with the erasures of the registry that is replaced neither
    her versions nor her bytes, device, name or numbers are back, and her key stays refused.
    """
    anna = registry.versions(ANNA, BASE)[0]
    back_up(folder, tmp_path / "backup")
    publish(registry, "anna", 5, "since")
    with closing(open_directory(folder)) as directory:
        erase_user(registry, directory, "anna")
    restore(tmp_path / "backup", tmp_path / "again", erasures=folder)
    with Registry.open(tmp_path / "again") as again:
        assert again.owners("user") == (BOB,)
        assert not again.blobs.has(anna.digest)
        for key in ("key", "since"):
            with pytest.raises(Erased):
                publish(again, "anna", 1, key)
        assert publish(again, "anna", 1, "new") == 3
        assert inspect(again).faults == 0
        again.erase_user("anna")
    with closing(open_directory(tmp_path / "again")) as directory:
        assert [device.user for device in directory.enrolled()] == ["bob"]
    held = b"".join(p.read_bytes() for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert b"anna" not in held
    assert b"bob" in held


def test_a_later_backup_knows_the_erasures_too(
    registry: Registry, folder: Path, tmp_path: Path
) -> None:
    """
    Where the registry itself is lost, the erasures of the newest backup serve for an older one;
    what anna published between her erasure and that backup is not touched in it.
    """
    back_up(folder, tmp_path / "first")
    registry.erase_user("anna")
    publish(registry, "anna", 7, "came back")
    back_up(folder, tmp_path / "second")
    restore(tmp_path / "first", tmp_path / "old", erasures=tmp_path / "second")
    restore(tmp_path / "second", tmp_path / "new", erasures=folder)
    with Registry.open(tmp_path / "old") as old, Registry.open(tmp_path / "new") as new:
        assert old.owners("user") == (BOB,)
        assert [r.version for r in new.versions(ANNA, BASE)] == [2]


def test_a_device_that_was_shut_out_stays_out(
    registry: Registry, folder: Path, tmp_path: Path
) -> None:
    """
    Revoked after the backup; its user stays.
    """
    back_up(folder, tmp_path / "backup")
    with closing(open_directory(folder)) as directory:
        directory.revoke(f"{1:032x}", NOW)
    restore(tmp_path / "backup", tmp_path / "again", erasures=folder)
    with closing(open_directory(tmp_path / "again")) as directory:
        assert [device.user for device in directory.enrolled()] == ["bob"]
        assert directory.device(f"{1:032x}").user == "anna"


def test_erasures_of_another_registry_are_refused(
    registry: Registry, folder: Path, tmp_path: Path
) -> None:
    """
    Their hashes mean nobody here; nothing is restored.
    """
    registry.erase_user("anna")
    back_up(folder, tmp_path / "backup")
    with Registry.open(tmp_path / "other") as other:
        other.erase_user("anna")
    with pytest.raises(BadInput, match="another registry's"):
        restore(tmp_path / "backup", tmp_path / "again", erasures=tmp_path / "other")
    with pytest.raises(NotFound, match="nowhere"):
        restore(tmp_path / "backup", tmp_path / "again", erasures=tmp_path / "nowhere")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("damage", ["database", "blob", "lost blob", "manifest", "unfinished"])
def test_a_damaged_backup_is_not_restored(
    registry: Registry, folder: Path, tmp_path: Path, damage: str
) -> None:
    """
    One bit of the database or of a blob, a blob that is gone, no manifest or a broken one.
    """
    backup = tmp_path / "backup"
    back_up(folder, backup)
    blob = next((backup / "blobs").glob("??/??/*"))
    path = {"database": backup / "registry.db", "blob": blob}.get(damage)
    if path is not None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "lost blob":
        blob.unlink()
    elif damage == "manifest":
        (backup / "manifest.json").write_text("{}")
    else:
        (backup / "manifest.json").unlink()
    with pytest.raises(BadInput if damage in ("manifest", "unfinished") else Corrupt):
        restore(backup, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / ".again.restoring").exists()


def test_a_damaged_registry_is_not_backed_up(
    registry: Registry, folder: Path, tmp_path: Path
) -> None:
    """
    A blob that is gone or changed is named, and no manifest says that all is well.
    """
    registry.blobs.delete(registry.versions(BOB, BASE)[0].digest)
    with pytest.raises(Corrupt, match="version 1 of user 'bob'"):
        back_up(folder, tmp_path / "backup")
    with pytest.raises(BadInput, match="no finished backup"):
        restore(tmp_path / "backup", tmp_path / "again")


BACK_UP = """
import sys
from pathlib import Path
from fedia3.coordinator.backup import back_up
print("go", flush=True)
back_up(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_backup_is_known_as_unfinished(
    registry: Registry, folder: Path, tmp_path: Path
) -> None:
    """
    Killed at eight moments while rounds are committed: without a manifest it is refused, with one
    it is restored without a fault.
    """
    for number in range(2, 150):
        scales = Adapter(SCHEMA, np.array([1, number / 10], np.float32))
        registry.commit_round(number, b"state", scales)
    finished = []
    for attempt in range(8):
        backup, again = tmp_path / f"backup {attempt}", tmp_path / f"again {attempt}"
        command = [sys.executable, "-c", BACK_UP, str(folder), str(backup)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"go\n"
            until = time.monotonic() + attempt * 0.2 if attempt < 7 else float("inf")
            while process.poll() is None and time.monotonic() < until:
                number = len(registry.rounds()) + 1
                registry.commit_round(number, b"state", ONES)
            process.send_signal(signal.SIGKILL)
        finished.append((backup / "manifest.json").exists())
        if finished[-1]:
            restore(backup, again)
            with Registry.open(again) as restored:
                assert inspect(restored).faults == 0
        else:
            with pytest.raises(BadInput, match="no finished backup"):
                restore(backup, again)
    assert not finished[0]
    assert finished[-1]


def test_a_full_disk_ends_a_backup_with_a_word(
    registry: Registry, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The registry goes on, and the next attempt elsewhere succeeds.
    """

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises((StorageFailed, BadSetting), match="No space left"):
            back_up(folder, tmp_path / "backup")
    assert publish(registry, "anna", 3, "meanwhile") == 2
    back_up(folder, tmp_path / "another")


def test_a_backup_from_before_tombstones_learns_of_them(
    registry: Registry, folder: Path, tmp_path: Path
) -> None:
    """
    Its database has no pepper yet and makes up one when it is opened: the erasures' own counts.
    """
    back_up(folder, tmp_path / "backup")
    with closing(sqlite3.connect(tmp_path / "backup" / "registry.db")) as database, database:
        database.execute("UPDATE pepper SET pepper = randomblob(32)")
        database.execute("PRAGMA journal_mode = DELETE")
    manifest = json.loads((tmp_path / "backup" / "manifest.json").read_text())
    digest = encoding.digest((tmp_path / "backup" / "registry.db").read_bytes())
    changed = json.dumps(manifest | {"database_sha256": digest})
    (tmp_path / "backup" / "manifest.json").write_text(changed)
    registry.erase_user("anna")
    restore(tmp_path / "backup", tmp_path / "again", erasures=folder)
    with Registry.open(tmp_path / "again") as again:
        assert again.owners("user") == (BOB,)
        with pytest.raises(Erased):
            publish(again, "anna", 1, "key")
